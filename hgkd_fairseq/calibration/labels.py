"""Labels that say which tokens of a translation are right, from the TER alignment with the reference, as in Wang et al.
2020 (ACL, "On the Inference Calibration of NMT", section 3) and their published scripts. The alignment is sacreBLEU's.
"""

from __future__ import annotations

from collections.abc import Sequence

# translation_edit_rate() returns only the number of edits, so the functions that it is made of are used directly.
from sacrebleu.metrics.lib_ter import _MAX_SHIFT_CANDIDATES, BeamEditDistance, _shift

MATCH, MISSING, EXTRA = " ", "i", "d"  # operations of a trace; the remaining one, "s", is a substitution


class _Placed(str):
    """A token with its position in the hypothesis, which stays the same when TER shifts the token."""

    place: int


def alignment(hypothesis: Sequence[str], reference: Sequence[str]) -> tuple[list[int], str, int]:
    """Align a hypothesis with a reference as TER does: shift parts of the hypothesis as long as that saves edits, then
    compute the edits.

    Args:
        hypothesis: n tokens.
        reference: m tokens.

    Returns:
        The positions (from 0, in the hypothesis) of the n tokens in shifted order.
        The trace, one character per operation, in that order: MATCH, "s" for a substitution, MISSING for a reference
        token without a counterpart (a deletion in TER), EXTRA for a hypothesis token without one (an insertion in TER).
        The number of shifts.
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
    """Return whether each token of a hypothesis, and its end of sentence, is right.

    A token is right if the TER alignment matches it with an equal token of the reference, in place or after a shift.
    The end of sentence is appended to both sides after the alignment, so that it always matches.

    Args:
        hypothesis: n tokens.
        reference: m tokens in the same segmentation.
        deletion_rule: whether to apply the published rule that a token directly after a deletion (in the alignment,
            that is after the shifts) is wrong even if it matches. With the rule, an end of sentence that comes too
            early is wrong; without it, an end of sentence is always right.

    Returns:
        n + 1 booleans, in the order of the hypothesis; the last one is that of the end of sentence.
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
