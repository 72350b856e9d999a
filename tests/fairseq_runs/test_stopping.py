"""A training that is told to stop saves, ends and goes on as if nothing had been; a folder has one training."""

import os
import re
import signal
import subprocess
from pathlib import Path

import command_line as cl
import pytest

STATUS = 75  # of a run that was told to stop
BEST_OF_THREE = ("--max-tokens", 400, "--max-update", 26, "--dropout", 0.2, "--save-interval-updates", 8)
METHOD = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", "--gate", "progressive")
# A --user-dir whose process sends itself signals: TOLD holds the worker, "train" or "valid", the number of the update
# or of the batch, and the signals.
USER_DIR = '''
import os
import signal
import time

import torch
import hgkd_fairseq.tasks
from hgkd_fairseq.tasks.with_teacher import WithTeacher

worker, kind, number, *signals = os.environ["TOLD"].split()


def telling(step):
    made = []

    def told(*args, **kwargs):
        made.append(None)
        at = args[5] + 1 if len(args) > 5 else kwargs.get("update_num", len(made) - 1) + 1
        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        if at == int(number) and rank == int(worker):
            for name in signals:
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(1.2 * (len(signals) > 1))
        return step(*args, **kwargs)

    return told


setattr(WithTeacher, f"{kind}_step", telling(getattr(WithTeacher, f"{kind}_step")))
'''


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A fairseq-train that tells itself to stop: (data, folder, TOLD, options) to its result."""
    folder = tmp_path / "tells_itself"
    folder.mkdir()
    (folder / "__init__.py").write_text(USER_DIR)

    def train(data: Path, save_dir: Path, signals: str, *options) -> cl.Result:
        monkeypatch.setenv("TOLD", signals)
        arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", save_dir, *options)
        return cl.fairseq("train", *arguments, "--user-dir", folder)

    return train


def updates(path: Path) -> int:
    return cl.load(path)["optimizer_history"][-1]["num_updates"]


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.pt"))


def test_stopped_four_times(data: Path, tmp_path: Path, told):
    """In the middle of an epoch, at an update that is validated, in the validation at an epoch's end, and in that
    validation again: bit for bit the run that was never stopped, with its checkpoints and its validations."""
    options = (*METHOD, *BEST_OF_THREE)
    whole = cl.train(data, tmp_path / "whole", *cl.USER_DIR, *options)
    print(whole.result.output)
    folder = tmp_path / "stopped"
    first = told(data, folder, "0 train 5 SIGUSR1", *options)
    print(first.output)
    assert first.code == STATUS, first.end()
