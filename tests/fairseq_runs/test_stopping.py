"""A training that is told to stop saves, ends and goes on as if nothing had been; and a folder has one training."""

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

STATUS = 75  # of a run that was told to stop
METHOD = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd")
PLAIN = (*METHOD, "--gate", "none", "--max-tokens", 400, "--disable-validation")
# For --user-dir. TOLD holds the number of a worker, "train" or "valid", the number of its step and the names of
# signals: in that step they are sent to the worker and to the processes that load its data, as Slurm does.
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
    """A fairseq-train that gets signals: of TOLD, the data, a --save-dir and options its result."""
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
    """Of the log lines, without those that are about time."""
    timed = ("wall", "train_wall", "wps", "ups")
    rows = [row for result in results for row in result.logs(tag)]
    return [{name: value for name, value in row.items() if name not in timed} for row in rows]


def test_stopped_and_resumed(data: Path, tmp_path: Path, told: Told):
    """In the middle of an epoch, at an update after which it is validated, in that validation, which is begun again,
    and in the validation at the end of an epoch: the run that was never stopped, bit for bit and line for line."""
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


def two_workers(run: Callable[..., cl.Result], *options) -> list[cl.Result]:
    address = ("--distributed-init-method", f"tcp://127.0.0.1:{cl.free_port()}", "--distributed-backend", "gloo")
    world = ("--distributed-world-size", 2, "--distributed-no-spawn", "--ddp-backend", "legacy_ddp", *address)
    return cl.together(*[lambda rank=r: run(*options, *world, "--distributed-rank", rank) for r in (0, 1)])


def test_one_of_two_workers_is_told(data: Path, tmp_path: Path, told: Told):
    """Both stop after the same update, and go on: as one worker that takes two batches an update."""
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
        ("0 train 3 TERM TERM", (), -signal.SIGTERM),  # the second, a second later
        ("0 train 3 USR1", ("--no-save",), -signal.SIGUSR1),
    ],
)
def test_ended_at_once(signals: str, more: tuple, status: int, data: Path, tmp_path: Path, told: Told):
    result = told(signals, data, tmp_path / "run", *PLAIN, *more, "--max-update", 4)
    assert result.code == status, result.end()
    assert files(tmp_path / "run") == []


def test_one_training_in_a_folder(data: Path, tmp_path: Path, told: Told):
    """The second one is refused while the first one is there, and begins at once when that was killed, though the
    processes that loaded its data are still there."""
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
            os.killpg(owner, 0)  # some are left
            cl.train(data, tmp_path, *cl.USER_DIR, *options[2:])
        finally:
            os.killpg(owner, signal.SIGKILL)


def stopped_owner(folder: Path) -> int | None:
    """The process that holds the folder, once it has stopped itself."""
    lock = folder / one_training.LOCK
    found = re.match(r"process (\d+) on ", lock.read_text() if lock.exists() else "")
    return int(found[1]) if found and ") T " in Path(f"/proc/{found[1]}/stat").read_text() else None


def test_a_folder_that_cannot_be_locked_stops_nobody():
    one_training.hold("/proc/self")
