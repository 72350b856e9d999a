"""Files: results are written in one step, text is read line by line, JSON is checked before it is believed."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import io
import json
import math
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from hgkd_fairseq.errors import UserError

LARGEST = 2**63 - 1  # of a whole number in a file: what 64 bits hold


# Writing


class _Raw(io.FileIO):
    """Remembers why a write failed: what stands above it (torch's zip writer, say) does not always pass it on."""

    failed: OSError | None = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextlib.contextmanager
def _errors(file: str | Path, what: str, hint: str = "") -> Iterator[None]:
    """An error of the operating system, of a name or of an encoding becomes a UserError that names `file`."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text in UTF-8{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        raise UserError(f"{file} {what}: {getattr(error, 'strerror', None) or error}{hint}") from error


def _place(file: Path) -> Path | None:
    """The name under which a plain file is put or replaced, links followed; None: what is there is no plain file (a
    pipe, a device, a stream that is open already) and is written through."""
    for _ in range(40):  # as many links as Linux follows
        if not file.is_symlink():
            break
        if file.parent.resolve().is_relative_to("/proc"):  # /dev/stdout, /dev/fd/N
            return None
        file = file.parent / os.readlink(file)
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(file).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(None, "it is a folder")
        if not stat.S_ISREG(mode):
            return None
    return file


def _umask() -> int:
    """Of this process. Python can read it only by setting it, which another thread's children would inherit."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    found = os.umask(0o077)
    os.umask(found)
    return found


def check_output(file: str | Path) -> None:
    """Whether `file` can be written, told before the work that makes it.

    Raises:
        UserError: it has no name, is a folder, lies in no folder or in one that may not be written to.
    """
    if not str(file):
        raise UserError("the name of the file to write is empty; give one")
    with _errors(file, "cannot be written"):
        place = _place(Path(file))
        if place is None:
            return
        folder = place.parent
        if not folder.is_dir():
            raise UserError(f"{file} cannot be written: there is no folder {folder}; make it first")
        for path, needed in ((folder, os.W_OK | os.X_OK), (place, os.W_OK)):
            if os.path.lexists(path) and not os.access(path, needed):
                raise UserError(f"{file} cannot be written: {path} may not be written to")


def same_file(first: str | Path, second: str | Path) -> bool:
    """Whether two names are of one file or folder, by whatever links; a file that is not there yet is known by its
    folder and name."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


@contextlib.contextmanager
def writing(file: str | Path, mode: str = "w", alone: bool = False) -> Iterator[Any]:
    """A stream whose content becomes `file` in one step, once the block has ended without an error.

    It goes to a temporary name beside `file`, is flushed to the disk and renamed, with the permissions that a plain
    open() would give; after an error what was under the name before is there still. A link stays a link, to what it
    names. A pipe, a device and a stream that is open already (/dev/null, /dev/stdout) are written to as they are.

    Args:
        file: to write.
        mode: "w": text in UTF-8 (what cannot be encoded, as of names that are no text, is escaped); "wb": bytes.
        alone: nobody else writes it now. Then the temporary name is `file`.tmp, so that what a killed process has left
            is written over by the next one, and does not stay: of large files.

    Raises:
        UserError: names `file`, and why it cannot be written.
    """
    with _errors(file, "cannot be written"):
        check_output(file)
        place = _place(Path(file))
        if place is None:
            temporary, raw = None, _Raw(_descriptor(Path(file)), "w")
        else:
            old = os.stat(place) if place.exists() else None
            descriptor, temporary = _temporary(place, alone)
            raw = _Raw(descriptor, "w")
    try:
        stream: Any = io.BufferedWriter(raw)
        if mode == "w":
            stream = io.TextIOWrapper(stream, encoding="utf-8", errors="backslashreplace", newline="\n")
        try:
            yield stream
            stream.flush()
            if temporary is not None:
                os.fsync(raw.fileno())
                os.fchmod(raw.fileno(), stat.S_IMODE(old.st_mode) if old else 0o666 & ~_umask())
                if old and (old.st_uid, old.st_gid) != (os.geteuid(), os.getegid()):
                    with contextlib.suppress(OSError):
                        os.fchown(raw.fileno(), old.st_uid, old.st_gid)
        finally:
            with contextlib.suppress(OSError):  # what could not be flushed has been told
                stream.close()
            raw.close()
        if temporary is not None:
            os.replace(temporary, place)  # type: ignore[arg-type]
            temporary = None
    except Exception as error:
        failed = raw.failed or (error if isinstance(error, OSError) and error.filename in (None, temporary) else None)
        if failed is None or isinstance(error, UserError):
            raise
        raise UserError(f"{file} cannot be written: {failed.strerror or failed}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _temporary(place: Path, alone: bool) -> tuple[int, str]:
    """A new file beside `place`: its descriptor and name."""
    if not alone:
        return tempfile.mkstemp(prefix=".hgkd-", dir=place.parent)
    name = f"{place}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), name


def _descriptor(file: Path) -> int:
    """Of a pipe or a device. Of our own output it is the one that is open: where that is a file, another opening of it
    would write from its beginning, over what was printed."""
    try:
        seen = os.stat(file)
    except FileNotFoundError:  # a descriptor that /proc calls "socket:[...]"
        seen = None
    for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
        with contextlib.suppress(OSError):
            own = os.fstat(number)
            if seen is not None and os.path.samestat(seen, own) and not stat.S_ISCHR(own.st_mode):
                if stream is not None:
                    stream.flush()
                return os.dup(number)
    return os.open(file, os.O_WRONLY | os.O_TRUNC)


@contextlib.contextmanager
def writing_folder(folder: str | Path) -> Iterator[Path]:
    """A new folder to fill, which becomes `folder` in one step once the block has ended without an error. What killed
    processes have left of it is removed.

    Raises:
        UserError: `folder` exists, or cannot be made.
    """
    folder = Path(folder)
    if not str(folder) or os.path.lexists(folder):
        raise UserError(f"{folder} exists; name another folder, or remove it")
    check_output(folder)
    prefix = f".hgkd-{folder.name[:100]}-"
    with _errors(folder, "cannot be made"):
        for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_left(left)
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
        descriptor = _open_folder(temporary)
        with contextlib.suppress(OSError):  # a file system that knows no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield temporary
        with _errors(folder, "cannot be made"):
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, folder)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _remove_left(folder: Path) -> None:
    """Unless a process holds it, its child does, or the file system knows no locks."""
    with contextlib.suppress(OSError):
        descriptor = _open_folder(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def write_text(file: str | Path, text: str) -> None:
    """As :func:`writing` does."""
    with writing(file) as stream:
        stream.write(text)


def write_json(file: str | Path, content: Any) -> None:
    """As :func:`writing` does.

    Raises:
        UserError: also for NaN and infinities, which JSON does not have.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError:
        raise UserError(f"{file} is not written: a number in it is NaN or infinite, which JSON does not have") from None
    write_text(file, text + "\n")


def sha256(file: str | Path) -> str:
    """Of its content, in hexadecimal digits.

    Raises:
        OSError: it cannot be read, or is no regular file: a pipe in a folder of others has no end.
    """
    check_regular(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_regular(file: str | Path) -> None:
    """Whether a file that was found in a folder, rather than named, ends: a pipe there, or a link to a device, may not.

    Raises:
        OSError: it does not exist, or is no regular file.
    """
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        what = "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file"
        raise OSError(errno.EINVAL, what, str(file))


def appending(file: str | Path) -> IO[str]:
    """A log to go on with, which is this folder's own: what a link names elsewhere is not written to.

    Raises:
        OSError: it is a link or no regular file, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise OSError(error.errno, "it is a link or a pipe, and not written to; remove it", str(file)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file; remove it", str(file))
    return open(descriptor, "a", encoding="utf-8")


def figure_format(option: str, file: str | Path) -> str:
    """Of a figure to write: the format that the name ends in, png or svg.

    Raises:
        UserError: names the option whose value ends otherwise.
    """
    suffix = Path(file).suffix.removeprefix(".").lower()
    if suffix not in ("png", "svg"):
        raise UserError(f"{option} {file}: name a file that ends in .png or .svg")
    return suffix


def write_figure(figure: Any, file: str | Path) -> None:
    """A figure of matplotlib, in the format that the name ends in, as :func:`writing` does. The same figure is the same
    file."""
    import matplotlib

    suffix = figure_format("figure", file)
    salt = matplotlib.rcParams["svg.hashsalt"] or "hgkd"
    with writing(file, "wb") as stream, matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(stream, format=suffix, dpi=160, metadata={"Date": None} if suffix == "svg" else None)


# Reading


def read_lines(file: str | Path, hint: str = "name a text file in UTF-8") -> Iterator[str]:
    """The lines of a text in UTF-8, one after another, without their ends, `\\n` or `\\r\\n`. Nothing else ends a line:
    a lone carriage return, a form feed or U+2028 is part of it, so that two files of sentences stay aligned.

    Args:
        file: to read.
        hint: what to do where it cannot be read, for the message.

    Raises:
        UserError: names the file, which is missing, a folder, not to be read or no text.
    """
    with _reading(file, hint), open(file, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def read_text(file: str | Path, hint: str = "name a text file in UTF-8") -> str:
    """A whole text in UTF-8; arguments and errors as of :func:`read_lines`."""
    with _reading(file, hint), open(file, encoding="utf-8", newline="\n") as stream:
        return stream.read()


def refuse_irregular(file: str | Path, hint: str) -> None:
    """What :func:`check_regular` raises, as a UserError; arguments as of :func:`read_lines`."""
    with _reading(file, hint):
        check_regular(file)


def read_found(file: str | Path, hint: str) -> str:
    """A whole text in UTF-8, of a regular file; arguments and errors as of :func:`read_lines`."""
    refuse_irregular(file, hint)
    return read_text(file, hint)


@contextlib.contextmanager
def _reading(file: str | Path, hint: str) -> Iterator[None]:
    try:
        with _errors(file, "cannot be read", f"; {hint}"):
            yield
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise UserError(f"{file} does not exist; {hint}") from None
        raise


def read_json(file: str | Path, schema: Any = object, what: str = "file of JSON") -> Any:
    """The content of a file of JSON that fits `schema` (:func:`mismatch`).

    Args:
        file: to read.
        schema: of :func:`mismatch`.
        what: the file should be, for the message, without an article.

    Raises:
        UserError: names the file, which cannot be read, is no JSON (cut short, say) or holds something else.
    """
    text = read_found(file, f"name a {what}")
    try:
        content = json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise UserError(f"{file} is no {what}: it is nested too deep") from None
    except ValueError as error:
        raise UserError(f"{file} is no {what}: it is no JSON, or cut short ({error})") from None
    found = mismatch(content, schema)
    if found:
        raise UserError(f"{file} is no {what}: {found}")
    return content


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


NAMES: dict[type | None, str] = {
    str: "text", int: "a whole number", float: "a number", bool: "true or false", dict: "a table", list: "a list",
    None: "null",
}  # fmt: skip


def mismatch(value: Any, schema: Any, where: str = "") -> str | None:
    """Where and how a value of JSON or TOML differs from what a schema allows; None where it fits.

    A schema is
        str, bool, dict, list; int: of 64 bits; float: any finite number;
        object: anything; None: null;
        (A, B): one of several;
        [A]: a list, each of A;
        {"key": A, "other?": B}: a table with these keys, those with ? where they are there; it may have others;
        {str: A}: a table of any keys;
        a function: called with the value, gives what is wrong with it or None.
    """
    name = where or "it"
    if schema is object:
        return None
    if isinstance(schema, tuple):
        problems = [mismatch(value, one, where) for one in schema]
        return None if None in problems else problems[0]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return f"{name} is not a list"
        return next(filter(None, (mismatch(one, schema[0], f"{where}[{i}]") for i, one in enumerate(value))), None)
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            return f"{name} is not a table"
        if str in schema:
            pairs = [(key, schema[str]) for key in value]
        else:
            pairs = [(key.removesuffix("?"), one) for key, one in schema.items() if key[-1] != "?" or key[:-1] in value]
        for key, one in pairs:
            if key not in value:
                return f"{name} lacks {key!r}"
            found = mismatch(value[key], one, f"{where}.{key}" if where else key)
            if found:
                return found
        return None
    if schema in NAMES:
        fits = value is None if schema is None else _is(value, schema)
        return None if fits else f"{name} is not {NAMES[schema]}"
    problem = schema(value)
    return problem and f"{name} {problem}"


def _is(value: Any, kind: type) -> bool:
    if kind is float:
        return (isinstance(value, float) and math.isfinite(value)) or _is(value, int)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is str:  # half of a surrogate pair, which JSON can escape, is no text: it cannot be written
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, kind)


class Within:
    """A schema: a number from `low` to `high`, a whole one unless `kind` is float."""

    def __init__(self, low: float, high: float = LARGEST, kind: type = int):
        self.low, self.high, self.kind = low, high, kind

    def __call__(self, value: Any) -> str | None:
        if not _is(value, self.kind):
            return f"is not {NAMES[self.kind]}"
        return None if self.low <= value <= self.high else f"is not from {self.low} to {self.high}"
