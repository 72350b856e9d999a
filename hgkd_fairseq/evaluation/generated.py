"""What fairseq-generate wrote: the lines of its output, and the texts in them."""

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
    """Of each sentence, by its place in the subset, what stands behind S- (source), T- (reference), H- (best
    hypothesis), D- (the same, as --bpe and --tokenizer make text of it) and P- (scores). Every sentence is there.

    Raises:
        UserError: a file that is missing, no text, or holds no translations; sentences that are missing or there twice.
    """
    lines: dict[str, dict[int, str]] = {letter: {} for letter in "STHDP"}
    size = 0
    for line in files.read_lines(file, "name what fairseq-generate wrote"):
        found = LINE.match(line)
        if not found:
            if line.endswith(" examples") and "fairseq.tasks." in line:  # the log is in the file too
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
        lines[letter].setdefault(int(number), text)  # the first of --nbest is the best
    if not lines["H"]:
        raise UserError(
            f"{file} holds no translations (lines with H-); name what fairseq-generate wrote, run without --quiet"
        )
    check_whole(file, lines, size)
    return lines


def check_whole(file: str | Path, lines: Mapping[str, Mapping[int, str]], size: int) -> None:
    """Refuse an output that lacks sentences: fairseq-generate leaves out what fills no batch, and a stopped one is cut
    short. `size`: sentences of the subset, as far as it is known."""
    size = max([size, *(number + 1 for numbers in lines.values() for number in numbers)])
    for letter in ("H", "D") if lines["D"] else ("H",):
        missing = next((number for number in range(size) if number not in lines[letter]), None)
        if missing is not None:
            raise UserError(
                f"{file} has {len(lines[letter])} translations of {size} sentences (first one missing: {missing}); "
                f"{AGAIN}, with --required-batch-size-multiple 1, or give the outputs of all its shards in one file"
            )


def read_references(file: str | Path) -> list[str]:
    """A text file, a reference a line, in the order of the subset. Line ends are those of files, not Unicode's others.

    Raises:
        UserError: a file that is missing or no text.
    """
    lines = files.read_lines(file, "name a text file with a reference a line")
    return [line.removesuffix("\r") for line in lines]  # of a file of Windows


def split(line: str) -> list[str]:
    """Split at blanks only: a piece may hold other white space."""
    return [token for token in line.split(" ") if token]


def reference(dictionary, ids: Iterable[int]) -> list[str]:
    """The pieces of a reference that is known by its ids, as fairseq-generate writes them; see :func:`pieces.gold`."""
    skipped = (dictionary.pad(), dictionary.eos(), dictionary.bos())
    return [pieces.gold(dictionary, one) for one in ids if one not in skipped]


def texts(lines: Mapping[int, str]) -> dict[int, str]:
    """The sentences with their pieces joined to words; as they are where they are in no pieces."""
    return dict(zip(lines, joined([split(line) for line in lines.values()]), strict=True))


def joined(sentences: Sequence[Sequence[str]]) -> list[str]:
    """The text of each of these sentences, which are in pieces of one kind."""
    mark = pieces.mark(sentences)
    return [pieces.text(tokens, mark) for tokens in sentences]


def translations(lines: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """The text of each translation, of the lines that :func:`read_lines` gave."""
    return texts(lines["D"] or lines["H"])


def read_texts(file: str | Path) -> tuple[list[str], list[str] | None]:
    """(translations, references) of a whole output, as text and in order; None where a reference is missing.

    Raises:
        UserError: as of :func:`read_lines`.
    """
    lines = read_lines(file)
    found, references = translations(lines), texts(lines["T"])
    order = sorted(found)
    whole = references.keys() == found.keys()
    return [found[index] for index in order], [references[index] for index in order] if whole else None
