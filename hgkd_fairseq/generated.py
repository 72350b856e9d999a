"""What fairseq-generate wrote: the lines of its output, and the texts in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from hgkd_fairseq import files
from hgkd_fairseq.calibration import pieces
from hgkd_fairseq.errors import UserError


def read_lines(file: str | Path) -> dict[str, dict[int, str]]:
    """Of each sentence, by its place in the subset, what stands behind T- (reference), H- (best hypothesis), D- (the
    same, as --bpe and --tokenizer make text of it) and P- (scores).

    Raises:
        UserError: a file that is missing, no text, or holds no translations.
    """
    lines: dict[str, dict[int, str]] = {"T": {}, "H": {}, "D": {}, "P": {}}
    for line in files.read_lines(file, "name what fairseq-generate wrote"):
        found = re.match(r"([THDP])-(\d+)\t(.*)", line, flags=re.DOTALL)
        if found:  # the first of --nbest is the best
            lines[found[1]].setdefault(int(found[2]), found[3])
    if not lines["H"]:
        raise UserError(
            f"{file} holds no translations (lines with H-); name what fairseq-generate wrote, run without --quiet"
        )
    return lines


def read_references(file: str | Path) -> list[str]:
    """A text file, a reference a line, in the order of the subset. Line ends are those of files, not Unicode's others.

    Raises:
        UserError: a file that is missing or no text.
    """
    return list(files.read_lines(file, "name a text file with a reference a line"))


def split(line: str) -> list[str]:
    """Split at blanks only: a piece may hold other white space."""
    return [token for token in line.split(" ") if token]


def texts(lines: Mapping[int, str]) -> dict[int, str]:
    """The sentences with their pieces joined to words; as they are where they are in no pieces."""
    tokens = {index: split(line) for index, line in lines.items()}
    mark = pieces.mark(tokens.values())
    return {index: pieces.text(sentence, mark) for index, sentence in tokens.items()}


def translations(lines: Mapping[str, Mapping[int, str]]) -> dict[int, str]:
    """The text of each translation, of the lines that :func:`read_lines` gave."""
    found = {index: line.partition("\t")[2] for index, line in (lines["D"] or lines["H"]).items()}
    return texts(found)
