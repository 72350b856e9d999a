"""Test that control characters in messages are escaped, so that a terminal does not interpret them."""

import pytest

from hgkd_fairseq.errors import UserError, printable


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\x1b[31mred\x07", r"a\x1b[31mred\x07"),
        ("two\nlines\r\x85\u2028", r"two\nlines\r\x85\u2028"),
        ("\u202egnp.exe", r"\u202egnp.exe"),  # a right-to-left override
        ("\udcff.pt", r"\udcff.pt"),  # a file name that is not UTF-8
        ("Köln, 東京 👍", "Köln, 東京 👍"),
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected
    assert str(UserError(text)) == expected
