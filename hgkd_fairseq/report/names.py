"""Short names of runs and files for tables and diagrams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the shortest trailing parts of the paths, equally many of each, that make them distinct.

    Files lose their suffixes. If the names are not distinct even with all parts, whole paths are returned.

    Args:
        paths: paths of files or folders; at least one.
    """
    parts = [path.resolve().with_suffix("").parts if path.is_file() else path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = [str(Path(*one[-length:])) for one in parts]
        if len(set(names)) == len(names):
            break
    return names
