"""The one exception for input that the user can fix."""


class UserError(ValueError):
    """Says in one line which option or file is wrong and how to fix it; shown without a traceback.

    Names out of files go into these messages, so nothing that is not printable reaches a terminal: it is escaped.
    """

    def __str__(self):
        return printable(super().__str__())


def printable(text: str) -> str:
    """The text with control characters, line separators and lone surrogates escaped as Python writes them."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
