"""Claims of what one of several processes does, of one machine or of several on one file system: a file that names its
owner and tells whether it is still at work."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError

EXPIRES = 60.0  # seconds without a sign of life after which a claim is taken over


class Claim:
    """A file that exists while its owner works.

    It may be taken over where the owner was a process of this machine and has ended, or has not refreshed it for
    `expires` seconds. What is claimed must bear being done twice: an owner that was only slow learns it from
    :meth:`held`.

    Attributes:
        file: Path.
        expires: seconds.
        token: of this owner, or of the last attempt.
    """

    def __init__(self, file: Path, expires: float = EXPIRES):
        self.file, self.expires, self.token = file, expires, ""
        self._seen: tuple[Any, float] = (None, 0.0)  # what was read last, and since when it has been so

    def take(self) -> bool:
        """Whether it is ours now."""
        self.token = secrets.token_hex(8)
        state = self.read()
        if state is not None and not self.expired(state):
            return False
        own = self.file if state is None else self.file.with_name(f"{self.file.stem}.partial-{self.token}.claim")
        with told(self.file):
            try:
                descriptor = os.open(own, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
            except FileExistsError:  # another process was faster
                return False
            try:
                with open(descriptor, "w", encoding="utf-8") as stream:
                    json.dump({**myself(), "token": self.token}, stream)
                if own is not self.file:
                    own.replace(self.file)
            except OSError:
                own.unlink(missing_ok=True)
                raise
        return self.held()

    def read(self) -> tuple[dict[str, Any], int] | None:
        """The owner ({} where it was killed before it was written) and the time of the last refresh; None: no claim."""
        try:
            files.check_regular(self.file)
            refreshed = self.file.stat().st_mtime_ns
            found = json.loads(self.file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (ValueError, RecursionError):
            found = {}
        return (found if isinstance(found, dict) else {}), refreshed

    def expired(self, state: tuple[dict[str, Any], int]) -> bool:
        """Whether its owner has died. No machine's clock is compared with another's: the claim must have stayed as it
        is for so long by our own."""
        if dead(state[0]):
            return True
        before, since = self._seen
        if before != state:
            self._seen = state, time.monotonic()
            return False
        return time.monotonic() - since > self.expires

    def held(self) -> bool:
        """Whether it is still ours."""
        found = self.read()
        return found is not None and found[0].get("token") == self.token

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """It is refreshed, in a thread."""
        done = threading.Event()

        def refresh() -> None:
            while not done.wait(self.expires / 4) and self.held():
                with contextlib.suppress(OSError):
                    os.utime(self.file)

        thread = threading.Thread(target=refresh, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def release(self) -> None:
        if self.held():
            self.file.unlink(missing_ok=True)


def myself() -> dict[str, Any]:
    return {"host": machine(), "pid": os.getpid(), "started": started(os.getpid())}


def machine() -> str:
    """What a process number is unique in: of two containers on one machine each has its own numbers."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(pid: int) -> str | None:
    """When a process of this machine began, in ticks since it was switched on; None: it has ended, or no /proc."""
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if found[0] in "ZX" else found[19]  # a zombie has ended
    except (OSError, IndexError):
        return None


def dead(owner: dict[str, Any]) -> bool:
    """Whether a process of this machine that made a claim has ended; where that cannot be told, it has not."""
    if owner.get("host") != machine() or type(owner.get("pid")) is not int or not os.path.isdir("/proc/self"):
        return False
    return started(owner["pid"]) != owner.get("started")


@contextlib.contextmanager
def told(file: Path) -> Iterator[None]:
    """An error of the operating system as a UserError."""
    try:
        yield
    except OSError as error:
        where = error.filename or file
        raise UserError(f"{where}: {error.strerror or error}; fix that and run the command again") from error
