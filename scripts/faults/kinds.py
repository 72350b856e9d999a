"""Commands for kills.py to kill: trainings with each stateful method, and commands that write many files."""

from __future__ import annotations

import functools
import inspect
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import toys

from hgkd_fairseq import cli
from hgkd_fairseq.gates import GATES
from hgkd_fairseq.sentence_weights import gate as _  # noqa: F401  registers its own
from hgkd_fairseq.teacher import SOURCES

SIZES = {"train": 200, "valid": 32, "test": 32}
UPDATES = ("--max-update", "12", "--save-interval-updates", "2")
OURS = (*toys.USER_DIR, "--task", "translation_with_teacher", "--criterion", "hard_gate_kd")
PAIRS = (
    *("--task", "translation_multi_simple_epoch_with_teacher", "--lang-pairs", "de-en,fr-en", "--langs", "de,fr,en"),
    *("--encoder-langtok", "tgt", "--decoder-langtok", "--num-workers", "0"),
)
EVEN = ("--gate", "always", "--kd-weight", "0.3", "--teacher-temperature", "1")
# Options that a gate or teacher source requires, or that make its state change within such a short run.
NEEDED: dict[str, tuple[str, ...]] = {
    "instance": ("--held-out", "0.2", "--refresh-interval", "1"),
    "selective-global": ("--gate-queue", "150"),
    "pair": PAIRS,
    "previous-epoch": ("--gate", "progressive"),
    "ema": ("--gate", "always", "--kd-weight", "0.3", "--store-ema", "--ema-decay", "0.9"),
    "unigram": EVEN,
    "loras": EVEN,
}
WORLD = (
    *("--distributed-world-size", "2", "--distributed-no-spawn", "--ddp-backend", "legacy_ddp"),
    *("--distributed-backend", "gloo"),
)
FROM_FILES = ("checkpoint", "store")  # teacher sources that only read files and have no state
DRAWN = ("random", "beta")  # gates that draw random numbers in each step


@dataclass
class Process:
    """A process that `toys.begin` has started.

    Attributes:
        number: process id.
        log: file with its output.
        found: exit status, negative for a signal; None until it is known.
    """

    number: int
    log: Path
    found: int | None = None

    def status(self) -> int | None:
        if self.found is None:
            self.found = toys.ended(self.number)
        return self.found

    def wait(self) -> int:
        if self.found is None:
            self.found = toys.wait(self.number)
        return self.found

    def kill(self) -> None:
        toys.kill(self.number)
        self.found = self.wait()

    def end(self) -> str:
        """Return the last two lines of the output, at most 400 characters."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return " / ".join(lines[-2:])[-400:]


@functools.cache
def folder() -> Path:
    """Create the temporary folder for files that several kinds share, on the first call; return it."""
    return Path(tempfile.mkdtemp(prefix="kills-shared-"))


def remove() -> None:
    if folder.cache_info().currsize:
        shutil.rmtree(folder())


@functools.cache
def data(pairs: str) -> str:
    return str(toys.write_data(folder() / pairs.replace(",", "+"), SIZES, pairs.split(",")))


@functools.cache
def teacher(pairs: str) -> str:
    """Train a small teacher on the first call for these language pairs; return the path of its checkpoint."""
    place = folder() / f"teacher-{pairs.replace(',', '+')}"
    place.mkdir()
    task = () if pairs == "de-en" else (PAIRS[0], "translation_multi_simple_epoch", *PAIRS[2:])
    words = (data(pairs), *toys.SIZE, *toys.STEPS, *task, "--max-epoch", "12", "--disable-validation")
    once(toys.training([*words, "--no-epoch-checkpoints", "--dropout", "0"]), place)
    return str(place / "run" / "checkpoint_last.pt")


def once(run: Callable[[], int], place: Path) -> None:
    process = Process(toys.begin(run, place, place / "begin.log"), place / "begin.log")
    assert process.wait() == 0, process.end()


@dataclass
class Kind:
    """A command to kill.

    Attributes:
        name: name on the command line of kills.py.
        command: function that prepares the command and returns it; the command works in the current folder.
        begin: function that creates the folder of a run, with the files that the command needs.
        within: fraction of the time of an unbroken run within which each start is killed; small for long commands, so
            that one run is killed often.
    """

    name: str
    command: Callable[[], Callable[[], int]]
    begin: Callable[[Path], None] = field(default=lambda place: place.mkdir())
    within: float = 1.0

    def prepare(self) -> None:
        self.run = self.command()

    def make(self, place: Path) -> None:
        self.begin(place)

    def start(self, place: Path) -> Process:
        log = place / "killed.log"
        return Process(toys.begin(self.run, place, log), log)


# Trainings


def training(*options: str) -> Callable[[], Callable[[], int]]:
    """Return a function that prepares a training; the option value TEACHER is replaced by a teacher's checkpoint."""
    pairs = "de-en,fr-en" if "--lang-pairs" in options else "de-en"

    def command() -> Callable[[], int]:
        given = [teacher(pairs) if word == "TEACHER" else word for word in options]
        return toys.training([data(pairs), *toys.SIZE, *toys.STEPS, *UPDATES, *given])

    return command


