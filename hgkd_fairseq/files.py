"""File access: atomic writing, reading of text line by line, and JSON that is checked against a schema."""

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

LARGEST = 2**63 - 1  # largest integer that is accepted in a file, the maximum of int64


# Writing


class _Raw(io.FileIO):
    """A raw file that keeps the error of a failed write: the layers above, such as torch's zip writer, may drop it."""

    failed: OSError | None = None

    def write(self, data):
        try:
            return super().write(data)
        except OSError as error:
            self.failed = error
            raise


@contextlib.contextmanager
def _errors(file: str | Path, what: str, hint: str = "") -> Iterator[None]:
    """Convert an OSError, a ValueError or an encoding error in the context to a UserError that names `file`."""
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{file} is no text in UTF-8{hint}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in a name
        raise UserError(f"{file} {what}: {getattr(error, 'strerror', None) or error}{hint}") from error


def _place(file: Path) -> Path | None:
    """Return the path of the regular file to create or replace, after following links. None means that `file` is a
    pipe, a device or an open stream, which must be written directly."""
    for _ in range(40):  # the number of links that Linux follows
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
    """Return the umask, from /proc if possible: os.umask reads it by changing it, for a moment, in all threads."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    found = os.umask(0o077)
    os.umask(found)
    return found


def check_output(file: str | Path) -> None:
    """Check that `file` can be written. Commands call this before the work that makes its content.

    Raises:
        UserError: the name is empty or that of a folder, the parent folder does not exist, or the file or its parent
            folder is not writable.
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
    """Return whether two names refer to the same file or folder, also through links. If one of them does not exist,
    their resolved paths are compared."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        return os.path.realpath(first) == os.path.realpath(second)


@contextlib.contextmanager
def writing(file: str | Path, mode: str = "w", alone: bool = False) -> Iterator[Any]:
    """Write a file atomically, as a context manager: `file` is created or replaced when the context ends without an
    error.

    The content goes to a temporary file in the same folder, which is flushed to disk and renamed. It keeps the
    permissions of the file that it replaces; a new file has those that open() would give. After an error, an existing
    file is unchanged. If `file` is a link, its target is written. Pipes, devices and open streams (/dev/null,
    /dev/stdout) are written directly.

    Args:
        file: file to write.
        mode: "w" for text in UTF-8, where characters that cannot be encoded are escaped; "wb" for bytes.
        alone: no other process writes `file` at the same time. The temporary file is then `file`.tmp, so that the next
            process overwrites the one that a killed process has left. Meant for large files.

    Yields: a stream.

    Raises:
        UserError: `file` cannot be written; the message says why.
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
            with contextlib.suppress(OSError):  # a failed flush has been reported already
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
    """Create a temporary file in the folder of `place`. Return its descriptor and its name."""
    if not alone:
        return tempfile.mkstemp(prefix=".hgkd-", dir=place.parent)
    name = f"{place}.tmp"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name)
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), name


def _descriptor(file: Path) -> int:
    """Return a new descriptor of a pipe, a device or an open stream. For this process's standard output or error, it is
    a duplicate: if that is redirected to a file, opening the file again would overwrite what has been printed."""
    try:
        seen = os.stat(file)
    except FileNotFoundError:  # a socket, whose name in /proc is "socket:[...]"
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
    """Create a folder atomically, as a context manager: `folder` appears when the context ends without an error.
    Unfinished folders of killed processes are removed.

    Yields: a temporary folder to fill, which becomes `folder`.

    Raises:
        UserError: `folder` exists or cannot be created, or the context raised an OSError that names no other file.
    """
    folder = Path(folder)
    if not str(folder) or os.path.lexists(folder):
        raise UserError(f"{folder} exists; name another folder, or remove it")
    check_output(folder)
    prefix = f".hgkd-{folder.name[:100]}-"
    with _errors(folder, "cannot be made"):
        for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
            _remove_left(left)
        while (made := _locked_folder(prefix, folder.parent)) is None:
            pass
        temporary, descriptor = made
    try:
        yield temporary
        with _errors(folder, "cannot be made"):
            os.chmod(temporary, 0o777 & ~_umask())
            os.rename(temporary, folder)
    except OSError as error:
        name = error.filename
        if name is not None and not str(name).startswith(str(temporary)):  # a file that was read
            raise
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(descriptor)


