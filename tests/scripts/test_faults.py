"""A bounded part of scripts/faults: trainings that are killed, a disk that fills, and what their comparison finds."""

import os
import subprocess
import sys
import time
from pathlib import Path

import command_line as cl
import pytest
import torch

FAULTS = cl.ROOT / "scripts" / "faults"
sys.path.insert(0, str(FAULTS))

import kills  # noqa: E402


def program(name: str, *words) -> subprocess.CompletedProcess:
    command = [sys.executable, str(FAULTS / name), *map(str, words)]
    return subprocess.run(
        command, env=cl.environment(), capture_output=True, text=True, timeout=cl.TIMEOUT_S, check=False
    )


def test_a_training_that_is_killed():
    done = program("kills.py", "teacher", "--kills", 6)
    assert done.stdout.startswith("ok    teacher: 6 kills, "), done.stdout + done.stderr
    assert "all equal" in done.stdout
    assert done.returncode == 0


def test_a_run_that_comes_out_otherwise_is_found(tmp_path: Path):
    def command() -> int:
        time.sleep(0.3)
        return 0 if Path("made").write_bytes(os.urandom(8)) else 1

    told, well = kills.run(kills.kinds.Kind("odd", lambda: command), 1, 1, tmp_path)
    assert not well
    assert told.startswith("FAULT odd: 1 kills, "), told
    assert "DIFFERENT: made is " in told


def test_a_disk_that_fills():
    done = program("full_disk.py", "export")
    if done.returncode == 2:  # neither root nor namespaces of users
        assert "full_disk.py: no disk can be made: " in done.stderr
        return
    assert done.stdout.startswith("ok    export: "), done.stdout + done.stderr
    assert "old files stay, status 1 and one message" in done.stdout
    assert done.returncode == 0


def written(folder: Path, **changed) -> Path:
    run = folder / "run"
    run.mkdir(parents=True)
    state = {
        "model": {"a": torch.tensor([1.0, torch.nan])},
        "extra_state": {"best": 2.0, "previous_training_time": 3.0},
    }
    history = [{"num_updates": 2}] * changed.pop("starts", 1)
    torch.save({**state, "optimizer_history": history, **changed}, run / "checkpoint_last.pt")
    (run / "scores.json").write_text(f'{{"minutes": {len(history)}}}')
    (run / "training.lock").write_text(str(folder))
    return folder


def test_times_and_starts_may_differ(tmp_path: Path):
    one = written(tmp_path / "one")
    other = written(tmp_path / "other", starts=3, extra_state={"best": 2.0, "previous_training_time": 9.0})
    (other / "run" / "checkpoint_last.pt.tmp").touch()
    assert kills.compare(one, other) == ([], 1)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"model": {"a": torch.tensor([1.0, 0.0])}}, "run/checkpoint_last.pt.model.a has other numbers"),
        ({"model": {"a": torch.tensor([1.0 + 2**-23, torch.nan])}}, "run/checkpoint_last.pt.model.a has other numbers"),
        ({"model": {}}, "run/checkpoint_last.pt.model: a is on one side only"),
        ({"extra_state": {"best": 2.5, "previous_training_time": 3.0}}, "extra_state.best is '2.0' and '2.5'"),
        ({"optimizer_history": [{"num_updates": 3}]}, "optimizer_history[0].num_updates is '2' and '3'"),
    ],
)
def test_all_else_may_not(changed: dict, expected: str, tmp_path: Path):
    wrong, _ = kills.compare(written(tmp_path / "one"), written(tmp_path / "other", **changed))
    assert len(wrong) == 1
    assert wrong[0].endswith(expected)
    (tmp_path / "one" / "more").touch()
    assert kills.compare(tmp_path / "one", tmp_path / "other")[0][0] == "more is of one run only"
