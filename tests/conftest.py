"""Shared fixtures: a small binarised corpus and models trained on it once per session."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # the checkout under test, installed or not

import command_line as cl  # noqa: E402
import torch  # noqa: E402

TRAINED = {"plain_runs", "trials"}  # fixtures that train models; a test that uses one is marked slow


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if TRAINED & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder written by fairseq-preprocess, with 600 training, 64 validation and 64 test pairs.

    The sizes are multiples of 8: fairseq drops a last batch that its --required-batch-size-multiple does not divide.
    """
    folder = tmp_path_factory.mktemp("corpus")
    cl.write_corpus(folder, {"train": 600, "valid": 64, "test": 64})
    prefixes = [f"--{name}pref={folder / name}" for name in ("train", "valid", "test")]
    languages = ("--source-lang", "de", "--target-lang", "en", "--joined-dictionary")
    result = cl.fairseq("preprocess", *prefixes, *languages, "--destdir", folder / "bin")
    assert result.code == 0, result.output
    return folder / "bin"


@pytest.fixture(scope="session")
def plain_runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[cl.Run]:
    """Train `plain` and `teacher` at the same time; neither depends on the other."""
    short, long = (tmp_path_factory.mktemp(name) for name in ("plain", "teacher"))
    smoothing = ("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1)
    steps = ("--max-tokens", 400, "--max-epoch", 30, "--validate-interval", 5)
    return cl.together(
        lambda: cl.train(data, short, *smoothing, "--max-epoch", 3),
        lambda: cl.train(data, long, "--criterion", "cross_entropy", *steps, *cl.BEST_BLEU, *cl.KEEP_LAST),
    )


@pytest.fixture(scope="session")
def plain(plain_runs: list[cl.Run]) -> cl.Run:
    """Return a run of plain fairseq (no --user-dir) of three epochs, whose best checkpoint is chosen by the loss."""
    return plain_runs[0]


@pytest.fixture(scope="session")
def teacher(plain_runs: list[cl.Run]) -> cl.Run:
    """Return a run of plain fairseq (no --user-dir), long enough to translate, with the best checkpoint by BLEU."""
    return plain_runs[1]


@pytest.fixture(scope="session")
def student(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> cl.Run:
    """Return a distilled run of six epochs, with the best checkpoint by BLEU.

    It is started with a relative --user-dir from a folder outside the checkout, and its teacher's file is deleted after
    the training.
    """
    folder = tmp_path_factory.mktemp("student")
    gone = folder / "teacher_then_deleted.pt"
    shutil.copy(teacher.path("checkpoint_best.pt"), gone)
    relative = ("--user-dir", os.path.relpath(ROOT / "hgkd_fairseq", folder))
    run = cl.train(
        data,
        folder,
        *cl.distil(gone, *relative, "--report-accuracy", "--max-epoch", 6),
        *cl.BEST_BLEU,
        *cl.KEEP_LAST,
        cwd=folder,
    )
    gone.unlink()
    return run
