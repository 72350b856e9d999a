"""The one exception for input that the user can fix, and how a command ends that meets it, or anything else."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable


def printable(text: str) -> str:
    """The text on one line, with control characters and what is no character escaped: a name from a file may hold what
    would move the terminal's cursor, or what it cannot show."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def flag(name: str) -> str:
    """The option of a field: gate_share is --gate-share."""
    return "--" + name.replace("_", "-")


class UserError(ValueError):
    """Says in one line which option or file is wrong and how to fix it; shown without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())


def in_one_line(error: BaseException) -> UserError:
    """What a command did not foresee, for its user: which file, and what happened to it."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, BrokenPipeError) and error.filename is None:
        return UserError("standard output was closed before everything was written")
    if isinstance(error, OSError):
        where = "standard output or a file" if error.filename is None else error.filename
        return UserError(f"{where}: {error.strerror or error}")
    if isinstance(error, MemoryError) or "allocate memory" in str(error) or "out of memory" in str(error):
        return UserError("not enough memory; give smaller batches (--max-tokens), or use another machine")
    return UserError(f"unforeseen {type(error).__name__}: {str(error)[:300]}; --debug shows where")


def guarded(begin: str, run: Callable[[], int], debug: bool = False) -> int:
    """The exit status of a command: what `run` gives, or 1 (130 where it was interrupted) after one line on standard
    error that begins with `begin`, and with `debug` the traceback before it. What standard output cannot show is
    escaped."""
    try:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            status = run()
        except SystemExit:  # argparse's
            sys.stdout.flush()
            raise
        sys.stdout.flush()
        return status
    except (Exception, KeyboardInterrupt) as error:
        if debug:
            traceback.print_exc()
        interrupted = isinstance(error, KeyboardInterrupt)
        with contextlib.suppress(OSError):  # nobody may read it
            print(f"{begin}: {'interrupted' if interrupted else in_one_line(error)}", file=sys.stderr, flush=True)
        try:
            sys.stdout.flush()
        except OSError:  # Python would try again, and fail, when it ends
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGINT if interrupted else 1
