"""Tests that compile the Triton kernels ahead of time, without a GPU, and find what the interpreter accepts.

Run with -s for the table of registers. The variants come from the launcher's own list, triton_rows.all_variants; only
the largest are compiled. After a change of a kernel run kernel_resources.py without options: 126 compilations, which
take one core 2 minutes.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "benchmarks" / "kernel_resources.py"


@pytest.mark.slow
def test_kernels_compile_without_spills():
    # In a new process, because a process with TRITON_INTERPRET=1 cannot compile.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, SCRIPT, "--few", "--processes", "1"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout)
    assert run.returncode == 0, run.stdout + run.stderr[-4000:]
    found = re.search(r"^(\d+) compilations, 0 with a problem$", run.stdout, re.MULTILINE)
    assert found is not None
    assert int(found[1]) > 30
    for chip in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100"):
        assert chip in run.stdout


def test_no_global_of_the_kernels_is_nan():
    """Triton refuses to launch a kernel whose globals differ from those it was compiled with, and nan differs from nan:
    with a global of nan every second launch on a GPU would fail."""
    import triton.language as tl

    from hgkd_fairseq.loss.triton import kernels as triton_kernels

    constants = {name: value.value for name, value in vars(triton_kernels).items() if isinstance(value, tl.constexpr)}
    assert len(constants) > 10
    assert [name for name, value in constants.items() if value != value] == []
