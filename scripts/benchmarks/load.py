"""Measure time and memory per pair and per token, up to 10^6 pairs and 10^7 tokens, and a loss step with 262,144 types.

    python scripts/benchmarks/load.py runs/load --csv load.csv      # all parts; about 30 minutes
    python scripts/benchmarks/load.py runs/load --csv load.csv --pairs 1000 10000 --only store    # parts by name
    python scripts/benchmarks/load.py --csv load.csv                # only print the tables

Each measurement runs in a new process. Seconds are CPU time, summed over all threads; set OMP_NUM_THREADS=1 to measure
a single thread. Memory is the peak resident memory beyond that before the measured function, without pages of mapped
files, which the kernel can reclaim. The tables mark parts whose cost per pair (token) at the largest size is more than
1.5 times that at the smallest size, and parts that take more than 1 KiB per pair (token).
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from measuring import append_csv, environment, markdown

PAIRS, TOKENS = (100_000, 300_000, 1_000_000), (1_000_000, 3_000_000, 10_000_000)
GROWS, MOST_BYTES = 1.5, 1024  # limits on the ratio of the costs and on the bytes per pair (token)
# Added to the cost at the smallest size before it is compared, for the overhead of a first call and memory that malloc
# keeps.
SLACK_S, SLACK_MIB = 0.02, 2
POLL_S = 0.005  # seconds between two samples of the memory


def parts(kind: str) -> dict[str, tuple[Callable, float]]:
    """Return the parts of a kind ("pair", "token" or "step") by name: (function, share of the pairs or tokens used).

    The modules are imported here because printing the tables does not need them.
    """
    if kind != "pair":
        import load_tokens

        return load_tokens.PARTS if kind == "token" else load_tokens.STEPS
    import load_folders
    import load_pairs

    return {
        "loading the data": (load_pairs.loading, 1),
        "checks of the data": (load_pairs.checks, 1),
        "batches of an epoch": (load_pairs.batching, 1),
        "collating an epoch": (load_pairs.collating, 1),
        "unigram counts": (load_pairs.unigram, 1),
        "queue of selective-global": (load_pairs.gate_queue, 1),
        "sentence weights: table, look-up, save, load": (load_pairs.weights_table, 1),
        "sentence weights: plan of a refresh": (load_pairs.refresh_plan, 1),
        "sentence weights: a refresh (1/20)": (load_pairs.refresh_walk, 1 / 20),
        "store of a teacher: written": (load_folders.store_written, 1),
        "store of a teacher: an epoch read": (load_folders.store_read, 1),
        "translations: written": (load_folders.translations_written, 1),
        "translations: checked, chosen, binarised": (load_folders.distilled_data, 1),
        "calibration, forced": (load_pairs.predictions, 1),
        "table of tokens: written": (load_pairs.token_table, 1),
        "calibration, inference (1/20)": (load_folders.generated, 1 / 20),
    }


def child(kind: str, name: str, folder: Path, size: int, pipe) -> None:
    warnings.simplefilter("ignore")  # hydra warns at every start
    run = parts(kind)[name][0](folder, size)
    pipe.send("ready")
    pipe.recv()
    start = time.process_time()
    found = run()
    pipe.send(time.process_time() - start)
    pipe.recv()  # waits until the parent has read the memory
    pipe.send(found() if callable(found) else "")


def resident(process: int) -> int:
    """Return the resident memory of a process in KiB, without mapped files; 0 if the process has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(map(int, re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", text, flags=re.MULTILINE)))


def measure(kind: str, name: str, folder: Path, size: int) -> tuple[float, float, str]:
    """Measure a part in a new process.

    Returns:
        CPU seconds, peak memory in MiB, and the additional text of the part ("" if it has none).

    Raises:
        EOFError: the part fails; the new process prints the traceback.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["load_folders", "load_pairs", "load_tokens"])
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(kind, name, folder, size, theirs))
    process.start()
    theirs.close()
    try:
        ours.recv()
        before = peak = resident(process.pid)
        ours.send("go")
        while not ours.poll(POLL_S):
            peak = max(peak, resident(process.pid))
        seconds = ours.recv()
        peak = max(peak, resident(process.pid))
        ours.send("go on")
        said = ours.recv()
    finally:
        process.join()
    return seconds, (peak - before) / 1024, said


def table(rows: list[dict]) -> str:
    """Return the markdown table of rows that are all of kind "pair" or all of kind "token"."""
    sizes = sorted({int(row["size"]) for row in rows})
    scale, unit = (1e6, "µs") if rows[0]["kind"] == "pair" else (1e9, "ns")
    header = ["", *[f"{unit} at {size:.0e}" for size in sizes], *[f"bytes at {size:.0e}" for size in sizes], "MiB", ""]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        of = {int(row["size"]): row for row in rows if row["name"] == name}
        counts = {size: float(row["count"]) for size, row in of.items()}
        seconds = {size: float(row["seconds"]) / counts[size] for size, row in of.items()}
        memory = {size: float(row["mib"]) * 2**20 / counts[size] for size, row in of.items()}
        first, last = min(of), max(of)
        notes = []
        allowed = GROWS * counts[last] / counts[first]
        if float(of[last]["seconds"]) > allowed * (float(of[first]["seconds"]) + SLACK_S):
            notes.append("time grows")
        if float(of[last]["mib"]) > allowed * (float(of[first]["mib"]) + SLACK_MIB):
            notes.append("memory grows")
        if memory[last] > MOST_BYTES:
            notes.append("over 1 kB")
        cells = [[f"{values[size]:.{digits}f}" if size in of else "" for size in sizes] for values, digits in
                 (({size: scale * value for size, value in seconds.items()}, 2), (memory, 1))]  # fmt: skip
        lines.append([name, *cells[0], *cells[1], f"{float(of[last]['mib']):,.1f}", ", ".join(notes)])
    return markdown(header, lines)


def steps(rows: list[dict]) -> str:
    return markdown(
        ["a step", "seconds", "MiB", "error against eager in fp64"],
        [[row["name"], f"{float(row['seconds']):.1f}", f"{float(row['mib']):,.0f}", row["said"]] for row in rows],
    )


def report(file: Path) -> str:
    """Return the tables of a CSV file; if a measurement was repeated, its last row counts."""
    with file.open(newline="") as source:
        found = {(row["kind"], row["name"], row["size"]): row for row in csv.DictReader(source)}
    made = []
    for kind, what in (("pair", "a pair"), ("token", "a token"), ("step", "")):
        rows = [row for row in found.values() if row["kind"] == kind]
        if rows:
            made.append(f"{what.capitalize()}:\n\n{table(rows)}" if what else steps(rows))
    return "\n".join(made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="for corpora and what is made of them, 4 GB; reused")
    parser.add_argument(
        "--csv", type=Path, required=True, help="append a row a measurement there, and print its tables"
    )
    parser.add_argument("--pairs", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--kinds", nargs="+", default=["pair", "token", "step"], choices=["pair", "token", "step"])
    parser.add_argument("--only", default="", metavar="WORD", help="parts whose name has it")
    args = parser.parse_args()
    if args.folder:
        args.folder.mkdir(parents=True, exist_ok=True)
    for kind in args.kinds if args.folder else ():
        sizes = {"pair": args.pairs, "token": args.tokens, "step": [1]}[kind]
        for name, (_, share) in parts(kind).items():
            for size in sizes if args.only in name else ():
                count = max(round(size * share), 1)
                seconds, mib, said = measure(kind, name, args.folder, count)
                print(f"{name}, {count}: {seconds:.2f} s, {mib:.1f} MiB {said}", file=sys.stderr, flush=True)
                row = {"kind": kind, "name": name, "size": size, "count": count, "seconds": seconds, "mib": mib}
                append_csv(args.csv, [{**environment("cpu"), **row, "said": said}])
    print(report(args.csv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
