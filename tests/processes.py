"""Helpers for tests with several processes: commands of hgkd that fill one folder, processes that are killed, forks
without root's privileges, and a full disk."""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

TIMES = 5  # number of processes that are killed


def content(folder: Path) -> dict[str, str]:
    """Return, by relative path, the SHA-256 of each file below a folder, and "folder" for each subfolder."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in folder.rglob("*")
    }


def owners(folder: Path) -> list[int]:
    """Return the ids of the processes that currently claim a shard of a folder."""
    found = []
    for file in folder.glob("shard-?????.claim"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text())["pid"])
    return found


def run(words: list[str]) -> None:
    import torch  # not at the top: workers of test_shards.py do not need it

    from hgkd_fairseq import cli

    torch.set_num_threads(1)
    os._exit(cli.main(words))


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """Return a multiprocessing context whose processes have the slow imports preloaded."""
    context = multiprocessing.get_context("forkserver")
    modules = ("export", "evaluation.translate", "teacher.storing")
    context.set_forkserver_preload([f"hgkd_fairseq.{name}" for name in modules])
    return context


def start(*words) -> multiprocessing.process.BaseProcess:
    """Start hgkd with the arguments `words` in a new process."""
    process = server().Process(target=run, args=[list(map(str, words))])
    process.start()
    return process


def fill_and_kill(folder: Path, begin: Callable[[], multiprocessing.process.BaseProcess]) -> None:
    """Let two processes fill a folder while processes are killed, and assert that the last two succeed.

    `TIMES` times a process that is making a shard is killed, at a random moment, and replaced by another one.

    Args:
        folder: folder of shards.
        begin: function that starts a process which fills it.
    """
    rng, both, killed = random.Random(1), [begin() for _ in range(2)], 0
    while killed < TIMES and any(one.is_alive() for one in both):
        at_work = [one for one in both if one.pid in owners(folder)] if folder.exists() else []
        if at_work:
            time.sleep(rng.uniform(0, 0.1))
            one = rng.choice(at_work)
            one.kill()
            one.join()
            killed += one.exitcode == -signal.SIGKILL
            both = [*(other for other in both if other is not one), begin()]
        time.sleep(0.01)
    for one in both:
        one.join(60)
    assert killed == TIMES
    assert [one.exitcode for one in both] == [0, 0]


def in_a_child(function, before=lambda: None) -> int:
    """Run `before` and then `function` in a forked process, and return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            before()
            function()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def as_a_user() -> None:
    """Drop the privileges of root, which file permissions do not restrict."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """Simulate a full disk: writing more than `largest` bytes to a file fails with "File too large"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