def _locked_folder(prefix: str, parent: Path) -> tuple[Path, int] | None:
    """Create and lock a temporary folder. Return it and its descriptor; None if another process has taken it for an
    unfinished one, and removed it, before it was locked."""
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        descriptor = _open_folder(temporary)
    except FileNotFoundError:
        return None
    with contextlib.suppress(OSError):  # a file system without locks
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # waits while another process removes it
    if temporary.exists():
        return temporary, descriptor
    os.close(descriptor)
    return None


def _open_folder(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def _remove_left(folder: Path) -> None:
    """Remove an unfinished folder, unless a process or a child that it forked holds its lock, or locking fails."""
    with contextlib.suppress(OSError):
        descriptor = _open_folder(folder)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def write_text(file: str | Path, text: str) -> None:
    """Write text to a file atomically; see :func:`writing`."""
    with writing(file) as stream:
        stream.write(text)


def write_json(file: str | Path, content: Any) -> None:
    """Write a JSON file atomically; see :func:`writing`.

    Raises:
        UserError: the file cannot be written, or `content` has NaN or an infinity, which JSON does not support.
    """
    try:
        text = json.dumps(content, indent=1, allow_nan=False)
    except ValueError:
        raise UserError(f"{file} is not written: a number in it is NaN or infinite, which JSON does not have") from None
    write_text(file, text + "\n")


def copy(source: str | Path, target: str | Path) -> None:
    """Copy a file atomically, where no other process writes `target` at the same time.

    Raises:
        OSError: `source` cannot be opened.
        UserError: `target` cannot be written.
    """
    with open(source, "rb") as content, writing(target, "wb", alone=True) as output:
        shutil.copyfileobj(content, output)


def identity(file: str | Path) -> tuple[int, ...] | None:
    """Return what changes if a file is replaced or written again: device, inode, size and time of modification (ns).
    None if there is no such file."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def size_of(folder: str | Path, ending: str = "") -> int:
    """Return the total size, in bytes, of the files in a folder and its subfolders whose names have this ending. Other
    processes may add and remove files meanwhile."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            if name.endswith(ending):
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(place, name)).st_size
    return total


