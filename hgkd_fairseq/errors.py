"""The one exception for input that the user can fix."""


def printable(text: str) -> str:
    """The text on one line, with control characters and what is no character escaped: a name from a file may hold what
    would move the terminal's cursor, or what it cannot show."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


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
