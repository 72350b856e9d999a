#!/usr/bin/env python3
"""Run a study: every cell of a grid that is not finished yet. Interrupt it anywhere and start it again: it goes on.

    run.py multi30k.toml [--dir DIR] [--jobs N] [--from FOLDER] [--dry-run]

A finished cell is never run again: a method or a seed that is added to the grid costs its own cells only. Training that
was killed resumes from its last epoch. A cell that was made with other options than the grid has now is refused, never
mixed in. Several runs of this script may share a folder, on several machines with a common file system too if it knows
locks: each takes cells that are free. `table.py DIR` makes tables and figures of what is finished, at any time.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path
from typing import IO

from study import Cell, Grid, user_dir, write_json

from hgkd_fairseq.errors import UserError

HERE = Path(__file__).parent
SCRIPTS = HERE.parent
BIN = Path(sys.executable).parent
POLL_S = 1.0
# On the CPU a training step allocates and frees hundreds of megabytes. glibc would hand them back to the kernel each
# time, and getting them again can cost more than the arithmetic: keep them, in large pages.
MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "8589934592",
    "MALLOC_TOP_PAD_": "268435456",
    "THP_MEM_ALLOC_ENABLE": "1",
}


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), "", text, flush=True)


# ---------------------------------------------------------------------------------------------------------------- data


def prepare(grid: Grid, folder: Path, source: str | None) -> None:
    """text/ and data-bin/ of the study, once."""
    made = folder / "data.json"
    if made.exists():
        before = json.loads(made.read_text())
        if before != grid.data:
            raise UserError(f"{folder} was made with other data ({before}, not {grid.data}); choose another --dir")
        return
    text = folder / "text"
    if "corpus" in grid.data:
        whole = folder / "corpus"
        given = ["--from", source] if source else []
        script("get_data.sh", grid.data["corpus"], whole, *given)
    else:
        whole = Path(grid.data["text"])
    text.mkdir(exist_ok=True)
    held_out = ["valid1"] if (whole / "valid1.de").exists() else []
    for split in ("train", "valid", "test", *held_out):
        for language in ("de", "en"):
            try:
                with open(whole / f"{split}.{language}", encoding="utf-8", newline="\n") as lines:
                    first = list(islice(lines, grid.data.get("pairs") if split == "train" else None))
            except FileNotFoundError as error:
                raise UserError(f"{error.filename} does not exist; [data] text names its folder") from None
            (text / f"{split}.{language}").write_text("".join(first), encoding="utf-8", newline="\n")
    shutil.rmtree(folder / "data-bin", ignore_errors=True)
    script("prepare_data.sh", text, folder / "data-bin", "--vocab", grid.data["vocabulary"])
    write_json(made, grid.data)


def script(name: str, *arguments) -> None:
    command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
    if subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, check=False).returncode:
        raise UserError(f"{name} did not finish; it has said why")


# --------------------------------------------------------------------------------------------------------------- cells


def check(cells: list[Cell], folder: Path) -> None:
    """Refuse cells on disk that other options have made."""
    for cell in cells:
        file = folder / cell.folder / "cell.json"
        if not file.exists():
            continue
        before = json.loads(file.read_text())["commands"]
        if before != cell.commands:
            now, old = (shlex.split(" ".join(commands)) for commands in (cell.commands, before))
            changed = " ".join(option for option in old if option not in now) or "other options"
            raise UserError(
                f"{folder / cell.folder} was made with {changed} and the grid says otherwise now; "
                "choose another --dir, or remove that folder to run it again"
            )


def finished(cell: Cell, folder: Path) -> bool:
    return (folder / cell.folder / "scores.json").exists()


def claim(folder: Path) -> IO | None:
    """The lock of a cell, or None where another process works on it. Our children inherit it: a training that outlives
    this script keeps it until it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / "lock", "w")  # noqa: SIM115  open as long as the cell is worked on
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock


def trained(checkpoint: Path, updates: int) -> bool:
    """Whether the last checkpoint has made all updates. fairseq would make one more if it were started again."""
    if not checkpoint.exists():
        return False
    from fairseq.checkpoint_utils import load_checkpoint_to_cpu

    return load_checkpoint_to_cpu(str(checkpoint))["optimizer_history"][-1]["num_updates"] >= updates


