"""The user's cache folder, which holds compiled kernels and fitted teacher temperatures."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_to_others(path: Path) -> bool:
    """Return whether another user may modify an existing file or folder.

    That is the case if its owner is neither this user nor root, or if its group or others may write to it. A folder
    with the sticky bit, such as /tmp, is not open: users cannot replace each other's files in it.
    """
    status = path.lstat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return bool(writable) or status.st_uid not in (0, os.geteuid())


def folder() -> Path:
    """Return the cache folder, ``$XDG_CACHE_HOME/hgkd_fairseq`` or ``~/.cache/hgkd_fairseq``.

    It is created if it is missing, with mode 0700, and so are missing parent folders.

    Raises:
        OSError: the folder cannot be created, or another user may write to it or to one of its parents.
        RuntimeError: the home folder cannot be determined.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # its specification requires that relative paths are ignored
    path = (given if given.is_absolute() else Path.home() / ".cache") / "hgkd_fairseq"
    missing = [part for part in (path, *path.parents) if not part.exists()]
    for part in reversed(missing):
        part.mkdir(mode=0o700, exist_ok=True)
    owned = path.lstat()
    if not stat.S_ISDIR(owned.st_mode) or owned.st_uid != os.geteuid():
        raise PermissionError(f"{path} is no folder of this user's: remove it")
    path = path.resolve()
    for part in (path, *path.parents):
        if open_to_others(part):
            raise PermissionError(f"{part} is another user's, or others may write to it: chmod go-w {part}")
    return path
