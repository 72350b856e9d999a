"""Helpers for drawing with matplotlib, which is an optional dependency."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hgkd_fairseq.errors import UserError, printable


def figure_class():
    """Return matplotlib's class Figure.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("diagrams need matplotlib: pip install 'hgkd-fairseq[report]'") from None
    return Figure


def legend(place, handles: Sequence[Any], labels: Sequence[str], **options: Any) -> None:
    """Add a legend whose labels are shown literally: matplotlib would render text between `$` as mathematics and leave
    out labels that begin with `_`.

    Args:
        place: figure or axes.
        handles: plotted artists.
        labels: text for each handle.
        **options: arguments of matplotlib's method `legend`.
    """
    made = place.legend(list(handles), [str(number) for number in range(len(labels))], **options)
    for text, label in zip(made.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(printable(label))