class Runner:
    """Runs cells of a study, `jobs` at a time."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.cells, self.folder, self.jobs = cells, folder, jobs
        self.choosing = threading.Lock()
        self.stopped = threading.Event()
        self.failed: set[str] = set()
        self.children: set[subprocess.Popen] = set()
        self.environment = {**os.environ, **MEMORY}
        if jobs > 1:  # threads of several processes spin against each other and take 5 to 10 times as long
            self.environment["OMP_NUM_THREADS"] = "1"
        import torch

        self.device = [] if torch.cuda.is_available() else ["--cpu"]

    def run(self) -> bool:
        """Whether every cell is finished."""
        workers = [threading.Thread(target=self.work) for _ in range(self.jobs)]
        try:
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        except KeyboardInterrupt:
            self.stopped.set()
            for child in list(self.children):
                child.terminate()
            say("interrupted; the same command goes on from here")
            raise
        return not self.failed

    def work(self) -> None:
        while not self.stopped.is_set():
            cell, lock = self.next()
            if cell is None:
                return
            if lock is None:
                time.sleep(POLL_S)
                continue
            try:
                self.make(cell, lock)
            except UserError as error:
                say(f"{cell.folder}: {error}")
                self.failed.add(cell.folder)
            finally:
                lock.close()

    def next(self) -> tuple[Cell | None, IO | None]:
        """A cell to work on and its lock; a cell without a lock: there is something to wait for; neither: done."""
        with self.choosing:
            waiting = None
            for cell in self.cells:
                if cell.folder in self.failed or finished(cell, self.folder):
                    continue
                if cell.teacher in self.failed:
                    say(f"{cell.folder}: cannot be trained without {cell.teacher}")
                    self.failed.add(cell.folder)
                    continue
                waiting = waiting or cell
                if cell.teacher and not (self.folder / cell.teacher / "scores.json").exists():
                    continue
                lock = claim(self.folder / cell.folder)
                if lock is None:
                    continue
                if not finished(cell, self.folder):
                    return cell, lock
                lock.close()  # another process has finished it in this moment
            return waiting, None

    def make(self, cell: Cell, lock: IO) -> None:
        folder = self.folder / cell.folder
        write_json(folder / "cell.json", cell.description())
        place = f"cell {self.cells.index(cell) + 1} of {len(self.cells)}"
        if not trained(folder / "checkpoint_last.pt", cell.updates):
            say(f"{cell.folder}: training ({place}; log: {folder / 'train.log'})")
            train = [BIN / "fairseq-train", *cell.train, "--user-dir", user_dir(), *self.device]
            if not self.call(cell, train, "train.log", lock):
                return
        score = [sys.executable, HERE / "score.py", *cell.score, *self.device]
        if self.call(cell, score, "score.log", lock):
            found = json.loads((folder / "scores.json").read_text())
            say(
                f"{cell.folder}: BLEU {found['bleu']:.1f}, ECE {100 * found['ece']:.2f} %, "
                f"validation NLL {found['valid_nll_best']:.3f} bits, {found['minutes']:.1f} minutes"
            )

    def call(self, cell: Cell, command: list, log: str, lock: IO) -> bool:
        """Run a command of a cell, which keeps the cell's lock; False where it failed, which is said."""
        file = self.folder / cell.folder / log
        with file.open("a") as output:
            child = subprocess.Popen(
                [str(part) for part in command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
                stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()],
            )  # fmt: skip
            self.children.add(child)
            status = child.wait()
            self.children.discard(child)
        if status and not self.stopped.is_set():
            lines = file.read_text(errors="replace").splitlines()
            say(f"{cell.folder}: {Path(command[0]).name} ended with status {status}: {lines[-1] if lines else ''}")
            self.failed.add(cell.folder)
        return status == 0


def show(cells: list[Cell], folder: Path) -> None:
    for cell in cells:
        print(f"# {cell.folder}: {'finished' if finished(cell, folder) else 'to do'}", *cell.commands, "", sep="\n")
    print(f"# {len(cells)} cells, {sum(finished(cell, folder) for cell in cells)} finished")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, help="a .toml file such as scripts/study/multi30k.toml")
    parser.add_argument("--dir", type=Path, help="the study's folder (default: runs/study/NAME-OF-THE-GRID)")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time, of one thread (default: 1)")
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="a local copy of the data, see get_data.sh")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and their commands")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    try:
        grid = Grid(args.grid)
        cells = grid.cells()
        folder = (args.dir or SCRIPTS.parent / "runs" / "study" / args.grid.stem).resolve()
        check(cells, folder)
        if args.dry_run:
            show(cells, folder)
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        prepare(grid, folder, args.source)
        return 0 if Runner(cells, folder, max(args.jobs, 1)).run() else 1
    except UserError as error:
        print(f"run.py: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
