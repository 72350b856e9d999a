"""Claims, by which processes on one or several machines with a common file system divide work among themselves.

A claim is a file that names its owner, and that the owner refreshes while it works.
"""

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

EXPIRES = 60.0  # seconds without a refresh after which a claim may be taken over


class Claim:
    """A file that exists while its owner works on what it claims.

    Another process may take the claim over if the owner was a process of the same machine and has ended, or if the
    claim has not been refreshed for `expires` seconds. The work must therefore be safe to do twice: an owner that was
    only slow finds out by :meth:`held` that it has lost the claim.

    Attributes:
        file: path of the file.
        expires: seconds without a refresh after which the claim may be taken over.
        token: random identifier of the last attempt of this object to take the claim.
        previous: token of the owner that had it before that attempt; "" if there was none.
    """

    def __init__(self, file: Path, expires: float = EXPIRES):
        self.file, self.expires, self.token = file, expires, ""
        self.previous = ""
        self._seen: tuple[Any, float] = (None, 0.0)  # state that was read last, and when it was first seen

    def take(self) -> bool:
        """Try to take the claim; return whether this object holds it now.

        Raises:
            UserError: the file cannot be written.
            OSError: there is something else than a regular file, or it cannot be read.
        """
        self.token = secrets.token_hex(8)
        state = self.read()
        if state is not None and not self.expired(state):
            return False
        self.previous = state[0].get("token", "") if state else ""
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
            except FileNotFoundError:  # all is finished, and another process has removed what is left of claims
                return False
            except OSError:
                own.unlink(missing_ok=True)
                raise
        return self.held()

    def read(self) -> tuple[dict[str, Any], int] | None:
        """Read the claim.

        Returns:
            The owner, or {} if the process was killed before it wrote it, and the time of the last refresh (st_mtime_ns
            of the file); None if there is no claim.
        """
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
        """Return whether the owner of a claim in this state, as :meth:`read` returns it, is considered dead.

        Clocks of different machines are never compared: the claim must have been unchanged for `expires` seconds by the
        clock of this process, which counts from the first call that sees this state.
        """
        if dead(state[0]):
            return True
        before, since = self._seen
        if before != state:
            self._seen = state, time.monotonic()
            return False
        return time.monotonic() - since > self.expires

    def held(self) -> bool:
        """Return whether this object still holds the claim."""
        found = self.read()
        return found is not None and found[0].get("token") == self.token

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """Refresh the claim, in a thread, for the duration of the context."""
        done = threading.Event()

        def refresh() -> None:
            held = True
            while held and not done.wait(self.expires / 4):
                with contextlib.suppress(OSError):  # of a network file system, and may pass
                    held = self.held()
                    if held:
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
    """Return an identifier of the scope in which process ids are unique: host, boot and PID namespace.

    Containers on one machine have PID namespaces of their own.
    """
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def started(pid: int) -> str | None:
    """Return the start time of a process of this machine, in clock ticks since boot.

    None if the process has ended or there is no /proc.
    """
    try:
        found = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if found[0] in "ZX" else found[19]  # a zombie has ended
    except (OSError, IndexError):
        return None


def dead(owner: dict[str, Any]) -> bool:
    """Return whether the owner of a claim is a process of this machine that has ended; False if this is unknown."""
    if owner.get("host") != machine() or type(owner.get("pid")) is not int or not os.path.isdir("/proc/self"):
        return False
    return started(owner["pid"]) != owner.get("started")


@contextlib.contextmanager
def told(file: Path) -> Iterator[None]:
    """Convert an OSError in the context to a UserError that names its file, or `file` if it has none."""
    try:
        yield
    except OSError as error:
        where = error.filename or file
        raise UserError(f"{where}: {error.strerror or error}; fix that and run the command again") from error
