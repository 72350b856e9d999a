"""Files that are made once, and again only if they or the inputs that they were made from have changed."""

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
    """Files of a folder with a record of what they were made from.

    The record, a file named RECORD, has for each file a hash of its inputs and one of its content.

    Args:
        folder: folder of the files.
        inputs: inputs of all files: values that JSON can represent, or paths of files, whose content counts.
    """

    def __init__(self, folder: Path, *inputs: Any):
        self.folder, self.inputs = folder, [content(one) for one in inputs]
        self.table: dict[str, list[str]] | None = None

    def begin(self) -> dict[str, list[str]]:
        """Lock the folder until this process ends, so that no other process writes to it, and read its record.

        Raises:
            UserError: another process holds the lock.
        """
        one_training.hold(str(self.folder), LOCK, "{folder} is being scored by {owner}; wait until that has ended")
        with contextlib.suppress(UserError):  # the record is missing or truncated
            return files.read_json(self.folder / RECORD, {str: [str]})
        return {}

    def once(self, name: str, make: Callable[[Path], object], *inputs: Any) -> Path:
        """Return the file `name`, after making it unless it is unchanged and was made from the same inputs.

        Args:
            name: path of the file, relative to the folder.
            make: writes the file, given its path.
            inputs: inputs of this file, besides those of all files.

        Raises:
            UserError: another process holds the lock of the folder.
        """
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
    """Return the SHA-256 of the content of a Path, and any other value unchanged."""
    return files.sha256(value) if isinstance(value, Path) else value
