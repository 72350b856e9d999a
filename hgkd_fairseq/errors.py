"""The one exception for input that the user can fix."""


def printable(text: str) -> str:
    """The text on one line, with control characters and what is no character escaped: a name from a file may hold what
    would move the terminal's cursor, or what it cannot show."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class UserError(ValueError):
    """Says in one line which option or file is wrong and how to fix it; shown without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())
