"""Tests of signals, after which a training saves, ends and can be resumed without a difference, and of the lock that
allows one training per folder."""

import os
import re
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command_line as cl
import pytest

from hgkd_fairseq.plugin import one_training

STATUS = 75  # exit status of a run that a signal stopped
METHOD = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd")
PLAIN = (*METHOD, "--gate", "none", "--max-tokens", 400, "--disable-validation")
# A plugin for --user-dir. TOLD holds the rank of a worker, "train" or "valid", the number of a step and the names of
# signals: in that step they are sent to the worker and to the processes that load its data, as Slurm sends them.
TELLS_ITSELF = """
import os, subprocess, time
import torch
import hgkd_fairseq.tasks
from hgkd_fairseq.tasks.with_teacher import WithTeacher

worker, kind, number, *signals = os.environ["TOLD"].split()
made, step = [], getattr(WithTeacher, f"{kind}_step")

def told(*args, **kwargs):
    made.append(None)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    if (rank, len(made)) == (int(worker), int(number)):
        for name in signals:
            subprocess.run(["sh", "-c", f"kill -s {name} -- -{os.getpgid(0)}"])
            time.sleep(1.2 if len(signals) > 1 else 0)
    return step(*args, **kwargs)

setattr(WithTeacher, f"{kind}_step", told)
"""

Told = Callable[..., cl.Result]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """Return a function that runs fairseq-train with signals and returns its result; it takes TOLD, the data, a
    --save-dir and options."""
    folder = tmp_path / "tells_itself"
    folder.mkdir()
    (folder / "__init__.py").write_text(TELLS_ITSELF)

    def train(signals: str, data: Path, save_dir: Path, *options) -> cl.Result:
        monkeypatch.setenv("TOLD", signals)
        arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", save_dir, *options)
        return cl.fairseq("train", *arguments, "--user-dir", folder)

    return train


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.pt"))


def updates(folder: Path) -> int:
    return cl.load(folder / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]


def numbers(tag: str, *results: cl.Result) -> list[dict[str, float]]:
    """Return the numbers of the log lines with a tag, without those about time."""
    timed = ("wall", "train_wall", "wps", "ups")
    rows = [row for result in results for row in result.logs(tag)]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_stopped_and_resumed(data: Path, tmp_path: Path, told: Told):
    """A run is stopped in the middle of an epoch, at an update before a validation, in that validation, which is then
    repeated, and in the validation at the end of an epoch; checkpoints and logs equal those of an uninterrupted run."""
    options = (*METHOD, "--gate", "progressive", "--teacher-source", "previous-epoch", "--max-tokens", 400)
    options += ("--dropout", 0.2, "--max-update", 14, "--save-interval-updates", 8)
    whole = cl.train(data, tmp_path / "whole", *cl.USER_DIR, *options)
    folder, results = tmp_path / "stopped", []
    for signals, after, made in (
        ("0 train 5 USR1", 5, []),
        ("0 train 3 TERM", 8, []),
        ("0 valid 1 TERM USR1", 8, []),
        ("0 valid 3 TERM", 12, ["checkpoint_1_8.pt", "checkpoint_best.pt"]),
    ):
        result = told(signals, data, folder, *options)
        names = " and ".join(f"SIG{name}" for name in sorted(signals.split()[3:]))
        line = f"{names}: the training has stopped after update {after} and is saved in {folder}; the same command goes"
        assert (result.code, result.output.count(line)) == (STATUS, 1), result.end()
        assert files(folder) == sorted([*made, "checkpoint_last.pt"])
        assert updates(folder) == after
        results.append(result)
    last = cl.train(data, folder, *cl.USER_DIR, *options)

    assert files(folder) == files(whole.folder)
    for name in files(folder):
        one, other = whole.state(name), last.state(name)
        for part in ("model", "last_optimizer_state"):
            assert cl.differences(one[part], other[part]) == {}, name
        assert one["optimizer_history"][-1] == other["optimizer_history"][-1]
        one, other = one["extra_state"], other["extra_state"]
        for part in ("train_iterator", "val_loss", "best", "patience"):
            assert one[part] == other[part], name
        assert cl.differences(*(extra["TranslationWithTeacherTask"] for extra in (one, other))) == {}
    for tag in ("train", "valid"):
        assert numbers(tag, *results, last.result) == numbers(tag, whole.result)
    assert [row["num_updates"] for row in whole.result.logs("valid")] == [8, 12, 14]


# A plugin for --user-dir, with which the training's clock is an hour ahead from the first validation on.
SLOW_VALIDATION = """
import time
from types import SimpleNamespace
import hgkd_fairseq.tasks
from fairseq import trainer
from hgkd_fairseq.tasks.with_teacher import WithTeacher

step = WithTeacher.valid_step

def slow(*args, **kwargs):
    trainer.time = SimpleNamespace(time=lambda: time.monotonic() + 3600)
    return step(*args, **kwargs)

WithTeacher.valid_step = slow
"""


