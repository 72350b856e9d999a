#!/usr/bin/env python3
"""Run all unfinished cells of a study. The script can be interrupted and started again at any time.

    run.py multi30k.toml [--dir DIR] [--jobs N] [--precision P] [--from FOLDER] [--dry-run]

Finished cells are never run again, so that a method or a seed can be added to the grid at the cost of its own cells.
Interrupted training resumes from its last checkpoint. If a cell in the folder was made with other options than those of
the grid, the script refuses to run. Several processes can work on a study together, also on several machines if these
share a file system with locks. `table.py DIR` makes tables and figures of the finished cells, at any time.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from itertools import islice, takewhile
from pathlib import Path
from types import MappingProxyType
from typing import IO

from study import PRECISIONS, Cell, Grid, copy_of, diverged, read_about, read_scores, user_dir

from hgkd_fairseq import files
from hgkd_fairseq.arguments import number
from hgkd_fairseq.errors import UserError, guarded, in_one_line, printable

SCRIPTS = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
POLL_S = 1.0


def cpu_memory() -> dict[str, str]:
    """Return the environment variables for training on the CPU, those of cpu_memory.env."""
    lines = (SCRIPTS / "cpu_memory.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def on_gpu() -> bool:
    import torch  # imported here because it takes a second, which --dry-run can save

    return torch.cuda.is_available()


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), "", printable(text), flush=True)  # may contain text from a log


# ---------------------------------------------------------------------------------------------------------------- data


def prepare(grid: Grid, folder: Path, source: str | None) -> None:
    """Make the study's text/ and data-bin/ and copies of its teachers, if they do not exist."""
    made = folder / "data.json"
    lock = claim(folder, wait=True)  # another run.py may be making the data
    assert lock is not None
    with lock:
        make_data(grid, folder, source, made, lock)
        check_teachers(grid, folder)  # again: another run.py may have copied others since
        copy_teachers(grid, folder)


def make_data(grid: Grid, folder: Path, source: str | None, made: Path, lock: IO) -> None:
    if made.exists():
        before = files.read_json(made, {}, f"file of run.py; remove it, and {folder / 'data-bin'} is made anew")
        if before != grid.data:
            raise UserError(f"{folder} was made with other data ({before}, not {grid.data}); choose another --dir")
        return
    text = folder / "text"
    if "corpus" in grid.data:
        whole = folder / "corpus"
        given = ["--from", source] if source else []
        script("get_data.sh", lock, grid.data["corpus"], whole, *given)
    else:
        whole = Path(grid.data["text"])
    text.mkdir(exist_ok=True)
    held_out = ["valid1"] if (whole / "valid1.de").exists() else []
    for split in ("train", "valid", "test", *held_out):
        for language in ("de", "en"):
            lines = files.read_lines(whole / f"{split}.{language}", "[data] text names its folder")
            first = islice(lines, grid.data.get("pairs") if split == "train" else None)
            files.write_text(text / f"{split}.{language}", "".join(f"{line}\n" for line in first))
    shutil.rmtree(folder / "data-bin", ignore_errors=True)
    pieces = ["--like", grid.data["like"]] if "like" in grid.data else ["--vocab", grid.data["vocabulary"]]
    script("prepare_data.sh", lock, text, folder / "data-bin", *pieces)
    files.write_json(made, grid.data)


def check_teachers(grid: Grid, folder: Path) -> None:
    """Check that the grid's teacher checkpoints exist, and are those that the study has copied before.

    Raises:
        UserError: a checkpoint is missing, or differs from the study's copy.
    """
    for name, path in grid.taken().items():
        copy = folder / copy_of(name)
        if not copy.exists() and not Path(path).is_file():
            raise UserError(f"{grid.file}: [teachers.{name}] path {path}: no such file; name a teacher's checkpoint")
        if copy.exists() and Path(path).is_file() and files.sha256(copy) != files.sha256(path):
            raise UserError(f"{folder} was begun with another teacher than {path} ({copy}); choose another --dir")


