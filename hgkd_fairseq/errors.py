"""The one exception for input that the user can fix, and how text that comes out of files is shown."""

import re

# Control characters (C0, C1), line and paragraph separators, what turns the direction of writing, halves of a pair.
UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: object) -> str:
    """Text as it may go to a terminal or a page: characters that would steer it or end the line stand as escapes
    (``\\x1b``), and so do those that no encoding has. For names, settings and whatever else a file says."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), str(text))


class UserError(ValueError):
    """Says in one line which option or file is wrong and how to fix it; shown without a traceback."""

    def __str__(self) -> str:
        return printable(super().__str__())
