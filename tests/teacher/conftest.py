"""Fixtures of the teacher's tests: a store of each kind, the live teacher, and a student distilled from a store."""

import shutil
from pathlib import Path

import command_line as cl
import pytest
from making_stores import FROM_A_STORE, TranslationWithTeacherTask, make_task, of_kind, write


@pytest.fixture(scope="session")
def stores(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return fp32 stores of the teacher by kind, and "bf16", hidden states in bf16; with 200 sentences per shard."""
    folder = tmp_path_factory.mktemp("stores")
    found = {kind: folder / kind for kind in ("hidden", "sampled", "topk", "gold")}
    for kind, one in found.items():
        assert write(data, teacher, one, *of_kind(kind)) == 0
    assert write(data, teacher, folder / "bf16") == 0
    return found | {"bf16": folder / "bf16"}


@pytest.fixture(scope="session")
def live(data: Path, teacher: cl.Run) -> TranslationWithTeacherTask:
    task = make_task(data, teacher_path=str(teacher.path()))
    task.load_teacher()
    return task


@pytest.fixture(scope="session")
def distilled(data: Path, stores: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> cl.Run:
    """Return a run like `student`, but distilled from a store, which is deleted after the training."""
    folder = tmp_path_factory.mktemp("distilled")
    gone = shutil.copytree(stores["hidden"], folder / "store_then_deleted")
    options = (*FROM_A_STORE, "--teacher-store", gone, "--max-epoch", 6, "--disable-validation", *cl.KEEP_LAST)
    run = cl.train(data, folder / "run", *options)
    shutil.rmtree(gone)
    return run
