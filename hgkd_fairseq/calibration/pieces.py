"""Conversion of subword pieces to words, for sentencepiece and subword-nmt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

SENTENCEPIECE, SUBWORD_NMT = "▁", "@@"  # marks of a blank, and of a piece that does not end its word


def gold(dictionary, index: int) -> str:
    """Return the piece with an index in fairseq's dictionary, as fairseq-generate writes it in references.

    The unknown piece is <<unk>>, which no model can produce, so that it is never counted as right.
    """
    return dictionary.unk_string(escape=True) if index == dictionary.unk() else dictionary[index]


def mark(sentences: Iterable[Sequence[str]]) -> str:
    """Detect the mark of the pieces in some sentences: SENTENCEPIECE, SUBWORD_NMT, or "" if there is neither.

    If both occur, the more frequent one is returned. As sentencepiece marks nearly every sentence, its mark is taken
    for an ordinary character if fewer than half of the non-empty sentences contain it.
    """
    found: Counter[str] = Counter()
    count = bearing = 0  # non-empty sentences, and those with the mark of sentencepiece
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
    """Return whether a sentencepiece piece spans the boundary of two words, as ▁of▁the does."""
    return SENTENCEPIECE in token.strip(SENTENCEPIECE)


def words(tokens: Sequence[str], mark: str) -> list[list[int]]:
    """Return the indices of the pieces of each word; words that are joined by a piece that spans them form one group.

    Args:
        tokens: pieces of a sentence.
        mark: their mark, as :func:`mark` returns it.
    """
    groups: list[list[int]] = []
    for index, token in enumerate(tokens):
        before = tokens[index - 1] if index else ""
        if mark == SENTENCEPIECE:  # with treat_whitespace_as_suffix, sentencepiece puts the mark at the end of pieces
            begins = token.startswith(SENTENCEPIECE) or (before.endswith(SENTENCEPIECE) and before != SENTENCEPIECE)
        else:
            begins = not (mark and before.endswith(mark))
        if begins or not groups:
            groups.append([])
        groups[-1].append(index)
    return groups


def join(tokens: Sequence[str], mark: str) -> list[str]:
    """Return the words of a sentence (the groups of :func:`words`) as text without marks."""
    return [text([tokens[index] for index in group], mark) for group in words(tokens, mark)]


def text(tokens: Sequence[str], mark: str) -> str:
    """Return the text of a sentence in pieces, as fairseq's post_process makes it.

    With sentencepiece, the pieces are concatenated and every mark, wherever it is in a piece, becomes a blank. With
    subword-nmt, the marks and the blanks after them are removed. Without a mark, the pieces are joined by blanks.
    """
    if mark == SENTENCEPIECE:
        return "".join(tokens).replace(SENTENCEPIECE, " ").strip()
    line = " ".join(tokens)
    return (line + " ").replace(f"{mark} ", "").rstrip() if mark else line
