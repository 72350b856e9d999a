"""Test of training with a read-only home folder, a missing TMPDIR, a umask of 077 and a clock that jumps."""

import os
import stat
from pathlib import Path

import command_line as cl
import pytest

# A plugin for --user-dir. The clock jumps back and forth by days; some clusters set a umask of 077.
UNUSUAL = """
import itertools, os, time
import hgkd_fairseq.tasks

os.umask(0o077)
days, now = itertools.cycle((0, -3, 5, -400)), time.time
time.time = lambda: now() + 86400 * next(days)
"""


def test_an_unusual_environment(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A run, resumed after the times of its files were changed, equals one in a usual environment, bit for bit, and
    --stop-time-hours does not end it."""
    (tmp_path / "unusual").mkdir()
    (tmp_path / "unusual" / "__init__.py").write_text(UNUSUAL)
    method = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", "--gate", "none")
    options = (*method, "--max-tokens", 400, "--stop-time-hours", 2, "--valid-subset", "test")
    usual = cl.train(data, tmp_path / "usual", *cl.USER_DIR, *options, "--max-update", 6)
    monkeypatch.setenv("HOME", "/proc")  # where root cannot write either
    monkeypatch.setenv("TMPDIR", "/nowhere")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = tmp_path / "run"
    for updates in (3, 6):
        for file in folder.glob("*"):
            os.utime(file, (1e9, 3e9))
        run = cl.train(data, folder, "--user-dir", tmp_path / "unusual", *options, "--max-update", updates)
    last = run.state()
    assert last["optimizer_history"][-1]["num_updates"] == 6
    assert 0 <= last["extra_state"]["previous_training_time"] < 600
    assert cl.differences(last["model"], usual.state()["model"]) == {}
    assert stat.S_IMODE(run.path().stat().st_mode) == 0o600
