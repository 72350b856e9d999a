"""Readers of fairseq-generate's output: its lines, and the texts in them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hgkd_fairseq import files
from hgkd_fairseq.calibration import pieces
from hgkd_fairseq.errors import UserError

LINE = re.compile(r"([STHDP])-(\d+)\t(.*)", flags=re.DOTALL)
AGAIN = "run fairseq-generate again"


def read_lines(file: str | Path) -> dict[str, dict[int, str]]:
    """Read the lines of an output of fairseq-generate, by their letter and the index of their sentence in the subset.

    The letters are S (source), T (reference), H (best hypothesis), D (the hypothesis decoded by --bpe and --tokenizer)
    and P (scores of the tokens). Scores of whole sentences in the lines H- and D- are left out. Every sentence of the
    subset has a hypothesis.

    Raises:
        UserError: the file is missing, is no text or holds no translations; a sentence is missing or occurs twice.
    """
    lines: dict[str, dict[int, str]] = {letter: {} for letter in "STHDP"}
    size = 0
    for line in files.read_lines(file, "name what fairseq-generate wrote"):
        found = LINE.match(line)
        if not found:
            if line.endswith(" examples") and "fairseq.tasks." in line:  # a line of fairseq's log
                told = line.split(" ")[-2]
                size = int(told) if told.isdecimal() and len(told) <= 12 else size
            continue
        letter, number, text = found.groups()
        if len(number) > 12:
            raise UserError(f"{file} holds a sentence with the number {number[:12]}..., which is of no subset; {AGAIN}")
        if letter in "ST" and int(number) in lines[letter]:
            raise UserError(f"{file} holds {letter}-{number} twice, as of two runs; keep the lines of one")
        if letter in "HD":
            if "\t" not in text:
                raise UserError(f"{file}: {letter}-{number} has no score and no translation; {AGAIN}")
            text = text.partition("\t")[2]
        lines[letter].setdefault(int(number), text)  # with --nbest the best hypothesis comes first
    if not lines["H"]:
        raise UserError(
            f"{file} holds no translations (lines with H-); name what fairseq-generate wrote, run without --quiet"
        )
    check_whole(file, lines, size)
    return lines


def check_whole(file: str | Path, lines: Mapping[str, Mapping[int, str]], size: int) -> None:
    """Check that no sentence is missing: fairseq-generate may leave out sentences that do not fill a batch, and the
    output of a run that was stopped is incomplete.

    Args:
        file: name of the output, for the error message.
        lines: lines by letter and sentence.
        size: number of sentences of the subset; 0: not known.

    Raises:
        UserError: a sentence has no translation; the message names the first one.
    """
    size = max([size, *(number + 1 for numbers in lines.values() for number in numbers)])
    for letter in ("H", "D") if lines["D"] else ("H",):
        missing = next((number for number in range(size) if number not in lines[letter]), None)
        if missing is not None:
            raise UserError(
                f"{file} has {len(lines[letter])} translations of {size} sentences (first one missing: {missing}); "
                f"{AGAIN}, with --required-batch-size-multiple 1, or give the outputs of all its shards in one file"
            )


def read_references(file: str | Path) -> list[str]:
    """Read a text file with one reference per line, in the order of the subset.

    A line ends with a line feed, or a carriage return and a line feed; other line separators of Unicode are text.

    Raises:
        UserError: the file is missing or is no text.
    """
    lines = files.read_lines(file, "name a text file with a reference a line")
    return [line.removesuffix("\r") for line in lines]  # read_lines keeps it in a last line without a line feed


def split(line: str) -> list[str]:
    """Split a line at spaces only: a piece may contain other white space."""
    return [token for token in line.split(" ") if token]


def reference(dictionary, ids: Iterable[int]) -> list[str]:
    """Convert the token ids of a reference to pieces, as fairseq-generate prints them (:func:`pieces.gold`); padding,
    EOS and BOS are left out."""
    skipped = (dictionary.pad(), dictionary.eos(), dictionary.bos())
    return [pieces.gold(dictionary, one) for one in ids if one not in skipped]


def texts(lines: Mapping[int, str]) -> dict[int, str]:
    """Return the text of each sentence, with its subword pieces, if any, joined to words."""
    return dict(zip(lines, joined([split(line) for line in lines.values()]), strict=True))


def joined(sentences: Sequence[Sequence[str]]) -> list[str]:
    """Return the text of each sentence; all sentences must be in the same kind of subword pieces, or in none."""
    mark = pieces.mark(sentences)
    return [pieces.text(tokens, mark) for tokens in sentences]


def translations(lines: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """Return the text of each translation, by sentence; `lines` is the result of :func:`read_lines`."""
    return texts(lines["D"] or lines["H"])


def read_texts(file: str | Path) -> tuple[list[str], list[str] | None]:
    """Read the translations and references in an output of fairseq-generate as text.

    Returns:
        (translations, references), in the order of the subset; the second is None if a reference is missing.

    Raises:
        UserError: see :func:`read_lines`.
    """
    lines = read_lines(file)
    found, references = translations(lines), texts(lines["T"])
    order = sorted(found)
    whole = references.keys() == found.keys()
    return [found[index] for index in order], [references[index] for index in order] if whole else None