def distilling(*options: str) -> Callable[[], Callable[[], int]]:
    return training(*OURS, "--teacher-path", "TEACHER", *options)


def two_workers(*options: str) -> Callable[[], Callable[[], int]]:
    """Return a function that prepares a training with two workers (gloo), both in the process group that is killed."""

    def command() -> Callable[[], int]:
        words = [data("de-en"), *toys.SIZE, *toys.STEPS, *UPDATES, *OURS, "--teacher-path", teacher("de-en"), *options]
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"tcp://127.0.0.1:{free.getsockname()[1]}"

        def run() -> int:
            second = os.fork()
            own = ("--distributed-init-method", address, "--distributed-rank", "0" if second else "1")
            status = toys.training([*words, *WORLD, *own])()
            if second:
                status = status or os.waitstatus_to_exitcode(os.waitpid(second, 0)[1])
            return status

        return run

    return command


def trainings() -> dict[str, Callable[[], Callable[[], int]]]:
    """Return the trainings by the name of their kind."""
    found = {
        "teacher": training(*toys.USER_DIR, "--criterion", "cross_entropy"),
        "none": training(*OURS, "--gate", "none"),
        "token": distilling(),
    }
    for name, gate in GATES.items():
        if inspect.isclass(gate.weights) or gate.timed or name in DRAWN:
            found[name] = distilling("--gate", name, *NEEDED.get(name, ()))
    for name in SOURCES:
        if name not in FROM_FILES:
            found[name] = training(*OURS, "--teacher-source", name, *NEEDED.get(name, ()))
    own = ("--on-policy-share", "0.5", "--on-policy-sampling", "--on-policy-speculative", "3")
    found["on-policy"] = distilling(*own, "--divergence", "skew-kl")
    found["temperature"] = distilling("--teacher-temperature", "auto", "--teacher-temperature-start", "3")
    found["two-workers"] = two_workers("--gate", "selective-global", *NEEDED["selective-global"])
    found["update-freq"] = distilling("--update-freq", "1,2,3", "--save-interval-updates", "1")
    found["fp16"] = distilling("--memory-efficient-fp16", "--fp16-init-scale", "4")
    found["patience"] = training(*OURS, "--gate", "none", "--lr", "1e-30", "--patience", "3")
    found["keep-few"] = distilling("--keep-interval-updates", "2", "--keep-last-epochs", "1", "--no-epoch-checkpoints")
    return found


# Commands of hgkd


def hgkd(*words: str) -> Callable[[], Callable[[], int]]:
    """Return a function that prepares an `hgkd` command; the words DATA and TEACHER are replaced by the data and a
    teacher's checkpoint."""

    def command() -> Callable[[], int]:
        given = {"DATA": data("de-en"), "TEACHER": teacher("de-en")}
        found = [given.get(word, word) for word in words]
        return lambda: cli.main(found)

    return command


