"""The exception for errors that the user can fix, and the handling of all exceptions at the end of a command."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable


def printable(text: str) -> str:
    """Return the text with all unprintable characters escaped, so that it fits on one line. Names and texts from files
    may contain control sequences, which would for example move the terminal's cursor, or lone surrogates."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def flag(name: str) -> str:
    """Return the command line option of a field: ``--gate-share`` for "gate_share"."""
    return "--" + name.replace("_", "-")


class UserError(ValueError):
    """An error that the user can fix. Its message says in one line which option or file is wrong and how to fix it."""

    def __str__(self) -> str:
        return printable(super().__str__())


def in_one_line(error: BaseException) -> UserError:
    """Convert an exception to a UserError that names the file of an OSError or the type of an unexpected exception."""
    return foreseen(error) or UserError(f"unforeseen {type(error).__name__}: {str(error)[:300]}; --debug shows where")


def foreseen(error: BaseException) -> UserError | None:
    """Convert a UserError, an OSError or a lack of memory to a UserError; return None for any other exception."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return UserError("standard output was closed before everything was written")
    memory = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if memory or "allocate memory" in str(error) or "out of memory" in str(error):
        return UserError("not enough memory; give smaller batches (--max-tokens), or use another machine")
    if isinstance(error, OSError):
        where = "standard output or a file" if error.filename is None else error.filename
        return UserError(f"{where}: {error.strerror or error}")
    return None


def guarded(begin: str, run: Callable[[], int], debug: bool = False) -> int:
    """Run a command and return its exit status. An exception becomes one line on standard error.

    Characters that standard output cannot encode are escaped.

    Args:
        begin: prefix of the error line.
        run: the command; returns the exit status.
        debug: whether to print the traceback before the error line.

    Returns: the result of `run`, 1 after an exception, or 130 after KeyboardInterrupt.

    Raises:
        SystemExit: raised by `run`.
    """
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = run()
        except SystemExit:  # of argparse, or on SIGTERM
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(OSError):  # standard error may be closed
            print(f"{begin}: {'interrupted' if interrupted else in_one_line(error)}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:  # Python flushes again at exit, which would fail again
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGINT if interrupted else 1
