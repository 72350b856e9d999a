"""Shared fixtures: a small binarised corpus and models trained on it, once for all workers of pytest-xdist."""

import fcntl
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout under test, installed or not

import command_line as cl  # noqa: E402
import torch  # noqa: E402

from hgkd_fairseq import files  # noqa: E402

TRAINED = {"plain_runs", "trials"}  # fixtures that train models; a test that uses one is marked slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TRAINED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


Once = Callable[..., list[cl.Run]]  # the fixture `once`


@pytest.fixture(scope="session")
def once(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Once:
    """Return a function that makes folders with a command's result each, in one of the workers of pytest-xdist.

    once(names, make) calls make(*folders) with a new folder of each name, which returns the `cl.Run` of each; the
    other workers wait and get the same.
    """
    place = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # a worker's folder is inside of that of the session
        place = place.parent

    def make_once(names: Sequence[str], make: Callable[..., list[cl.Run]]) -> list[cl.Run]:
        record = place / f"{names[0]}.json"
        with open(place / f"{names[0]}.lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                folders = [Path(tempfile.mkdtemp(prefix=f"{name}-", dir=place)) for name in names]
                made = [(str(run.folder), run.result.code, run.result.output) for run in make(*folders)]
                files.write_json(record, made)
        return [cl.Run(Path(folder), cl.Result(*result)) for folder, *result in json.loads(record.read_text())]

    return make_once


@pytest.fixture(scope="session")
def data(once: Once) -> Path:
    """Return a folder written by fairseq-preprocess, with 600 training, 64 validation and 64 test pairs.

    The sizes are multiples of 8: fairseq drops a last batch that its --required-batch-size-multiple does not divide.
    """

    def make(folder: Path) -> list[cl.Run]:
        cl.write_corpus(folder, {"train": 600, "valid": 64, "test": 64})
        prefixes = [f"--{name}pref={folder / name}" for name in ("train", "valid", "test")]
        languages = ("--source-lang", "de", "--target-lang", "en", "--joined-dictionary")
        result = cl.fairseq("preprocess", *prefixes, *languages, "--destdir", folder / "bin")
        assert result.code == 0, result.output
        return [cl.Run(folder, result)]

    return once(["corpus"], make)[0].folder / "bin"


@pytest.fixture(scope="session")
def plain_runs(data: Path, once: Once) -> list[cl.Run]:
    """Train `plain` and `teacher` at the same time; neither depends on the other."""
    smoothing = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1)
    steps = ("--max-tokens", 400, "--max-epoch", 30, "--validate-interval", 5)

    def make(short: Path, long: Path) -> list[cl.Run]:
        return cl.together(
            lambda: cl.train(data, short, *smoothing, "--max-epoch", 3),
            lambda: cl.train(data, long, "--criterion", "cross_entropy", *steps, *cl.BEST_BLEU, *cl.KEEP_LAST),
        )

    return once(["plain", "teacher"], make)


@pytest.fixture(scope="session")
def plain(plain_runs: list[cl.Run]) -> cl.Run:
    """Return a run of plain fairseq (no --user-dir) of three epochs, whose best checkpoint is chosen by the loss."""
    return plain_runs[0]


@pytest.fixture(scope="session")
def teacher(plain_runs: list[cl.Run]) -> cl.Run:
    """Return a run of plain fairseq (no --user-dir), long enough to translate, with the best checkpoint by BLEU."""
    return plain_runs[1]


@pytest.fixture(scope="session")
def student(data: Path, teacher: cl.Run, once: Once) -> cl.Run:
    """Return a distilled run of six epochs, with the best checkpoint by BLEU.

    It is started with a relative --user-dir from a folder outside the checkout, and its teacher's file is deleted after
    the training.
    """

    def make(folder: Path) -> list[cl.Run]:
        gone = folder / "teacher_then_deleted.pt"
        shutil.copy(teacher.path("checkpoint_best.pt"), gone)
        relative = ("--user-dir", os.path.relpath(ROOT / "hgkd_fairseq", folder))
        distil = cl.distil(gone, *relative, "--report-accuracy", "--max-epoch", 6)
        run = cl.train(data, folder, *distil, *cl.BEST_BLEU, *cl.KEEP_LAST, cwd=folder)
        gone.unlink()
        return [run]

    return once(["student"], make)[0]
