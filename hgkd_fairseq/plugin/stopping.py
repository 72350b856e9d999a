"""A training that is told to stop, by SIGTERM or SIGUSR1: it finishes its update, saves, and ends.

A save takes seconds and a validation may take minutes: one that is due then, or going on, is left to the run that goes
on from there, which makes it first. compat.py puts these functions into fairseq's training loop.
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

STATUS = 75  # EX_TEMPFAIL of sysexits.h, "the user is invited to retry"
# A worker's vote, by the signal that it got: their sum says which ones were sent to any of 2**20 workers.
VOTES = {signal.SIGTERM: 1, signal.SIGUSR1: 2**20}
# One request may come several times at once: from Slurm to each process, and from a process to those that it started.
BURST_S = 1.0
UNVALIDATED = "unvalidated"  # beside the position in the data: the epoch of a validation that is still to be made


class Stop(Exception):
    """Ends what is going on in the training loop; the training is saved, or about to be."""


@dataclass
class Request:
    """Of this process."""

    received: dict[int, float] = field(default_factory=dict)  # signals, and when
    votes: Any = 0  # their sum over the workers when they last met: a number, or a tensor ()
    unvalidated: int | None = None  # of the checkpoint that the run goes on from
    saved: bool = False


request = Request()


def received(number: int, frame: FrameType | None) -> None:
    """Handle a signal: note the first of its kind, end at once at the second."""
    now = time.monotonic()
    if now - request.received.setdefault(number, now) > BURST_S:
        end_by(number)


def end_by(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def pass_on(number: int, frame: FrameType | None) -> None:
    """Handle a signal in the process that only started the workers, each in a process of its own."""
    workers = multiprocessing.active_children()
    for worker in workers:
        os.kill(worker.pid, number)  # type: ignore[arg-type]
    if not workers:
        end_by(number)


def handle(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    """Take the signals over, where no one else has."""
    if threading.current_thread() is threading.main_thread():
        for number in VOTES:
            if signal.getsignal(number) in (signal.SIG_DFL, pass_on):
                signal.signal(number, handler)


def listen() -> None:
    """From now on this process, a worker, is stopped by a signal as said above."""
    if not getattr(listen, "done", False):
        listen.done = True  # type: ignore[attr-defined]
        os.register_at_fork(after_in_child=leave_to_parent)
    handle(received)


def leave_to_parent() -> None:
    """In a process that this one forked, which loads data: Slurm sends a signal to all processes of a job, and without
    data the training could not finish its update. SIGTERM of its parent ends it, as torch has it."""
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
    """Around what starts the workers and waits for them."""
    from torch.multiprocessing import ProcessExitedException

    handle(pass_on)
    try:
        yield
    except ProcessExitedException as error:
        if error.exit_code != STATUS:
            raise
        sys.exit(STATUS)


def vote() -> int:
    """Of this worker."""
    return sum(VOTES[signal.Signals(number)] for number in request.received)


def votes(trainer) -> int:
    """Of all workers, which find the same sum at the same point of the training."""
    return vote() if trainer.data_parallel_world_size == 1 else int(request.votes)


def possible(trainer) -> bool:
    """Whether the run saves what it could go on from, and its workers all vote together."""
    saving, common = trainer.cfg.checkpoint, trainer.cfg.common
    return not (saving.no_save or saving.no_last_checkpoints or common.tpu) and common.model_parallel_size == 1


def save(cfg, trainer, epoch_itr, unvalidated: bool) -> None:
    """Write checkpoint_last.pt, and no other. The best one is known after a validation."""
    position = epoch_itr.state_dict() | ({UNVALIDATED: epoch_itr.epoch} if unvalidated else {})
    # Not at the end of its epoch: fairseq would write the epoch's own checkpoint.
    place = SimpleNamespace(epoch=epoch_itr.epoch, end_of_epoch=lambda: False, state_dict=lambda: position)
    last_only = copy.deepcopy(cfg.checkpoint)
    last_only.save_interval_updates = 0
    checkpoint_utils.save_checkpoint(last_only, trainer, place, None)
    if cfg.checkpoint.write_checkpoints_asynchronously:
        PathManager.async_close()
    if torch.distributed.is_initialized():  # whoever started the workers may end all of them when one has ended
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
    """fairseq's function, which follows each update; its validation raises Stop when votes are in."""
    unvalidated = False
    try:
        losses, should_stop = original(cfg, trainer, task, epoch_itr, valid_subsets, end_of_epoch)
        if should_stop or not votes(trainer):
            return losses, should_stop
    except Stop:
        unvalidated = isinstance(epoch_itr, iterators.EpochBatchIterator)
    save(cfg, trainer, epoch_itr, unvalidated)
    if end_of_epoch:
        return [None], True  # the epoch's log line follows
    raise Stop


def train(original, loop: ModuleType, cfg, trainer, task, epoch_itr):
    """fairseq's function, which trains for an epoch. The validation that a stopped run has left comes first. Where all
    is done there is no training: of a run that was killed after its last checkpoint, say."""
    try:
        unvalidated, request.unvalidated = request.unvalidated, None
        result = None if unvalidated is None else validate(loop, cfg, trainer, task, epoch_itr, unvalidated)
        result = result or done(loop, cfg, trainer) or original(cfg, trainer, task, epoch_itr)
    except Stop:
        leave(cfg, trainer)
    if request.saved:
        leave(cfg, trainer)
    return result


def done(loop: ModuleType, cfg, trainer) -> tuple[list[None], bool] | None:
    """What fairseq's `train` returns at the end of a training, where the options say that it has ended; else None.
    fairseq itself asks after an update, and would make one more, or all up to the next validation."""
    made, limits = trainer.get_num_updates(), cfg.optimization
    waited = getattr(loop.should_stop_early, "num_runs", 0)
    ends = {
        f"{made} updates are made": 0 < limits.max_update <= made,
        f"{waited} validations have brought nothing": 0 < cfg.checkpoint.patience <= waited,
        f"--stop-time-hours {limits.stop_time_hours}": 0
        < limits.stop_time_hours * 3600
        < trainer.cumulative_training_time(),
    }
    why = [reason for reason, end in ends.items() if end]
    if not why or not made:
        return None
    logger.info("the training has ended before: %s", ", ".join(why))
    return [None], True


def validate(loop: ModuleType, cfg, trainer, task, epoch_itr, epoch: int):
    """Validate and save as fairseq does after an update of that epoch; what fairseq's `train` returns, or None where
    the epoch goes on."""
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
