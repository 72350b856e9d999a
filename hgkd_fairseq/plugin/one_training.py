"""A lock for folders, so that two processes that train, or score, do not mix their files in one folder."""

from __future__ import annotations

import fcntl
import os
import socket

from hgkd_fairseq.errors import UserError

LOCK = "training.lock"
_held: dict[str, int] = {}  # open descriptors by path of the lock file, until this process ends


REFUSAL = "--save-dir {folder}: {owner} is training in it; wait for its end, or give another --save-dir"


def hold(folder: str, lock: str = LOCK, refusal: str = REFUSAL) -> None:
    """Lock a folder, such as the --save-dir of a training, until this process ends, in whatever way it ends.

    The lock is fcntl's rather than flock's: data loading processes would inherit the latter and hold it for seconds
    after their parent has been killed. If the lock file cannot be created, or the file system has no locks, nothing is
    refused.

    Args:
        folder: folder to lock; created if it is missing.
        lock: name of the lock file in the folder.
        refusal: error message if another process holds the lock, in which {folder} and {owner} are replaced.

    Raises:
        UserError: if another process holds the lock, or the folder has a symbolic link under a name to which a training
            writes; in a folder from elsewhere, such a link may point to any file of the user.
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
    except (BlockingIOError, PermissionError):  # the errors of fcntl(2) if another process holds the lock
        owner = os.pread(descriptor, 300, 0).decode(errors="replace") or "another process"
        os.close(descriptor)
        raise UserError(refusal.replace("{folder}", folder).replace("{owner}", owner)) from None
    except OSError:
        pass
    _held[path] = descriptor


def refuse_links(folder: str) -> None:
    """Refuse links under the names to which a training writes: the lock's, and NAME.tmp, which fairseq writes through a
    link before it renames the file to NAME."""
    for entry in os.scandir(folder):
        if entry.is_symlink() and (entry.name == LOCK or entry.name.endswith(".tmp")):
            raise UserError(f"{entry.path} is a link, and a training would write over what it names; remove it")