def copy_teachers(grid: Grid, folder: Path) -> None:
    """Copy the grid's teacher checkpoints to the study, so that it can be moved and its teachers cannot change."""
    for name, path in grid.taken().items():
        copy = folder / copy_of(name)
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            files.copy(path, copy)


def script(name: str, lock: IO, *arguments) -> None:
    """Run a script of scripts/. It inherits the lock, and so holds it even if this process is killed.

    Raises:
        UserError: the script fails.
    """
    command = ["bash", str(SCRIPTS / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable}
    if subprocess.run(command, env=environment, pass_fds=[lock.fileno()], check=False).returncode:
        raise UserError(f"{name} did not finish; it has said why")


# --------------------------------------------------------------------------------------------------------------- cells


def check(cells: list[Cell], folder: Path) -> None:
    """Check that existing cells were made with the options of the grid, and by the teachers that are there now.

    Raises:
        UserError: a cell was made with other options or by another teacher, or its cell.json is damaged.
    """
    known: dict[str, str] = {}
    for cell in cells:
        if not (folder / cell.folder / "cell.json").exists():
            continue
        about = read_about(folder / cell.folder, commands=[str], **{"teachers?": {str: str}})
        before = about["commands"]
        known |= hashes_of_teachers(cell, folder, known)
        for path, digest in about.get("teachers", {}).items():
            if known.get(path, digest) != digest:
                raise UserError(
                    f"{folder / cell.folder} was made by another {path} than the one that is there; "
                    "choose another --dir, or remove that folder to run it again"
                )
        try:
            now, old = (decisive(shlex.split(" ".join(commands))) for commands in (cell.commands, before))
        except ValueError as error:  # an unclosed quotation
            raise UserError(
                f"{folder / cell.folder / 'cell.json'} holds commands that are none ({error}); remove that folder to "
                "run the cell again"
            ) from None
        if now != old:
            changed = " ".join(option for option in old if option not in now) or "other options"
            raise UserError(
                f"{folder / cell.folder} was made with {changed} and the grid says otherwise now; "
                "choose another --dir, or remove that folder to run it again"
            )


def hashes_of_teachers(cell: Cell, folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return the SHA-256 of the teachers' checkpoints that a cell's training names and that exist, by their paths,
    except for those that are known."""
    paths = cell.train[cell.train.index("--teacher-path") + 1].split(":") if "--teacher-path" in cell.train else []
    return {path: files.sha256(folder / path) for path in paths if path not in known and (folder / path).exists()}


def decisive(words: list[str]) -> list[str]:
    """Return those words of a cell's commands on which its scores depend: the options of training and search."""
    training = takewhile(lambda word: word != "--user-dir", words)
    return [*training, *(word for word in words if word.startswith("--generate="))]


def finished(cell: Cell, folder: Path) -> bool:
    return is_finished(folder / cell.folder)


def is_finished(folder: Path) -> bool:
    """Return whether a cell has valid scores. It is scored again if they are truncated or of an earlier version."""
    try:
        read_scores(folder)
    except UserError:
        return False
    return True


def claim(folder: Path, wait: bool = False) -> IO | None:
    """Lock a cell's folder and return the lock file. If it is locked already, wait or, unless `wait`, return None.

    Child processes inherit the lock, so that a training that outlives this script holds it until it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = files.appending(folder / "lock")  # closing it releases the lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        lock.close()
        return None
    return lock


def trained(checkpoint: Path, updates: int) -> bool:
    """Return whether a checkpoint is that of a finished training. Started again, fairseq would make one more update.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    if not checkpoint.exists():
        return False
    from hgkd_fairseq.plugin import checkpoints

    try:
        return checkpoints.read(checkpoint, model=False).updates >= updates
    except UserError as error:
        raise UserError(f"{error}, or remove it to train again") from None


class Runner:
    """Runs the cells of a study in `jobs` threads, each of which runs one cell at a time."""

    def __init__(self, cells: list[Cell], folder: Path, jobs: int):
        self.cells, self.folder, self.jobs = cells, folder, jobs
        self.choosing = threading.Lock()
        self.stopped = threading.Event()
        self.failed: set[str] = set()
        self.children: set[subprocess.Popen] = set()
        self.device = [] if on_gpu() else ["--cpu"]
        self.environment = os.environ | (cpu_memory() if self.device else {})
        if jobs > 1:  # several multi-threaded processes compete for cores and take 5 to 10 times as long
            self.environment["OMP_NUM_THREADS"] = "1"

    def run(self) -> bool:
        """Run all cells and return whether all of them are finished."""
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
        check(self.cells, self.folder)  # another run.py may have made some, by a grid that was changed
        return all(finished(cell, self.folder) for cell in self.cells)

    def work(self) -> None:
        while not self.stopped.is_set():
            cell, lock = self.next()
            if cell is None:
                return
            if lock is None:
                time.sleep(POLL_S)
                continue
            with lock:
                try:
                    self.make(cell, lock)
                except Exception as error:  # an error of one cell must not stop the others
                    self.fail(cell, in_one_line(error))

    def fail(self, cell: Cell, why: object) -> None:
        say(f"{cell.folder}: {why}")
        self.failed.add(cell.folder)

    def next(self) -> tuple[Cell | None, IO | None]:
        """Choose a cell to work on.

        Returns: the cell and its lock; a cell and None if all cells that are left have to wait for others; None and
            None if no cell is left.
        """
        with self.choosing:
            waiting = None
            for cell in self.cells:
                if cell.folder in self.failed or finished(cell, self.folder):
                    continue
                without = [teacher for teacher in cell.teachers if teacher in self.failed]
                if without:
                    self.fail(cell, f"cannot be trained without {without[0]}")
                    continue
                if not all(is_finished(self.folder / teacher) for teacher in cell.teachers):
                    waiting = waiting or cell
                    continue
                try:
                    lock = claim(self.folder / cell.folder)
                except OSError as error:
                    self.fail(cell, in_one_line(error))
                    continue
                if lock is None:
                    waiting = waiting or cell
                    continue
                if not finished(cell, self.folder):
                    return cell, lock
                lock.close()  # another process has finished it meanwhile
            return waiting, None

    def make(self, cell: Cell, lock: IO) -> None:
        folder = self.folder / cell.folder
        check([cell], self.folder)  # another run.py may have begun it since
        about = {**cell.description(), "teachers": hashes_of_teachers(cell, self.folder)}
        files.write_json(folder / "cell.json", about)
        self.distil(cell)
        if self.stopped.is_set():
            return
        place = f"cell {self.cells.index(cell) + 1} of {len(self.cells)}"
        if not trained(folder / "checkpoint_last.pt", cell.updates):
            say(f"{cell.folder}: training ({place}; log: {folder / 'train.log'})")
            train = [BIN / "fairseq-train", *cell.train, "--user-dir", user_dir(), *self.device]
            if not self.call(cell, train, "train.log", lock):
                return
        since = diverged(folder)
        if since is not None:
            raise UserError(f"diverged: from update {since} on its NLL on validation is no number; train it anew")
        score = [BIN / "hgkd", "score", *cell.score, *self.device, "--debug"]
        if self.call(cell, score, "score.log", lock):
            found = read_scores(folder)
            say(
                f"{cell.folder}: BLEU {found['bleu']:.1f}, ECE {100 * found['ece']:.2f} %, "
                f"validation NLL {found['valid_nll_best']:.3f} bits, {found['minutes']:.1f} minutes"
            )

    def distil(self, cell: Cell) -> None:
        """Make the training data of a cell that is trained on its teacher's translations, unless they exist. All cells
        with the same teacher share the translations.

        Raises:
            UserError: a command fails, or the data were made with other options or another teacher.
        """
        if not cell.distil or self.stopped.is_set():
            return
        data = self.folder / cell.train[0]
        folder, settings = data.with_name("translations"), data.with_name(f"{data.name}.json")
        path = cell.translate[cell.translate.index("--teacher-path") + 1]
        teachers = [files.sha256(self.folder / one) for one in path.split(":")]
        wanted = {"translate": cell.translate, "distil": cell.distil, "teachers": teachers}

        def made() -> bool:
            if not data.exists():  # the folder is created atomically
                return False
            if settings.exists() and files.read_json(settings, {}) != wanted:
                raise UserError(
                    f"{data} was made with other options or another teacher; remove it and {folder} to make it again"
                )
            return True

        if made():
            return
        log = folder.with_name("translate.log")
        say(f"{cell.train[0]}: translating the training set (log: {log})")
        while (lock := claim(folder.with_name("distil"))) is None:  # another thread or process is making them
            if self.stopped.wait(POLL_S):
                return
        with lock, files.appending(log) as output:
            if made():
                return
            files.write_json(settings, wanted)
            for words in ([*cell.translate, *self.device], cell.distil):
                if self.stopped.is_set():
                    return
                status = self.status([BIN / "hgkd", *words], output, lock)
                if status and not self.stopped.is_set():
                    told = log.read_text(errors="replace").splitlines()
                    raise UserError(f"hgkd {words[0]} ended with status {status}: {told[-1] if told else ''}")

    def call(self, cell: Cell, command: list, log: str, lock: IO) -> bool:
        """Run a command of a cell, which inherits the cell's lock. Return whether it succeeded; False also if the run
        is interrupted. A failure is reported."""
        if self.stopped.is_set():
            return False
        file = self.folder / cell.folder / log
        with files.appending(file) as output:
            status = self.status(command, output, lock)
        if status and not self.stopped.is_set():
            lines = file.read_text(errors="replace").splitlines()
            self.fail(cell, f"{Path(command[0]).name} ended with status {status}: {lines[-1] if lines else ''}")
        return status == 0

    def status(self, command: list, output: IO, lock: IO) -> int:
        """Run a command, which inherits the lock, and return its exit status."""
        child = subprocess.Popen(
            [str(part) for part in command], cwd=self.folder, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, pass_fds=[lock.fileno()],
        )  # fmt: skip
        self.children.add(child)
        if self.stopped.is_set():  # an interrupt that came before the child was known
            child.terminate()
        status = child.wait()
        self.children.discard(child)
        return status


def show(cells: list[Cell], folder: Path) -> None:
    for cell in cells:
        state = "finished" if finished(cell, folder) else "to do"
        print(f"# {cell.folder}: {state}", *cell.making, *cell.commands, "", sep="\n")
    print(f"# {len(cells)} cells, {sum(finished(cell, folder) for cell in cells)} finished")


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("grid", type=Path, help="a .toml file such as scripts/study/multi30k.toml")
    parser.add_argument("--dir", type=Path, help="the study's folder (default: runs/study/NAME-OF-THE-GRID)")
    parser.add_argument(
        "--jobs", type=number(1, 1000), default=1, metavar="N", help="cells at a time, of one thread (default: 1)"
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of all trainings, in place of the grid's; fp16 needs a GPU"
    )
    parser.add_argument("--from", dest="source", metavar="FOLDER", help="a local copy of the data, see get_data.sh")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and their commands")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, interrupt)
    return guarded("run.py: error", lambda: work(args), args.debug)


def work(args: argparse.Namespace) -> int:
    grid = Grid(args.grid, args.precision)
    cells = grid.cells()
    folder = (args.dir or SCRIPTS.parent / "runs" / "study" / args.grid.stem).resolve()
    check(cells, folder)
    if args.dry_run:
        show(cells, folder)
        return 0
    if grid.table["training"]["precision"] == "fp16" and not on_gpu():
        raise UserError(f"{args.grid}: precision fp16 needs a GPU; give --precision fp32 or bf16")
    check_teachers(grid, folder)
    folder.mkdir(parents=True, exist_ok=True)
    prepare(grid, folder, args.source)
    return 0 if Runner(cells, folder, args.jobs).run() else 1


if __name__ == "__main__":
    sys.exit(main())
