"""Subword pieces and the words they make."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

SENTENCEPIECE, SUBWORD_NMT = "▁", "@@"  # the marks of a word's beginning and of a word that goes on


def mark(sentences: Iterable[Sequence[str]]) -> str:
    """The mark that pieces of these sentences bear; "" where they bear none."""
    for tokens in sentences:
        for token in tokens:
            if token.startswith(SENTENCEPIECE):
                return SENTENCEPIECE
            if token.endswith(SUBWORD_NMT):
                return SUBWORD_NMT
    return ""


def words(tokens: Sequence[str], mark: str) -> list[list[int]]:
    """The indices of the pieces of each word."""
    groups: list[list[int]] = []
    for index, token in enumerate(tokens):
        if mark == SENTENCEPIECE:
            begins = token.startswith(SENTENCEPIECE)
        else:
            begins = not (mark and index and tokens[index - 1].endswith(mark))
        if begins or not groups:
            groups.append([])
        groups[-1].append(index)
    return groups


def join(tokens: Sequence[str], mark: str) -> list[str]:
    """The words without marks."""
    texts = []
    for group in words(tokens, mark):
        pieces = [tokens[index] for index in group]
        if mark == SENTENCEPIECE:
            texts.append("".join(pieces).removeprefix(SENTENCEPIECE))
        else:
            texts.append("".join(piece.removesuffix(mark) for piece in pieces))
    return texts


def text(tokens: Sequence[str], mark: str) -> str:
    """The sentence that the pieces make."""
    return " ".join(word for word in join(tokens, mark) if word)
