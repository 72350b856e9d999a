"""The folder of what is made once for a user and kept: compiled kernels, fitted temperatures of teachers."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def open_to_others(path: Path) -> bool:
    """Whether another user may change what lies under the name of this existing file or folder. In a folder such as
    /tmp, with the sticky bit, nobody replaces what is somebody else's."""
    status = path.lstat()
    writable = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not status.st_mode & stat.S_ISVTX
    return bool(writable) or status.st_uid not in (0, os.geteuid())


def folder() -> Path:
    """The folder, made where it is missing (mode 0700, as each missing folder above it).

    Raises:
        OSError: it cannot be made, or another user may write to it or to a folder above it.
        RuntimeError: there is no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))  # a relative one is to be ignored, says its specification
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
