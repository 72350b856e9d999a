#!/usr/bin/env python3
"""Print the registers, spills and shared memory of the Triton kernels, compiled ahead of time; needs no GPU.

    python scripts/benchmarks/kernel_resources.py            a selection that covers each kernel, flag, dtype and chip
    python scripts/benchmarks/kernel_resources.py --every    all combinations: thousands of compilations
    python scripts/benchmarks/kernel_resources.py --few      the largest variants of each kernel, on each chip
    python scripts/benchmarks/kernel_resources.py --plain    three kernels with plain settings, on each chip

Prints one line per compilation. The exit status is 1 if a kernel spills registers, uses a stack, or needs more
resources than the chip has.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

# Kernels cannot be compiled in Triton's interpreter mode, which is chosen when Triton is imported.
os.environ.pop("TRITON_INTERPRET", None)

from hgkd_fairseq.loss.triton.rows import Variant, all_variants  # noqa: E402

# Maximum shared memory of a program in bytes, by compute capability.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448, 100: 232_448}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}
VOCABULARIES = (32000, 10152)  # two launch shapes; rows need no padding to be aligned to 16 bytes
ODD_VOCABULARIES = (507, 32001)  # rows are padded to be aligned, so their stride is larger than their length

POINTERS = {
    "target": "*i64",
    "results": "*fp32",
    "flags": "*i8",
    "statistics": "*fp32",
    "data_weight": "*fp32",
    "teacher_weight": "*fp32",
}
ALIGNED = ("student_logits", "teacher_logits", "results", "flags", "statistics")  # to 16 bytes: new allocations


class Job(NamedTuple):
    variant: Variant
    dtype: str  # of the logits, a key of ITEMSIZE
    capability: int  # compute capability, a key of SHARED_LIMIT


class Report(NamedTuple):
    job: Job
    registers: int  # per thread
    stack: int  # bytes per thread
    spills: int  # bytes per thread, stores and loads
    shared: int  # bytes per program
    seconds: float  # for the compilation

    @property
    def problem(self) -> str | None:
        if self.spills or self.stack:
            return "spills"
        return "shared memory" if self.shared > SHARED_LIMIT[self.job.capability] else None

    def __str__(self) -> str:
        (kernel, constants, num_warps), dtype, capability = self.job
        flags = " ".join(name.lower() for name, value in constants.items() if value is True) or "-"
        shape = f"{constants['DEPTH']}x{constants['THREADS']}x{constants['VECTOR']}"
        numbers = f"{self.registers:9} {self.stack:5} {self.spills:6} {self.shared:6} {self.seconds:5.1f}"
        line = f"{kernel:15} sm_{capability:<3} {dtype} {constants['V']:>6} {num_warps:5} {shape:>9} {numbers}  {flags}"
        return f"{line}  <- {self.problem}" if self.problem else line


HEADER = "kernel          chip   type      V warps      tile registers stack spills shared  time  flags"


def jobs(selection: str) -> list[Job]:
    """Return the compilations of a selection: "every", "selection" (the default), "few" or "plain"."""

    def heavy(vocabulary: int, dtype: str) -> Iterator[Variant]:
        """Yield the variant of each kernel with the most flags, and that of `token_rows` with the fewest; for "plain",
        only the variant of each kernel with the fewest. All have a teacher, and make a gradient where that is a flag.
        """
        for kernel in ("token_rows", "statistics_rows", "gradient_rows"):
            found = [v for v in all_variants(vocabulary, ITEMSIZE[dtype]) if v.kernel == kernel]
            found = [v for v in found if v.constants["HAS_TEACHER"] and v.constants.get("MAKE_GRADIENT", True)]
            by_flags = sorted(found, key=lambda v: sum(v.constants.values()))
            if selection != "plain":
                yield by_flags[-1]
            if selection == "plain" or kernel == "token_rows":
                yield by_flags[0]

    if selection == "plain":
        return [Job(v, "bf16", capability) for capability in SHARED_LIMIT for v in heavy(32000, "bf16")]
    if selection == "every":
        return [
            Job(v, dtype, capability)
            for capability in SHARED_LIMIT
            for dtype in ITEMSIZE
            for vocabulary in (*VOCABULARIES, *ODD_VOCABULARIES)
            for v in all_variants(vocabulary, ITEMSIZE[dtype])
        ]
    if selection == "few":
        found = [Job(v, "bf16", capability) for capability in SHARED_LIMIT for v in heavy(VOCABULARIES[0], "bf16")]
        found += [Job(v, dtype, 90) for dtype in ("fp32", "fp16") for v in heavy(VOCABULARIES[1], dtype)]
        return found + [Job(v, "bf16", 90) for v in heavy(ODD_VOCABULARIES[1], "bf16")]
    found = [Job(v, "bf16", 90) for v in all_variants(VOCABULARIES[0], 2)]
    found += [
        Job(v, dtype, capability)
        for capability, vocabularies in ((80, VOCABULARIES[:1]), (90, VOCABULARIES), (100, VOCABULARIES[:1]))
        for dtype in ITEMSIZE
        for vocabulary in vocabularies
        for v in heavy(vocabulary, dtype)
    ]
    found += [Job(v, "bf16", capability) for capability in (86, 89) for v in heavy(VOCABULARIES[0], "bf16")]
    found += [Job(v, dtype, 90) for dtype in ("fp32", "bf16") for n in ODD_VOCABULARIES for v in heavy(n, dtype)]
    return [job for i, job in enumerate(found) if job not in found[:i]]


def report(job: Job) -> Report:
    """Compile a kernel and return the resources that ptxas reports.

    Raises:
        subprocess.CalledProcessError: ptxas fails.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hgkd_fairseq.loss.triton import kernels as triton_kernels

    begin = time.perf_counter()
    variant, dtype, capability = job
    kernel = getattr(triton_kernels, variant.kernel)
    types = {**POINTERS, "student_logits": f"*{dtype}", "teacher_logits": f"*{dtype}", "rows": "i32"}
    signature = {
        name: "constexpr" if name in variant.constants else types.get(name, "fp32") for name in kernel.arg_names
    }
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in ALIGNED}
    compiled = triton.compile(
        ASTSource(kernel, signature, variant.constants, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": variant.num_warps},
    )
    ptx = compiled.asm["ptx"]
    chip = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)[1]
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin" / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={chip}", source, "-o", Path(folder) / "kernel.cubin"]
        log = subprocess.run(command, check=True, capture_output=True, text=True).stderr

    def number(pattern: str) -> int:
        return sum(int(found) for found in re.findall(pattern, log))

    return Report(
        job,
        registers=number(r"Used (\d+) registers"),
        stack=number(r"(\d+) bytes stack frame"),
        spills=number(r"(\d+) bytes spill"),
        shared=max(compiled.metadata.shared, number(r"(\d+) bytes smem")),
        seconds=time.perf_counter() - begin,
    )


def reports(selected: Iterable[Job], processes: int = 2) -> Iterator[Report]:
    """Yield the reports in the order of the jobs, compiled by `processes` processes with an empty Triton cache."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
            yield from pool.map(report, selected)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = parser.add_mutually_exclusive_group()
    some.add_argument("--every", dest="selection", action="store_const", const="every", default="selection")
    some.add_argument("--few", dest="selection", action="store_const", const="few")
    some.add_argument("--plain", dest="selection", action="store_const", const="plain")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    print(HEADER)
    problems = total = 0
    for line in reports(jobs(arguments.selection), arguments.processes):
        print(line, flush=True)
        problems += line.problem is not None
        total += 1
    print(f"{total} compilations, {problems} with a problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
