"""Stopping a training run on SIGTERM or SIGUSR1: it finishes the current update, saves a checkpoint and exits.

A save takes seconds, but a validation may take minutes. A validation that is due or in progress is therefore left to
the resumed run, which starts with it. compat.py installs these functions in fairseq's training loop.
"""

from __future__ import annotations

import copy
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any, NoReturn

import torch
from fairseq import checkpoint_utils
from fairseq.data import iterators
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager

logger = logging.getLogger(__name__)

STATUS = 75  # exit status of a stopped run: EX_TEMPFAIL of sysexits.h, "the user is invited to retry"
# A worker's vote for each signal that it has received. The sum over the workers, fewer than 2**20, shows which signals
# were sent.
VOTES = {signal.SIGTERM: 1, signal.SIGUSR1: 2**20}
# Repeated signals within this time, in seconds, are one request: Slurm may send it to each process, and a process
# passes it on to those that it started.
BURST_S = 1.0
UNVALIDATED = "unvalidated"  # key in the saved state of the data iterator: epoch whose validation is still due


class Stop(Exception):
    """Raised to leave the training loop after, or immediately before, the training is saved."""


@dataclass
class Request:
    """What this process knows of a request to stop."""

    received: dict[int, float] = field(default_factory=dict)  # signal -> monotonic time of its arrival (s)
    votes: Any = 0  # sum of the votes when the workers last synchronised: a number or a tensor ()
    unvalidated: int | None = None  # value of `UNVALIDATED` in the checkpoint from which the run resumes
    saved: bool = False  # whether the training has been saved on request
    checked: bool = False  # whether the limits were checked, before the first epoch of this process


request = Request()


def received(number: int, frame: FrameType | None) -> None:
    """Handle a signal: record the first of its kind; end the process at the next one after `BURST_S`."""
    now = time.monotonic()
    if now - request.received.setdefault(number, now) > BURST_S:
        end_by(number)


def end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def pass_on(number: int, frame: FrameType | None) -> None:
    """Handle a signal in the parent of the worker processes: pass it on to them, or end if there are none."""
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, number)  # type: ignore[arg-type]
    if not workers:
        end_by(number)


def handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Install a handler of the signals, in the main thread only, unless other code has installed its own."""
    if threading.current_thread() is threading.main_thread():
        for number in VOTES:
            if signal.getsignal(number) in (signal.SIG_DFL, pass_on):
                signal.signal(number, handler)


def listen() -> None:
    """Make this process, a worker, stop its training when it receives a signal."""
    if not getattr(listen, "done", False):
        listen.done = True  # type: ignore[attr-defined]
        os.register_at_fork(after_in_child=leave_to_parent)
    handle(received)


def leave_to_parent() -> None:
    """Ignore the signals in a forked child process, such as a data loading worker.

    Slurm sends a signal to all processes of a job, but the training needs data to finish its update. A SIGTERM from the
    parent, by which torch ends its data loading workers, still ends the child.
    """
    if not request_is_handled():
        return
    parent = os.getppid()
    signal.pthread_sigmask(signal.SIG_BLOCK, VOTES)

    def wait() -> None:
        while True:
            found = signal.sigwaitinfo(VOTES)
            if found.si_signo == signal.SIGTERM and found.si_pid == parent:
                os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def request_is_handled() -> bool:
    return any(signal.getsignal(number) is received for number in VOTES)


@contextmanager
def starting_workers() -> Iterator[None]:
    """Context in which workers are started and awaited: signals are passed on to them, and if one exits with `STATUS`,
    so does this process."""
    from torch.multiprocessing import ProcessExitedException

    handle(pass_on)
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code != STATUS:
            raise
        sys.exit(STATUS)


def vote() -> int:
    """Return the vote of this worker, the sum of `VOTES` over the signals that it has received."""
    return sum(VOTES[signal.Signals(number)] for number in request.received)


def votes(trainer) -> int:
    """Return the sum of the votes of all workers, which is the same on each at the same point of the training."""
    return vote() if trainer.data_parallel_world_size == 1 else int(request.votes)


def possible(trainer) -> bool:
    """Return whether the run saves checkpoints to resume from and all its workers share their votes."""
    saving, common = trainer.cfg.checkpoint, trainer.cfg.common
    return not (saving.no_save or saving.no_last_checkpoints or common.tpu) and common.model_parallel_size == 1


def save(cfg, trainer, epoch_itr, unvalidated: bool) -> None:
    """Write checkpoint_last.pt and no other checkpoint, since the best one is only known after a validation.

    Args:
        cfg: fairseq's configuration.
        trainer: fairseq's trainer.
        epoch_itr: iterator over the epochs.
        unvalidated: whether the validation of this epoch is left to the resumed run.
    """
    position = epoch_itr.state_dict() | ({UNVALIDATED: epoch_itr.epoch} if unvalidated else {})
    # end_of_epoch is False because fairseq would otherwise write the epoch's own checkpoint too.
    place = SimpleNamespace(epoch=epoch_itr.epoch, end_of_epoch=lambda: False, state_dict=lambda: position)
    last_only = copy.deepcopy(cfg.checkpoint)
    last_only.save_interval_updates = 0
    checkpoint_utils.save_checkpoint(last_only, trainer, place, None)
    if cfg.checkpoint.write_checkpoints_asynchronously:
        PathManager.async_close()
    if torch.distributed.is_initialized():  # the launcher may end all workers as soon as one has exited
        torch.distributed.barrier(distributed_utils.get_global_group())
    request.saved = True


def leave(cfg, trainer) -> NoReturn:
    asked = votes(trainer)
    named = [number.name for number, of_one in VOTES.items() if asked // of_one % 2**20]
    logger.info(
        "%s: the training has stopped after update %d and is saved in %s; the same command goes on from there",
        " and ".join(named),
        trainer.get_num_updates(),
        cfg.checkpoint.save_dir,
    )
    sys.exit(STATUS)


def validate_and_save(original, cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch):
    """Replacement for the loop's `validate_and_save`, which fairseq calls after each update.

    If a stop is requested, also during the validation, save the training and, unless at the end of an epoch, raise
    :class:`Stop`.

    Args:
        original: fairseq's function; the other arguments and the result are as for it.
    """
    unvalidated = False
    try:
        losses, should_stop = original(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        if should_stop or not votes(trainer):
            return losses, should_stop
    except Stop:
        unvalidated = isinstance(epoch_itr, iterators.EpochBatchIterator)
    save(cfg, trainer, epoch_itr, unvalidated)
    if end_of_epoch:
        return [None], True  # fairseq then logs the epoch's statistics, and `train` exits
    raise Stop


def train(original, loop: ModuleType, cfg, trainer, task, epoch_itr):
    """Replacement for the loop's `train`, which trains for an epoch.

    A validation that a stopped run has left undone is done first. There is no training if the run is already complete,
    as after it was killed between its last checkpoint and its end. A requested stop exits with `STATUS`.

    Args:
        original: fairseq's function; the other arguments and the result are as for it.
        loop: module of the training loop.
    """
    try:
        unvalidated, request.unvalidated = request.unvalidated, None
        result = None if unvalidated is None else validate(loop, cfg, trainer, task, epoch_itr, unvalidated)
        if not request.checked:
            request.checked, result = True, result or done(loop, cfg, trainer)
        result = result or original(cfg, trainer, task, epoch_itr)
    except Stop:
        leave(cfg, trainer)
    if request.saved:
        leave(cfg, trainer)
    return result


def done(loop: ModuleType, cfg, trainer) -> tuple[list[None], bool] | None:
    """Return what fairseq's `train` returns at the end of training if a limit is already reached, else None.

    fairseq itself checks the limits only after an update, so that a complete run, resumed, would make one more update,
    or all updates up to the next validation. Call this only before the first epoch of the process, when all updates are
    in a checkpoint: fairseq saves after the check of its own. The time is the checkpoint's, which all workers share.
    """
    made, limits = trainer.get_num_updates(), cfg.optimization
    waited = getattr(loop.should_stop_early, "num_runs", 0)
    ends = {
        f"{made} updates are made": 0 < limits.max_update <= made,
        f"{waited} validations have brought nothing": 0 < cfg.checkpoint.patience <= waited,
        f"--stop-time-hours {limits.stop_time_hours}": 0
        < limits.stop_time_hours * 3600
        < trainer._previous_training_time,
    }
    why = [reason for reason, end in ends.items() if end]
    if not why or not made:
        return None
    logger.info("the training has ended before: %s", ", ".join(why))
    return [None], True


def validate(loop: ModuleType, cfg, trainer, task, epoch_itr, epoch: int):
    """Validate and save as fairseq does after an update of `epoch`.

    Returns what fairseq's `train` returns if the epoch or the training is complete, else None.
    """
    end_of_epoch = epoch_itr.epoch != epoch
    if end_of_epoch:
        epoch_itr.epoch, epoch_itr._cur_epoch_itr = epoch, iterators.CountingIterator([])
    else:
        epoch_itr._cur_epoch_itr = epoch_itr._next_epoch_itr
    subsets = cfg.dataset.valid_subset.split(",")
    losses, should_stop = loop.validate_and_save(cfg, trainer, task, epoch_itr, subsets, end_of_epoch)
    if end_of_epoch or should_stop:
        return losses, should_stop
    epoch_itr._cur_epoch_itr = None
    return None