def test_time_that_ends_during_a_validation(data: Path, tmp_path: Path):
    """If --stop-time-hours passes during a validation, one more update is made, as by fairseq, and all are saved; the
    run is then complete and is not continued."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "__init__.py").write_text(SLOW_VALIDATION)
    method = (*METHOD, "--gate", "none", "--max-tokens", 400)
    options = (*method, "--user-dir", tmp_path / "slow", "--stop-time-hours", 0.5, "--save-interval", 5)
    run = cl.train(data, tmp_path / "run", *options, "--max-epoch", 9)
    epochs = [row["epoch"] for row in run.result.logs("valid")]
    assert epochs == [1, 2]
    made = updates(run.folder)
    again = cl.train(data, run.folder, *options, "--max-epoch", 9)
    assert "the training has ended before: --stop-time-hours 0.5" in again.result.output
    assert updates(run.folder) == made


def two_workers(run: Callable[..., cl.Result], *options) -> list[cl.Result]:
    address = ("--distributed-init-method", f"tcp://127.0.0.1:{cl.free_port()}", "--distributed-backend", "gloo")
    world = ("--distributed-world-size", 2, "--distributed-no-spawn", "--ddp-backend", "legacy_ddp", *address)
    return cl.together(*[lambda rank=r: run(*options, *world, "--distributed-rank", rank) for r in (0, 1)])


def test_one_of_two_workers_is_told(data: Path, tmp_path: Path, told: Told):
    """Both workers stop after the same update and, resumed, end as one worker that takes two batches per update."""
    options = (*PLAIN, "--dropout", 0, "--attention-dropout", 0)
    folder = tmp_path / "two"
    for result in two_workers(told, "1 train 3 USR1", data, folder, *options, "--max-update", 9):
        assert result.code == STATUS, result.end()
    assert updates(folder) == 3
    assert files(folder) == ["checkpoint_last.pt"]
    for result in two_workers(told, "0 train 0", data, folder, *options, "--max-update", 5):
        assert result.code == 0, result.end()
    one = cl.train(data, tmp_path / "one", *cl.USER_DIR, *options, "--max-update", 5, "--update-freq", 2)
    assert cl.differences(one.state()["model"], cl.load(folder / "checkpoint_last.pt")["model"]) == {}


def test_a_worker_that_is_killed_ends_the_other(data: Path, tmp_path: Path, told: Told):
    begin = time.monotonic()
    other, killed = two_workers(told, "1 train 3 KILL", data, tmp_path, *PLAIN, "--max-update", 9)
    assert time.monotonic() - begin < 60
    assert killed.code == -signal.SIGKILL
    assert other.code == 1
    assert re.search("RuntimeError: .*[Cc]onnection (closed|reset) by peer", other.output), other.end()


@pytest.mark.parametrize(
    ("signals", "more", "status"),
    [
        ("0 train 3 TERM TERM", (), -signal.SIGTERM),  # the second one a second later
        ("0 train 3 USR1", ("--no-save",), -signal.SIGUSR1),
    ],
)
def test_ended_at_once(signals: str, more: tuple, status: int, data: Path, tmp_path: Path, told: Told):
    result = told(signals, data, tmp_path / "run", *PLAIN, *more, "--max-update", 4)
    assert result.code == status, result.end()
    assert files(tmp_path / "run") == []


def test_one_training_in_a_folder(data: Path, tmp_path: Path, told: Told):
    """A second training is refused while the first one is alive, and starts at once after that was killed, although the
    processes that loaded its data are still alive."""
    options = (data, tmp_path, *PLAIN, "--max-update", 2)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(told, "0 train 2 STOP", *options)
        while not first.done() and not (owner := stopped_owner(tmp_path)):
            time.sleep(0.1)
        try:
            second = cl.fairseq(
                "train", *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *cl.USER_DIR, "--save-dir", *options[1:], data
            )
            cl.one_error_message(second, [f"--save-dir {tmp_path}: process {owner} on ", "give another --save-dir"])
            os.kill(owner, signal.SIGKILL)
            assert first.result().code == -signal.SIGKILL
            os.killpg(owner, 0)  # processes of its group are alive
            cl.train(data, tmp_path, *cl.USER_DIR, *options[2:])
        finally:
            os.killpg(owner, signal.SIGKILL)


def stopped_owner(folder: Path) -> int | None:
    """Return the process that holds the folder's lock, if it has been stopped by SIGSTOP, else None."""
    lock = folder / one_training.LOCK
    found = re.match(r"process (\d+) on ", lock.read_text() if lock.exists() else "")
    return int(found[1]) if found and ") T " in Path(f"/proc/{found[1]}/stat").read_text() else None


def test_a_folder_that_cannot_be_locked_stops_nobody():
    one_training.hold("/proc/self")
