"""Commands of hgkd that fill a folder together, in processes of which some are killed, and on a disk that is full."""

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

TIMES = 5  # a process is killed


def content(folder: Path) -> dict[str, str]:
    """Of each file in it a hash."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "folder"
        for file in folder.rglob("*")
    }


def owners(folder: Path) -> list[int]:
    """Of the claims of the moment."""
    found = []
    for file in folder.glob("shard-?????.claim"):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text())["pid"])
    return found


def run(words: list[str]) -> None:
    import torch  # here: workers of test_shards.py do without

    from hgkd_fairseq import cli

    torch.set_num_threads(1)
    os._exit(cli.main(words))


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """Processes that have imported all that takes long."""
    context = multiprocessing.get_context("forkserver")
    modules = ("export", "evaluation.translate", "teacher.storing")
    context.set_forkserver_preload([f"hgkd_fairseq.{name}" for name in modules])
    return context


def start(*words) -> multiprocessing.process.BaseProcess:
    """hgkd in a process of its own."""
    process = server().Process(target=run, args=[list(map(str, words))])
    process.start()
    return process


def fill_and_kill(folder: Path, begin: Callable[[], multiprocessing.process.BaseProcess]) -> None:
    """Two processes fill a folder; five times one that is making a shard is killed, at a random moment of it, and
    another is begun. Both that are left end well."""
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
    """The exit status of a process that runs `before`, then the function."""
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
    """Permissions do not bind root."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)


@contextlib.contextmanager
def full_disk(largest: int) -> Iterator[None]:
    """A file of this process may have so many bytes; to write more fails."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
