"""Files that are made once: again only where they, or what they were made from, have changed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import one_training

RECORD, LOCK = "scored.json", "scoring.lock"


class Steps:
    """The files of a folder that are whole and come from known inputs: RECORD has the hashes of both."""

    def __init__(self, folder: Path, *inputs: Any):
        self.folder, self.inputs = folder, [content(one) for one in inputs]
        self.table: dict[str, list[str]] | None = None

    def begin(self) -> dict[str, list[str]]:
        """The record, which nobody else changes from now on: what two processes write would be mixed.

        Raises:
            UserError: another process makes files of this folder.
        """
        one_training.hold(str(self.folder), LOCK, "{folder} is being scored by {owner}; wait until that has ended")
        with contextlib.suppress(UserError):  # there is none, or one that was cut short
            return files.read_json(self.folder / RECORD, {str: [str]})
        return {}

    def once(self, name: str, make: Callable[[Path], object], *inputs: Any) -> Path:
        """The file `name`, which make(file) writes unless it is there, byte for byte, from the same inputs. Of a Path
        the content counts."""
        file = self.folder / name
        if self.table is None:
            self.table = self.begin()
        known = json.dumps([*self.inputs, *map(content, inputs)])
        key = hashlib.sha256(known.encode()).hexdigest()
        if not file.is_file() or self.table.get(name) != [key, content(file)]:
            print(f"hgkd: {file}", file=sys.stderr, flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            make(file)
            self.table[name] = [key, content(file)]
            files.write_json(self.folder / RECORD, self.table)
        return file


def content(value: Any) -> Any:
    """The SHA-256 of a Path's content; any other value as it is."""
    return files.sha256(value) if isinstance(value, Path) else value
