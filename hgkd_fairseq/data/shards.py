"""A folder of shards that several processes, on one or several machines with a common file system, fill together.

    manifest.json       everything that the content depends on; written once, and compared by each later process
    shard-00000/        files of a shard
    shard-00000.json    record of the shard: number of rows, SHA-256 of the manifest and of each file
    shard-00000.claim   exists while a process makes the shard
    shard-00000.partial-TOKEN/   unfinished files of that process

The content of a shard must depend only on the manifest and the number of the shard. Claims then only save work: if two
processes make the same shard, both write the same files. The finished folder is therefore the same, byte for byte,
whichever processes were killed, and when.
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
MOST = 100_000  # maximum number of shards, whose numbers have five digits
COUNTS = ("rows", "shard_size")
RECORD = {"manifest": str, "rows": files.Within(0), "files": {str: str}}

Make = Callable[[int, Path], int]
"""Writes the files of shard `number` to an empty folder; the rows in them."""


class Shards:
    """Shards of `shard_size` rows each; the last one may have fewer.

    A row is a unit such as a sentence, which may be several lines of a file, or none. Use :meth:`create` or
    :meth:`open`, which validate the folder.

    Args:
        folder: path of the folder.
        manifest: manifest, with "rows" and "shard_size".
        expires: seconds without a refresh after which a claim may be taken over.

    Attributes:
        rows: total number of rows.
        shard_size: number of rows per shard.
        count: number of shards.
        digest: SHA-256 of the manifest.

    Raises:
        UserError: there are more than MOST shards.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], expires: float = EXPIRES):
        self.folder, self.manifest = Path(folder), manifest
        self.rows, self.shard_size = (manifest[name] for name in COUNTS)
        self.count = -(-self.rows // self.shard_size)
        if self.count > MOST:
            raise UserError(f"{folder} would have {self.count:,} shards, more than {MOST:,}; make them larger")
        self.digest = hashlib.sha256(text_of(manifest).encode()).hexdigest()
        self._whole: set[int] = set()  # shards whose files have been hashed and match their record
        self._claims = [Claim(self.name(shard).with_suffix(".claim"), expires) for shard in range(self.count)]

    @classmethod
    def create(
        cls, folder: str | Path, manifest: dict[str, Any], rows: int, shard_size: int, expires: float = EXPIRES
    ) -> Shards:
        """Create a folder of shards, or open one with the same manifest in order to continue it.

        Args:
            folder: path of the folder; its parent must exist.
            manifest: everything that the content depends on, as JSON values.
            rows: total number of rows.
            shard_size: number of rows per shard.
            expires: seconds without a refresh after which a claim may be taken over.

        Raises:
            UserError: the folder cannot be made or has other content, there are more than MOST shards, or the folder
                has another manifest; the message names the values that differ.
        """
        if not str(folder):
            raise UserError("--output is empty; name a folder")
        folder, wanted = Path(folder), {**manifest, "rows": rows, "shard_size": shard_size}
        wanted = json.loads(text_of(wanted))
        cls(folder, wanted)  # raises an error for too many shards before the folder is made
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{folder} is no folder; name another one")
        with told(folder):
            folder.mkdir(exist_ok=True)
            names = {one.name for one in folder.iterdir() if not one.name.startswith("manifest.partial-")}
            if MANIFEST not in names and not (folder / MANIFEST).exists():  # another process may just have linked it
                if names:
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
        """Open an existing folder of shards.

        Args:
            folder: folder that :meth:`create` has made.
            expected: values that the manifest must have; nested tables are compared key by key, and other keys of the
                manifest are ignored. None: any manifest.
            expires: seconds without a refresh after which a claim may be taken over.

        Raises:
            UserError: the manifest is missing or not valid, or it differs from `expected`.
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
        """Return the numbers of the rows in a shard."""
        return range(shard * self.shard_size, min((shard + 1) * self.shard_size, self.rows))

    def name(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}"

    # Reading

    def files(self, shard: int) -> Path:
        """Return the folder of a shard's files, after verifying that they match its record.

        They are hashed in the first call for a shard only.

        Raises:
            UserError: the shard is not finished, or differs from its record.
        """
        if shard not in self._whole:
            self.check(shard)
            self._whole.add(shard)
        return self.name(shard)

    def check(self, shard: int) -> None:
        """Verify that the files of a shard match the SHA-256 in its record.

        Raises:
            UserError: the shard is not finished, or differs from its record.
        """
        for file, digest in self.described(shard).items():
            if files.sha256(self.name(shard) / file) != digest:
                raise UserError(
                    f"{self.name(shard) / file} is not what was written: it is damaged or was changed; "
                    f"{self.again(shard)}"
                )

    def again(self, shard: int) -> str:
        """Return the part of an error message that says how to repair a damaged shard."""
        return f"remove {self.name(shard)}.json and run the command that writes {self.folder} again"

    def described(self, shard: int) -> dict[str, str]:
        """Return the recorded SHA-256 of each file of a shard, by file name; the files themselves are not read.

        Raises:
            UserError: the shard is not finished, its record is damaged or belongs to another manifest, or the names of
                its files differ from the record.
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
        with contextlib.suppress(UserError, FileNotFoundError):  # another process may be replacing damaged files
            self.files(shard)
            return True
        return False

    def finished(self) -> list[int]:
        """Return the numbers of the shards that have a record, of whichever process; their files are not read."""
        return [shard for shard in range(self.count) if self.name(shard).with_suffix(".json").exists()]

    def all_files(self) -> Iterator[Path]:
        """Return an iterator over the folders of all shards in order, each verified as in :meth:`files`.

        Raises:
            UserError: a shard is not finished (raised by the call itself), or differs from its record (raised by the
                iterator).
        """
        for shard in sorted({*range(self.count)}.difference(self.finished())):
            self.check(shard)
        return (self.files(shard) for shard in range(self.count))

    # Writing

    def beside(self, name: str, content: bytes) -> None:
        """Write a file to the folder itself, with content that depends only on the manifest.

        Args:
            name: name of the file.
            content: content of the file.

        Raises:
            UserError: the file cannot be written.
        """
        partial = self.folder / f"{name}.partial-{secrets.token_hex(8)}"
        with told(self.folder / name):
            try:
                partial.write_bytes(content)
                with contextlib.suppress(FileNotFoundError):  # removed by `sweep` of a process that has written it
                    sync(partial)
                    partial.replace(self.folder / name)
            finally:
                partial.unlink(missing_ok=True)

    def fill(self, make: Make, part: tuple[int, int] | None = None) -> None:
        """Make all missing shards that no other process claims, and wait for the claimed ones, until all are finished.

        Args:
            make: function that writes the files of a shard, given its number, to an empty folder, and returns the
                number of rows in them.
            part: (i, n), to make and wait for only the shards i, i + n, ...

        Raises:
            UserError: a shard cannot be written, or `make` returns a wrong number of rows.
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
        """Make a shard unless another process claims it; return whether it is finished now."""
        claim, name = self._claims[shard], self.name(shard)
        if not claim.take():
            return False
        partial = name.with_name(f"{name.name}.partial-{claim.token}")
        try:
            with claim.kept_alive(), told(name):
                if self.whole(shard):  # another process has finished it in the meantime
                    return True
                if claim.previous:  # only that one: another process may have taken the claim over since
                    self.remove_partial(f"{name.name}.partial-{claim.previous}")
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
            return False  # another process has taken the claim over, and removed the partial files
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            claim.release()

    def remove_partial(self, name: str | None = None) -> None:
        """Remove the partial files of this name, or all of them. A name that leads elsewhere removes nothing."""
        for old in self.folder.glob("*.partial-*"):
            if name not in (None, old.name):
                continue
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Remove claims and partial files that killed processes have left, once all shards are finished."""
        for claim in self._claims:
            claim.file.unlink(missing_ok=True)
        self.remove_partial()


def text_of(manifest: dict[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"


def differences(found: Any, expected: Any, where: str = "") -> Iterator[str]:
    """Yield a description of each value of `expected` that `found` does not have, with both values.

    At each level, single values come before nested tables, which usually are hashes.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        for key, value in sorted(expected.items(), key=lambda item: isinstance(item[1], dict)):
            yield from differences(found.get(key), value, f"{where}.{key}" if where else key)
    elif found != expected:
        shown = [json.dumps(one, sort_keys=True) for one in (found, expected)]
        yield f"{where} ({shown[0][:80]}, now {shown[1][:80]})"


def link(source: Path, target: Path) -> None:
    """Hard-link a file to a name, or rename it if the file system has no hard links.

    Raises:
        FileExistsError: the name exists; a rename replaces it instead.
    """
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:
        source.replace(target)


def hashed(folder: Path) -> dict[str, str]:
    """Synchronise a folder and its files to disk, and return the SHA-256 of each file by its name."""
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