def sha256(file: str | Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal digits.

    Raises:
        OSError: the file cannot be read, or is not a regular file; see :func:`check_regular`.
    """
    check_regular(file)
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_regular(file: str | Path) -> None:
    """Check that a file is a regular file. Meant for files that were found in a folder and not named by the user:
    reading a pipe, or a link to a device, may never end.

    Raises:
        OSError: the file does not exist, or is not a regular file.
    """
    mode = os.stat(file).st_mode
    if not stat.S_ISREG(mode):
        what = "it is a folder" if stat.S_ISDIR(mode) else "it is no regular file"
        raise OSError(errno.EINVAL, what, str(file))


def appending(file: str | Path) -> IO[str]:
    """Open a log file in UTF-8 for appending, and create it if it is missing. Links are refused, so that no file
    outside of the folder is modified.

    Raises:
        OSError: the file is a link or not a regular file, or cannot be written.
    """
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        descriptor = os.open(file, flags, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe without a reader
            raise OSError(error.errno, "it is a link or a pipe, and not written to; remove it", str(file)) from None
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file; remove it", str(file))
    return open(descriptor, "a", encoding="utf-8")


def figure_format(option: str, file: str | Path) -> str:
    """Return the format of a figure, "png" or "svg", from the suffix of its file name.

    Args:
        option: name of the option with the file name, for the error message.
        file: file name.

    Raises:
        UserError: the file name has another suffix.
    """
    suffix = Path(file).suffix.removeprefix(".").lower()
    if suffix not in ("png", "svg"):
        raise UserError(f"{option} {file}: name a file that ends in .png or .svg")
    return suffix


def write_figure(figure: Any, file: str | Path) -> None:
    """Write a figure of matplotlib atomically (:func:`writing`), in the format of the file name's suffix. The same
    figure always gives the same bytes.

    Raises:
        UserError: the suffix is not .png or .svg, or the file cannot be written.
    """
    import matplotlib

    suffix = figure_format("figure", file)
    salt = matplotlib.rcParams["svg.hashsalt"] or "hgkd"
    with writing(file, "wb") as stream, matplotlib.rc_context({"svg.hashsalt": salt}):
        figure.savefig(stream, format=suffix, dpi=160, metadata={"Date": None} if suffix == "svg" else None)


# Reading


def read_lines(file: str | Path, hint: str = "name a text file in UTF-8") -> Iterator[str]:
    """Yield the lines of a text file in UTF-8 without their line ends, `\\n` or `\\r\\n`. No other character ends a
    line: a lone carriage return, a form feed or U+2028 is part of it, so that parallel files stay aligned.

    Args:
        file: file to read.
        hint: remedy for the error message.

    Raises:
        UserError: the file is missing, is a folder, cannot be read or is not UTF-8.
    """
    with _reading(file, hint), open(file, encoding="utf-8", newline="\n") as stream:
        for line in stream:
            yield line.removesuffix("\n").removesuffix("\r") if line.endswith("\n") else line


def read_text(file: str | Path, hint: str = "name a text file in UTF-8") -> str:
    """Return the content of a text file in UTF-8. Arguments and errors are those of :func:`read_lines`."""
    with _reading(file, hint), open(file, encoding="utf-8", newline="\n") as stream:
        return stream.read()


def refuse_irregular(file: str | Path, hint: str) -> None:
    """Check that a file is a regular file, as :func:`check_regular` does.

    Args:
        file: file to check.
        hint: remedy for the error message.

    Raises:
        UserError: the file does not exist, or is not a regular file.
    """
    with _reading(file, hint):
        check_regular(file)


def read_found(file: str | Path, hint: str) -> str:
    """Return the content of a text file in UTF-8 that must be a regular file (:func:`check_regular`). Arguments and
    errors are those of :func:`read_lines`."""
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
    """Return the content of a JSON file after checking it against a schema.

    Args:
        file: file to read.
        schema: see :func:`mismatch`.
        what: description of the expected file for the error message, without an article.

    Raises:
        UserError: the file cannot be read, is not valid JSON (for example truncated), or does not fit the schema.
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
    """Compare a value from JSON or TOML with a schema.

    A schema is one of
        str, bool, dict, list: a value of this type;
        int: an integer of at most 64 bits; float: such an integer, or a finite float;
        object: any value; None: null;
        (A, B): a value that fits one of several schemas;
        [A]: a list of values that fit A;
        {"key": A, "other?": B}: a table with these keys; those with ? are optional, and other keys are allowed;
        {str: A}: a table with any keys, whose values fit A;
        a function that returns None for a value that fits, and otherwise a description of the error.

    Args:
        value: the value to check.
        schema: its schema.
        where: name of the value for the description; "it" if empty.

    Returns: None if the value fits, otherwise a description of the first difference and where it is.
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
    if kind is str:  # JSON can escape lone surrogates, which UTF-8 cannot encode
        return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)
    return isinstance(value, kind)


class Within:
    """A schema (:func:`mismatch`) of numbers from `low` to `high`, inclusive; integers only, unless `kind` is float."""

    def __init__(self, low: float, high: float = LARGEST, kind: type = int):
        self.low, self.high, self.kind = low, high, kind

    def __call__(self, value: Any) -> str | None:
        if not _is(value, self.kind):
            return f"is not {NAMES[self.kind]}"
        return None if self.low <= value <= self.high else f"is not from {self.low} to {self.high}"
