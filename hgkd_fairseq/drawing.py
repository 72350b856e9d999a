"""What is drawn with matplotlib, where it is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hgkd_fairseq.errors import UserError, printable


def figure_class():
    """matplotlib's Figure. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("diagrams need matplotlib: pip install 'hgkd-fairseq[report]'") from None
    return Figure


def legend(place, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """A legend of a figure or of axes whose texts are shown as they are: matplotlib would take `$` for mathematics and
    leave out what begins with `_`."""
    made = place.legend(list(handles), [str(number) for number in range(len(labels))], **options)
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(label))