@functools.cache
def trained() -> Path:
    """Train a small model on the first call; return its folder, with checkpoints and a log, for commands that score."""
    place = folder() / "trained"
    place.mkdir()
    once(training(*OURS, "--gate", "none", "--max-update", "40", "--save-interval-updates", "0")(), place)
    shutil.copy(place / "begin.log", place / "run" / "train.log")
    return place / "run"


@functools.cache
def translated() -> Path:
    place = folder() / "translated"
    place.mkdir()
    once(TRANSLATE(), place)
    return place / "set"


def with_run(place: Path) -> None:
    place.mkdir()
    shutil.copytree(trained(), place / "run")


def with_translations(place: Path) -> None:
    place.mkdir()
    shutil.copytree(translated(), place / "set")


def distilled() -> Callable[[], int]:
    """Prepare `hgkd distil-data`, which is skipped if its output exists, since it refuses an existing folder.

    The output exists if the command was killed after it had finished writing.
    """
    make = hgkd("distil-data", "set", "DATA", "--output", "bin")()
    return lambda: 0 if Path("bin").exists() else make()


def study(place: Path) -> None:
    toys.write_text(place, {"train": 300, "valid": 32, "test": 32})
    (place / "grid.toml").write_text(GRID)


def run_study() -> Callable[[], int]:
    words = [sys.executable, str(toys.ROOT / "scripts/study/run.py"), "grid.toml", "--dir", "study"]
    return lambda: os.execve(words[0], words, {**os.environ, "PYTHONPATH": str(toys.ROOT)})


def quickstart() -> Callable[[], int]:
    """Prepare the smallest run of quickstart.sh; HGKD_DATA must name the folder with the data."""
    words = ["bash", str(toys.ROOT / "scripts/quickstart.sh"), "--smoke", "--dir", "run"]

    def run() -> int:
        status = subprocess.run(words, check=False).returncode
        for name in ("report.html", "table.md"):  # they contain durations of the trainings
            Path("run", name).unlink(missing_ok=True)
        return status

    return run


GRID = """
[data]
text = "."
pairs = 250
vocabulary = 36
[training]
updates = 40
precision = "fp32"
options = '''--arch transformer_iwslt_de_en --share-all-embeddings --optimizer adam --lr 0.005 --max-tokens 600
    --encoder-layers 1 --decoder-layers 1 --encoder-attention-heads 2 --decoder-attention-heads 2'''
[sizes.small]
options = "--encoder-embed-dim 16 --decoder-embed-dim 16 --encoder-ffn-embed-dim 32 --decoder-ffn-embed-dim 32"
[settings.same]
teacher = "small"
student = "small"
[teacher]
method = "base"
seed = 0
[generation]
options = "--beam 2 --max-len-b 20"
[[cells]]
settings = ["same"]
methods = ["hkd-t"]
seeds = [1]
"""
SEARCH = ("--beam", "4", "--max-len-b", "12", "--cpu")
TRANSLATE = hgkd(
    *("translate", "DATA", "--teacher-path", "TEACHER", "--output", "set", "--nbest", "2", "--shard-size", "20"),
    *SEARCH,
)
STORE = ("store", "DATA", "--teacher-path", "TEACHER", "--output", "store", "--cpu", "--shard-size", "20")
SCORE = ("score", "DATA", "run", "--cpu", "--generate=--beam 2 --max-len-b 20", "--own-lenpen")
KINDS = {
    kind.name: kind
    for kind in [
        *(Kind(name, command) for name, command in trainings().items()),
        Kind("translate", TRANSLATE),
        Kind("distil-data", distilled, with_translations),
        Kind("store", hgkd(*STORE)),
        Kind("store-sampled", hgkd(*STORE, "--kind", "sampled")),
        Kind("score", hgkd(*SCORE, "--checkpoint", "best", "--checkpoint", "best-bleu"), with_run),
        Kind("study", run_study, study, 0.4),
        Kind("quickstart", quickstart, within=0.2),
    ]
}
