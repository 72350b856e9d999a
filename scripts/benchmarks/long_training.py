"""Measure whether the memory of a training that runs for hours stays constant.

    python scripts/benchmarks/long_training.py runs/long --minutes 180     # trains, then prints the table
    python scripts/benchmarks/long_training.py --table runs/long/memory.csv   # the table alone, at any time

The training is a fairseq-train of a small model with a live teacher and a stateful gate, with many epochs, validations
and checkpoints that replace older ones. Its resident memory is recorded in memory.csv at regular intervals.

The slope is a least-squares fit over the last two thirds of the time. Its 95 % interval is a moving-block bootstrap of
the residuals with blocks of five minutes, because neighbouring samples are strongly correlated.
"""

from __future__ import annotations

import argparse
import csv
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
BLOCK_S = 300  # seconds
RESAMPLES = 4000
STOPPED = 75  # exit status of a training that stops on SIGTERM

SIZE = (
    *("--arch", "transformer_iwslt_de_en", "--encoder-layers", 2, "--decoder-layers", 2),
    *("--encoder-embed-dim", 64, "--decoder-embed-dim", 64, "--encoder-ffn-embed-dim", 128),
    *("--decoder-ffn-embed-dim", 128, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
    *("--share-all-embeddings", "--dropout", 0.1),
)
STEPS = (
    *("--optimizer", "adam", "--lr", 0.001, "--clip-norm", 1, "--max-tokens", 2000),
    *("--cpu", "--no-progress-bar", "--log-format", "json", "--log-interval", 50),
)
ROTATING = (
    *("--keep-last-epochs", 2, "--keep-best-checkpoints", 2, "--save-interval-updates", 150),
    *("--keep-interval-updates", 2, "--best-checkpoint-metric", "nll_loss"),
)


def fairseq_train(*options) -> list[str]:
    program = Path(sys.executable).parent / "fairseq-train"
    return [*([str(program)] if program.exists() else [sys.executable, "-m", "fairseq_cli.train"]), *map(str, options)]


def memory(process: int) -> tuple[float, float]:
    """Return the resident memory in MiB of a process, and of all its child processes together."""

    def resident(folder: Path) -> int:
        found = re.search(r"^VmRSS:\s+(\d+) kB", (folder / "status").read_text(), flags=re.MULTILINE)
        return int(found.group(1)) if found else 0

    own, others = 0, 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if folder.name == str(process):
                own = resident(folder)
            elif int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == process:
                others += resident(folder)
        except (FileNotFoundError, ProcessLookupError):
            continue  # the process has ended in the meantime
    return own / 1024, others / 1024


def updates_done(log: Path) -> int:
    """Return the last number of updates in the final 20 kB of a training log, or 0 if there is none."""
    with log.open("rb") as source:
        source.seek(max(0, log.stat().st_size - 20_000))
        found = re.findall(rb'num_updates": "(\d+)"', source.read())
    return int(found[-1]) if found else 0


def train(folder: Path, minutes: float, every_s: float, pairs: int) -> int:
    """Train a teacher, then a student for a limited time while its memory is recorded in `folder`/memory.csv.

    Args:
        folder: output folder for data, models, logs and memory.csv.
        minutes: time after which the training of the student is stopped.
        every_s: seconds between two samples of the memory.
        pairs: number of training pairs.

    Returns:
        Exit status of the student's training; STOPPED if it was stopped as planned.

    Raises:
        subprocess.CalledProcessError: the training of the teacher fails; its output is in `folder`/teacher.log.
    """
    import corpora  # imports fairseq, which --table does not need

    data, teacher, student = folder / "data", folder / "teacher", folder / "student"
    corpora.write(data, {"train": pairs, "valid": 200}, types=2000, longest=100)
    made = fairseq_train(data, *SIZE, *STEPS, "--max-epoch", 2, "--no-epoch-checkpoints", "--save-dir", teacher)
    with (folder / "teacher.log").open("w") as log:
        subprocess.run(made, stdout=log, stderr=subprocess.STDOUT, check=True)
    distilled = fairseq_train(
        *(data, *SIZE, *STEPS, *ROTATING, "--save-dir", student, "--max-epoch", 10**6),
        *("--user-dir", ROOT / "hgkd_fairseq", "--task", "translation_with_teacher", "--criterion", "hard_gate_kd"),
        *("--teacher-path", teacher / "checkpoint_last.pt", "--gate", "selective-global", "--gate-queue", 30000),
    )
    log = folder / "student.log"
    with log.open("w") as out, (folder / "memory.csv").open("w", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(["seconds", "training_mib", "workers_mib", "updates"])
        process = subprocess.Popen(distilled, stdout=out, stderr=subprocess.STDOUT)
        start = time.monotonic()
        try:
            while process.poll() is None and time.monotonic() - start < 60 * minutes:
                time.sleep(every_s)
                row = (time.monotonic() - start, *memory(process.pid))
                if row[1]:
                    writer.writerow([f"{value:.2f}" for value in row] + [updates_done(log)])
                    table.flush()  # keeps the samples if this process is killed
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            process.wait()
    return process.returncode


class Trend(NamedTuple):
    slope: float  # MiB per hour
    low: float  # of the 95 % interval
    high: float


def trend(seconds: np.ndarray, mib: np.ndarray, seed: int = 1) -> Trend:
    """Fit the slope of `mib` (samples,) over `seconds` (samples,) by least squares.

    The 95 % interval is from a moving-block bootstrap of the residuals.
    """
    hours = seconds / 3600
    design = np.stack([np.ones_like(hours), hours], 1)
    solve = np.linalg.pinv(design)  # (2, n)
    fitted = design @ (solve @ mib)
    residuals, count = mib - fitted, len(mib)
    block = max(1, min(count // 2, round(BLOCK_S / np.median(np.diff(seconds)))))
    rng = np.random.default_rng(seed)
    starts = rng.integers(0, count - block + 1, (RESAMPLES, -(-count // block)))
    drawn = residuals[(starts[:, :, None] + np.arange(block)).reshape(RESAMPLES, -1)[:, :count]]
    slopes = (fitted + drawn) @ solve[1]
    return Trend(float((solve @ mib)[1]), *map(float, np.quantile(slopes, [0.025, 0.975])))


def report(file: Path) -> str:
    with file.open(newline="") as source:
        rows = np.array([[float(value) for value in row.values()] for row in csv.DictReader(source)])
    if len(rows) < 10:
        return f"{len(rows)} samples: too few for a slope"
    seconds, training, workers, updates = rows.T
    late = seconds >= seconds[0] + (seconds[-1] - seconds[0]) / 3
    lines = [
        "| | |",
        "|---|---:|",
        f"| minutes; updates | {seconds[-1] / 60:.1f}; {updates[-1]:,.0f} |",
        f"| resident, MiB, at {seconds[late][0] / 60:.0f} min (mean of 5) | {training[late][:5].mean():.1f} |",
        f"| resident, MiB, at the end (mean of 5) | {training[-5:].mean():.1f} |",
        f"| resident, MiB, at most | {training.max():.1f} |",
    ]
    for name, values in (("the training", training), ("its loading workers", workers)):
        found = trend(seconds[late], values[late])
        lines.append(
            f"| slope of {name}, last two thirds, MiB/hour | {found.slope:+.2f} [{found.low:+.2f}, {found.high:+.2f}] |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where data, models and memory.csv are written")
    parser.add_argument("--minutes", type=float, default=180)
    parser.add_argument("--every", type=float, default=10, metavar="SECONDS", help="between two samples")
    parser.add_argument("--pairs", type=int, default=4000)
    parser.add_argument("--table", type=Path, metavar="MEMORY.CSV", help="train nothing: print the table of that file")
    args = parser.parse_args()
    if (args.table is None) == (args.folder is None):
        parser.error("name a folder to train in, or --table MEMORY.CSV")
    if args.table:
        print(report(args.table))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped before its time"))  # lets `train` stop the training
    status = train(args.folder, args.minutes, args.every, args.pairs)
    print(report(args.folder / "memory.csv"))
    if status != STOPPED:
        print(f"the training ended with {status}, not {STOPPED}: see {args.folder / 'student.log'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
