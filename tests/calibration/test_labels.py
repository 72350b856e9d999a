"""Labels of translated tokens, on alignments made by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics.lib_ter import translation_edit_rate

from hgkd_fairseq.calibration.labels import MATCH, alignment, ter_labels

# hypothesis, reference, published labels, labels without the rule about deletions; the last of each is the end of
# sentence.
CASES = {
    "equal": ("a b c", "a b c", "1111", "1111"),
    "substitution": ("a x c", "a b c", "1011", "1011"),
    "insertion": ("a x b", "a b", "1011", "1011"),
    "deletion": ("a c", "a b c", "101", "111"),
    "deletion at the front": ("b c", "a b c", "011", "111"),
    "deletion at the end": ("a b", "a b c", "110", "111"),
    "two deletions": ("a d e", "a b c d e", "1011", "1111"),
    # Of the alignments with equally many edits TER takes the one whose deletions come first: "c" follows none.
    "deletions beside a substitution": ("a x c d", "a b b b c d", "10111", "10111"),
    "nothing is right": ("x y", "a b", "001", "001"),
    # "c" moves behind "b": without shifts it would be an insertion, and a deletion would end the sentence.
    "shift": ("c a b", "a b c", "1111", "1111"),
    "shift of two": ("d e a b c", "a b c d e", "111111", "111111"),
    # "a" moves before "b": one edit less, and one for the shift.
    "shift that saves one edit": ("b a", "a c", "011", "011"),
    # "d e" moves behind "b", then "c" is missing before "d": the first token is wrong though it stands first.
    "shift and deletion": ("d e a b", "a b c d e", "01111", "11111"),
    # The same with an insertion, which no rule is about.
    "shift and insertion": ("d e a b x", "a b d e", "111101", "111101"),
    "repeated token": ("a a b", "a b", "0111", "0111"),
    "empty hypothesis": ("", "a b", "0", "1"),
    "empty reference": ("a b", "", "001", "001"),
    "both empty": ("", "", "1", "1"),
}


@pytest.mark.parametrize(("hypothesis", "reference", "published", "plain"), CASES.values(), ids=CASES)
def test_by_hand(hypothesis: str, reference: str, published: str, plain: str):
    def shown(**options):
        return "".join(str(int(label)) for label in ter_labels(hypothesis.split(), reference.split(), **options))

    assert shown() == published
    assert shown(deletion_rule=False) == plain


def test_places_follow_the_shifts():
    places, trace, shifts = alignment(list("deab"), list("abcde"))
    assert (places, trace, shifts) == ([2, 3, 0, 1], "  i  ", 1)


sentences = st.lists(st.sampled_from("abcdef"), max_size=12)


@settings(deadline=None, max_examples=150)
@given(hypothesis=sentences, reference=sentences)
def test_alignment_is_sacrebleus(hypothesis, reference):
    """As many edits, every token once, and every match a match."""
    places, trace, shifts = alignment(hypothesis, reference)
    if reference:
        edits = translation_edit_rate(hypothesis, reference)[0]
        assert shifts + sum(edit != MATCH for edit in trace) == edits
    assert sorted(places) == list(range(len(hypothesis)))
    mine, theirs = iter(places), iter(reference)
    for edit in trace:
        token = hypothesis[next(mine)] if edit != "i" else None
        other = next(theirs) if edit != "d" else None
        assert (edit == MATCH) == (token == other)
    plain = ter_labels(hypothesis, reference, deletion_rule=False)
    assert sum(plain) == trace.count(MATCH) + 1
    assert all(label <= other for label, other in zip(ter_labels(hypothesis, reference), plain, strict=True))
