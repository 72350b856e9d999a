"""Which tokens of a translation are right: labels from the alignment of TER, as Wang et al. 2020 take them (ACL, "On
the Inference Calibration of NMT", section 3; their published scripts). The alignment is sacreBLEU's."""

from __future__ import annotations

from collections.abc import Sequence

# translation_edit_rate() tells the number of edits only; these are the parts that it is made of.
from sacrebleu.metrics.lib_ter import _MAX_SHIFT_CANDIDATES, BeamEditDistance, _shift

MATCH, MISSING, EXTRA = " ", "i", "d"  # in a trace; what is left is a substitution


class _Placed(str):
    """A token that remembers its place while TER shifts it about."""

    place: int


def alignment(hypothesis: Sequence[str], reference: Sequence[str]) -> tuple[list[int], str, int]:
    """TER's alignment: shifts of the hypothesis as long as they save edits, then the least edits.

    Returns:
        The places (0-based, in the hypothesis) of the tokens in shifted order; the trace, one character an edit in that
        order: MATCH, "s" for a substitution, MISSING for a reference token without a counterpart (TER's deletion),
        EXTRA for a hypothesis token without one (its insertion); the number of shifts.
    """
    words: list[str] = []
    for place, token in enumerate(hypothesis):
        words.append(_Placed(token))
        words[-1].place = place  # type: ignore[attr-defined]
    distance = BeamEditDistance(list(reference))
    shifts = checked = 0
    while True:
        saved, shifted, checked = _shift(words, list(reference), distance, checked)
        if checked >= _MAX_SHIFT_CANDIDATES or saved <= 0:
            break
        words = shifted
        shifts += 1
    _, trace = distance(words)
    return [word.place for word in words], trace, shifts  # type: ignore[attr-defined]


def ter_labels(hypothesis: Sequence[str], reference: Sequence[str], deletion_rule: bool = True) -> list[bool]:
    """Whether each token of the hypothesis, and then its end of sentence, is right.

    A token is right where TER's alignment matches it with the reference, in place or after a shift. The end of sentence
    stands behind both sides, where it always matches.

    Args:
        hypothesis: n tokens.
        reference: m tokens, of the same segmentation.
        deletion_rule: the published rule: the token right after a deletion (in the alignment, so after the shifts) is
            wrong even where it matches. With it an end of sentence that comes too early is wrong; without it, it never
            is.

    Returns:
        n + 1 booleans.
    """
    places, trace, _ = alignment(hypothesis, reference)
    labels = [False] * (len(hypothesis) + 1)
    aligned = iter([*places, len(hypothesis)])
    missing = False
    for edit in trace + MATCH:
        if edit != MISSING:
            labels[next(aligned)] = edit == MATCH and not (missing and deletion_rule)
        missing = edit == MISSING
    return labels
