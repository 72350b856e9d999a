"""One training in a folder, and one that scores it: a second one would mix its files with the first one's."""

from __future__ import annotations

import fcntl
import os
import socket

from hgkd_fairseq.errors import UserError

LOCK = "training.lock"
_held: dict[str, int] = {}  # descriptors, by folder, for as long as this process lives


REFUSAL = "--save-dir {folder}: {owner} is training in it; wait for its end, or give another --save-dir"


def hold(folder: str, lock: str = LOCK, refusal: str = REFUSAL) -> None:
    """Lock the folder that a training writes its checkpoints to, or another one's, until this process ends, however it
    does.

    A lock of fcntl's, not of flock's, which processes that load data would inherit and hold on to for seconds after
    their parent was killed. A file system that knows no locks stops nobody.

    Args:
        folder: made where it is missing.
        lock: the name of a file in it.
        refusal: the message where another process holds it; it may have {folder} and {owner}.

    Raises:
        UserError: another process holds it; the folder holds a link under a name that training writes to and empties:
            in a folder that came from elsewhere it may name any file of the user's.
    """
    path = os.path.join(os.path.realpath(folder), lock)
    if path in _held:
        return
    try:
        os.makedirs(folder, exist_ok=True)
        refuse_links(folder)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
    except OSError:
        return
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except (BlockingIOError, PermissionError):  # the two that fcntl(2) allows for a lock that another process holds
        owner = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise UserError(refusal.replace("{folder}", folder).replace("{owner}", owner)) from None
    except OSError:
        pass
    _held[path] = descriptor


def refuse_links(folder: str) -> None:
    """fairseq writes a checkpoint to NAME.tmp, through whatever link is there, and renames it then."""
    for entry in os.scandir(folder):
        if entry.is_symlink() and (entry.name == LOCK or entry.name.endswith(".tmp")):
            raise UserError(f"{entry.path} is a link, and a training would write over what it names; remove it")
