"""A folder of shards that several processes, of one machine or of several on one file system, fill together.

    manifest.json       what the shards are made of; written once, compared by whoever comes later
    shard-00000/        its files
    shard-00000.json    its record: rows, and SHA-256 of the manifest and of each file
    shard-00000.claim   while somebody makes it
    shard-00000.partial-TOKEN/   what its owner has made so far

What is made of a shard must depend on the manifest and the shard's number alone. Then a claim only saves work: where
two processes make the same shard after all, the second writes what the first wrote, and the finished folder is the
same, byte for byte, whoever was killed, and when.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hgkd_fairseq import files
from hgkd_fairseq.data.claims import EXPIRES, Claim, told
from hgkd_fairseq.errors import UserError

MANIFEST = "manifest.json"
MOST = 100_000  # shards: their numbers have five digits
COUNTS = ("rows", "shard_size")
RECORD = {"manifest": str, "rows": files.Within(0), "files": {str: str}}

Make = Callable[[int, Path], int]
"""Writes the files of shard `number` to an empty folder; the rows in them."""


class Shards:
    """Shards of `shard_size` rows each, the last one of fewer. A row may be several lines of a file, or none: it is a
    sentence, say.

    Attributes:
        folder: Path.
        manifest: as it was given, with "rows" and "shard_size".
        count: of shards.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], expires: float = EXPIRES):
        self.folder, self.manifest = Path(folder), manifest
        self.rows, self.shard_size = (manifest[name] for name in COUNTS)
        self.count = -(-self.rows // self.shard_size)
        if self.count > MOST:
            raise UserError(f"{folder} would have {self.count:,} shards, more than {MOST:,}; make them larger")
        self.digest = hashlib.sha256(text_of(manifest).encode()).hexdigest()
        self._whole: set[int] = set()  # shards that have been hashed
        self._claims = [Claim(self.name(shard).with_suffix(".claim"), expires) for shard in range(self.count)]

    @classmethod
    def create(
        cls, folder: str | Path, manifest: dict[str, Any], rows: int, shard_size: int, expires: float = EXPIRES
    ) -> Shards:
        """A folder to fill, new or begun with the same manifest.

        Args:
            folder: which is made, within one that is there.
            manifest: plain values of JSON: all that the content depends on.
            rows: in all.
            shard_size: rows a shard.
            expires: seconds after which a claim that nobody has refreshed is taken over.

        Raises:
            UserError: the folder holds something else, or shards of another manifest: what differs is named.
        """
        if not str(folder):
            raise UserError("--output is empty; name a folder")
        folder, wanted = Path(folder), {**manifest, "rows": rows, "shard_size": shard_size}
        wanted = json.loads(text_of(wanted))
        cls(folder, wanted)  # what it refuses is told before the folder is made
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder} is no folder; name another one")
        with told(folder):
            folder.mkdir(exist_ok=True)
            if not (folder / MANIFEST).exists():
                if any(not one.name.startswith("manifest.partial-") for one in folder.iterdir()):
                    raise UserError(f"{folder} holds other files and no {MANIFEST}; name another folder")
                partial = folder / f"manifest.partial-{secrets.token_hex(8)}"
                partial.mkdir()
                try:
                    files.write_text(partial / MANIFEST, text_of(wanted))
                    with contextlib.suppress(FileExistsError):
                        link(partial / MANIFEST, folder / MANIFEST)
                finally:
                    shutil.rmtree(partial, ignore_errors=True)
        return cls.open(folder, wanted, expires)

    @classmethod
    def open(cls, folder: str | Path, expected: dict[str, Any] | None = None, expires: float = EXPIRES) -> Shards:
        """A folder to read.

        Args:
            folder: that :meth:`create` made.
            expected: values that its manifest must have, tables of values within it; None: whatever it has.

        Raises:
            UserError: there is no manifest, or another one.
        """
        schema = {name: files.Within(1) for name in COUNTS}
        found = files.read_json(Path(folder) / MANIFEST, schema, "manifest of shards")
        try:
            different = list(differences(found, expected or {}))
            made = cls(folder, found, expires)
        except UserError:
            raise
        except (RecursionError, ValueError) as error:
            why = "it is nested too deep" if isinstance(error, RecursionError) else "a number in it is infinite"
            raise UserError(f"{Path(folder) / MANIFEST} is no manifest of shards: {why}") from None
        if different:
            more = f", and {len(different) - 3} more" if len(different) > 3 else ""
            raise UserError(
                f"{folder} was made with another {'; another '.join(different[:3])}{more}; give what it was made with, "
                "or name another folder"
            )
        return made

    def numbers(self, shard: int) -> range:
        """The rows of a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

    def name(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}"

    # Reading

    def files(self, shard: int) -> Path:
        """The folder of a shard's files, which are what was recorded: they are hashed when first asked for.

        Raises:
            UserError: the shard is not there, or is not what was written.
        """
        if shard not in self._whole:
            self.check(shard)
            self._whole.add(shard)
        return self.name(shard)

    def check(self, shard: int) -> None:
        """As :meth:`described`, and its files are hashed."""
        for file, digest in self.described(shard).items():
            if files.sha256(self.name(shard) / file) != digest:
                raise UserError(
                    f"{self.name(shard) / file} is not what was written: it is damaged or was changed; "
                    f"{self.again(shard)}"
                )

    def again(self, shard: int) -> str:
        """What to do about a shard that is damaged."""
        return f"remove {self.name(shard)}.json and run the command that writes {self.folder} again"

    def described(self, shard: int) -> dict[str, str]:
        """The files of a shard and their recorded SHA-256; no file of theirs is read.

        Raises:
            UserError: the shard is not finished, its record is damaged, or its files are others.
        """
        name = self.name(shard)
        record = name.with_suffix(".json")
        if not record.exists():
            raise UserError(f"{name} is not finished; run the command that writes {self.folder} again")
        again = self.again(shard)
        try:
            found = files.read_json(record, RECORD, "record of a shard")
        except UserError as error:
            raise UserError(f"{error}; {again}") from None
        if found["manifest"] != self.digest:
            raise UserError(
                f"{record} belongs to another {MANIFEST} than that of {self.folder}: one of both was changed, or comes "
                "from elsewhere; write all of it again, to another folder"
            )
        if found["rows"] != len(self.numbers(shard)):
            raise UserError(f"{record} has another number of rows than {MANIFEST} gives the shard; {again}")
        with told(name):
            there = sorted(os.listdir(name)) if name.is_dir() else []
            if there != sorted(found["files"]):
                raise UserError(
                    f"{name} holds {', '.join(there) or 'nothing'} and not {', '.join(found['files'])}; {again}"
                )
        return found["files"]

    def whole(self, shard: int) -> bool:
        with contextlib.suppress(UserError):
            self.files(shard)
            return True
        return False

    def finished(self) -> list[int]:
        """Shards that have a record, by whoever; no file of theirs is read."""
        return [shard for shard in range(self.count) if self.name(shard).with_suffix(".json").exists()]

    def all_files(self) -> Iterator[Path]:
        """Of each shard in turn, as :meth:`files`; what is not finished is told before the first."""
        for shard in sorted({*range(self.count)}.difference(self.finished())):
            self.check(shard)
        return (self.files(shard) for shard in range(self.count))

    # Writing

    def beside(self, name: str, content: bytes) -> None:
        """Write a file beside the shards, of a content that depends on the manifest alone.

        Raises:
            UserError: it cannot be written.
        """
        partial = self.folder / f"{name}.partial-{secrets.token_hex(8)}"
        with told(self.folder / name):
            try:
                partial.write_bytes(content)
                sync(partial)
                with contextlib.suppress(FileNotFoundError):  # swept by one that has finished, and has written it too
                    partial.replace(self.folder / name)
            finally:
                partial.unlink(missing_ok=True)

    def fill(self, make: Make, part: tuple[int, int] | None = None) -> None:
        """Make what is missing, a free shard at a time, and wait for those that others make, until all are there.

        Args:
            make: see :data:`Make`.
            part: (i, n): only the shards i, i + n, ..., and wait for no others.

        Raises:
            UserError: a shard cannot be written.
        """
        first, step = part or (0, 1)
        left = list(range(first, self.count, step))
        waiting = False
        while left := [shard for shard in left if not self.whole(shard)]:
            made = [self.make_one(shard, make) for shard in left]
            if not any(made):
                if not waiting:
                    waiting = True
                    print(f"hgkd: {self.folder}: waiting for shards that others make", file=sys.stderr, flush=True)
                time.sleep(min(1.0, self._claims[0].expires / 10))
        if len(self.finished()) == self.count:
            self.sweep()

    def make_one(self, shard: int, make: Make) -> bool:
        """Whether the shard is whole now; not, where another process is making it."""
        claim, name = self._claims[shard], self.name(shard)
        if not claim.take():
            return False
        partial = name.with_name(f"{name.name}.partial-{claim.token}")
        try:
            with claim.kept_alive(), told(name):
                if self.whole(shard):  # by another one, since it was looked at
                    return True
                self.remove_partial(name.name)
                (partial / "files").mkdir(parents=True)
                rows = make(shard, partial / "files")
                if rows != len(self.numbers(shard)):
                    raise UserError(f"{name} would have {rows} rows and not {len(self.numbers(shard))}")
                record = {"manifest": self.digest, "rows": rows, "files": hashed(partial / "files")}
                files.write_json(partial / "record.json", record)
                if not claim.held():
                    return False
                if name.exists():
                    name.rename(partial / "old")
                (partial / "files").rename(name)
                (partial / "record.json").replace(name.with_suffix(".json"))
                sync(self.folder)
            self._whole.add(shard)
            return True
        except Exception:
            if claim.held():
                raise
            return False  # it was taken for dead, and its files were removed
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            claim.release()

    def remove_partial(self, stem: str) -> None:
        for old in self.folder.glob(f"{stem}.partial-*"):
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)

    def sweep(self) -> None:
        """What killed processes have left beside shards that are finished."""
        for claim in self._claims:
            claim.file.unlink(missing_ok=True)
        self.remove_partial("*")


def text_of(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """The values that are expected and not found, with both; single values before tables of hashes."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in sorted(expected.items(), key=lambda item: isinstance(item[1], dict)):
            yield from differences(found.get(key), value, f"{where}.{key}" if where else key)
    elif found != expected:
        shown = [json.dumps(one, sort_keys=True) for one in (found, expected)]
        yield f"{where} ({shown[0][:80]}, now {shown[1][:80]})"


def link(source: Path, target: Path) -> None:
    """Give a file its name unless that is taken; where there are no hard links, whoever comes last wins."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        source.replace(target)


def hashed(folder: Path) -> dict[str, str]:
    """SHA-256 of each file, all of which are on the disk then."""
    found = {}
    for file in sorted(folder.iterdir()):
        sync(file)
        found[file.name] = files.sha256(file)
    sync(folder)
    return found


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
