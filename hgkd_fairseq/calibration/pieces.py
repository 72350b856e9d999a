"""Subword pieces and the words they make."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

SENTENCEPIECE, SUBWORD_NMT = "▁", "@@"  # the marks of a blank and of a word that goes on


def gold(dictionary, index: int) -> str:
    """The piece of a reference that is known by its number in fairseq's dictionary, as fairseq-generate writes it: an
    unknown one is <<unk>>, which no model can say, so that the unknown is never taken for right."""
    return dictionary.unk_string(escape=True) if index == dictionary.unk() else dictionary[index]


def mark(sentences: Iterable[Sequence[str]]) -> str:
    """The mark that pieces of these sentences bear, the more frequent one where both are there; "" where they bear
    none. Sentencepiece marks nearly every sentence: where most do not bear it, it is a character of a text."""
    found: Counter[str] = Counter()
    count = bearing = 0  # sentences
    for tokens in sentences:
        marked = sum(SENTENCEPIECE in token for token in tokens)
        found[SENTENCEPIECE] += marked
        found[SUBWORD_NMT] += sum(token.endswith(SUBWORD_NMT) and SENTENCEPIECE not in token for token in tokens)
        count += bool(tokens)
        bearing += bool(marked)
    if 2 * bearing < count:
        del found[SENTENCEPIECE]
    return max(+found, key=lambda mark: found[mark], default="")


def spans_words(token: str) -> bool:
    """Whether a piece of sentencepiece holds the end of one word and the beginning of another: ▁of▁the."""
    return SENTENCEPIECE in token.strip(SENTENCEPIECE)


def words(tokens: Sequence[str], mark: str) -> list[list[int]]:
    """The indices of the pieces of each word; of each run of words that a piece holds together, where a piece spans
    words."""
    groups: list[list[int]] = []
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else ""
        if mark == SENTENCEPIECE:  # a mark ends a piece where sentencepiece was trained with treat_whitespace_as_suffix
            begins = token.startswith(SENTENCEPIECE) or (before.endswith(SENTENCEPIECE) and before != SENTENCEPIECE)
        else:
            begins = not (mark and before.endswith(mark))
        if begins or not groups:
            groups.append([])
        groups[-1].append(index)
    return groups


def join(tokens: Sequence[str], mark: str) -> list[str]:
    """The words of :func:`words` without marks."""
    return [text([tokens[index] for index in group], mark) for group in words(tokens, mark)]


def text(tokens: Sequence[str], mark: str) -> str:
    """The sentence that the pieces make, as fairseq's post_process has it: joined, and then each mark of sentencepiece
    is a blank, wherever in a piece it stands."""
    if mark == SENTENCEPIECE:
        return "".join(tokens).replace(SENTENCEPIECE, " ").strip()
    line = " ".join(tokens)
    return (line + " ").replace(f"{mark} ", "").rstrip() if mark else line
