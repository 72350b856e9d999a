"""A teacher's translations of a subset, in shards: how they are written, and how they are read and checked.

A line of a shard's translations.tsv has, with tabs between them: the sentence's number in the subset, from 0 on; a hash
of its source; the rank of the hypothesis among the sentence's; its score, the log-probability (nats) over the length to
the power of the length penalty; what became of it; its pieces. Lines stand in the order of the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from fairseq.data import Dictionary

from hgkd_fairseq import files
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.errors import UserError

FILE = "translations.tsv"
KIND = "translations"
WHOLE, LIMIT, SKIPPED = "whole", "limit", "skipped"  # SKIPPED: the source is longer than the teacher takes


class Hypothesis(NamedTuple):
    """`pieces` without the end of sentence; `limit`: it has as many as it was allowed to have."""

    pieces: list[str]
    score: float
    limit: bool


class Translated(NamedTuple):
    """A sentence and its hypotheses, the best one first; none where the teacher does not take its source."""

    number: int
    source: str  # hash_of its tokens
    hypotheses: list[Hypothesis]


def hash_of(ids: Any) -> str:
    """Of the tokens of a sentence, by their ids: 16 hexadecimal digits."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).hexdigest()


def hashes(data: str, subset: str) -> dict[str, dict[str, str]]:
    """What a manifest says of a folder of data: SHA-256 of the subset's files and of the dictionaries.

    Raises:
        UserError: the subset is in several parts, or it is no folder.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{data} is no folder; name one that fairseq-preprocess wrote, of several one at a time")
    more = sorted(folder.glob(f"{subset}1.*-*.*.idx"))
    if more:
        raise UserError(f"{more[0]} is another part of {subset}: binarise them as one")
    found = {"data": f"{subset}.*-*.*", "dictionaries": "dict.*.txt"}
    return {
        kind: {file.name: files.sha256(file) for file in sorted(folder.glob(pattern))}
        for kind, pattern in found.items()
    }


def check_pieces(dictionary: Dictionary) -> None:
    """Refuse types that would not be read as they were written.

    Raises:
        UserError: one holds a blank or a tab, or stands twice.
    """
    for number, piece in enumerate(dictionary.symbols):
        if any(letter in piece for letter in " \t\r\n") or dictionary.index(piece) != number:
            raise UserError(f"the target dictionary's type {number}, {piece!r}, holds white space or stands twice")


def lines(one: Translated) -> Iterator[str]:
    """Of a file.

    Raises:
        UserError: a score is no number.
    """
    for rank, (pieces, score, limit) in enumerate(one.hypotheses):
        if not math.isfinite(score):
            raise UserError(
                f"the teacher gives sentence {one.number} a translation with the score {score}: it has diverged, or "
                "needs --dtype fp32 or bf16"
            )
        state = LIMIT if limit else WHOLE
        yield f"{one.number}\t{one.source}\t{rank}\t{score:.4f}\t{state}\t{' '.join(pieces)}\n"
    if not one.hypotheses:
        yield f"{one.number}\t{one.source}\t0\t0\t{SKIPPED}\t\n"


def write(folder: Path, found: Sequence[Translated]) -> None:
    """The file of a shard.

    Raises:
        UserError: it cannot be written.
    """
    with files.writing(folder / FILE) as stream:
        for one in found:
            stream.writelines(lines(one))


def opened(folder: str, data: str | None = None, subset: str | None = None) -> Shards:
    """The translations in a folder, which must be of these data.

    Raises:
        UserError: there are none, or of other data, dictionaries or another subset.
    """
    about: dict[str, Any] = dict.fromkeys(("subset", "source_lang", "target_lang"), str)
    about |= {kind: {str: str} for kind in ("data", "dictionaries")} | {"decoding?": {"nbest?": files.Within(1)}}
    found = Shards.open(folder, {"kind": KIND} | ({"subset": subset} if subset else {}))
    if wrong := files.mismatch(found.manifest, about):
        raise UserError(f"{folder} has a manifest of which {wrong}; run hgkd translate again, to another folder")
    if data is not None:
        Shards.open(folder, hashes(data, found.manifest["subset"]))
    return found


def read(shards: Shards) -> Iterator[Translated]:
    """All sentences in order; each file is what was written, and no sentence is missing or has moved.

    Raises:
        UserError: names the file and what is wrong.
    """
    expected = 0  # the number of the next sentence
    for folder in shards.all_files():
        for one in read_file(folder / FILE):
            if one.number != expected:
                raise UserError(f"{folder / FILE} has sentence {one.number} where {expected} should be")
            expected += 1
            yield one
        ends = shards.numbers(int(folder.name.rpartition("-")[2])).stop
        if expected != ends:
            raise UserError(f"{folder / FILE} ends before sentence {expected} and not {ends}")


def read_file(file: Path) -> Iterator[Translated]:
    last = None
    for place, line in enumerate(files.read_lines(file), 1):
        columns = line.split("\t")
        row = None
        with contextlib.suppress(ValueError, IndexError):
            number, rank, score = int(columns[0]), int(columns[2]), float(columns[3])
            if len(columns) == 6 and columns[4] in (WHOLE, LIMIT, SKIPPED) and math.isfinite(score):
                row = number, columns[1], rank, Hypothesis(columns[5].split(" "), score, columns[4] == LIMIT)
        if row is None:
            raise UserError(f"{file}, line {place}, is no translation; run hgkd translate again")
        number, source, rank, hypothesis = row
        if last is None or number != last.number:
            if last is not None:
                yield last
            last = Translated(number, source, [])
        if rank != len(last.hypotheses) or source != last.source:
            raise UserError(f"{file}, line {place}, has rank {rank} of sentence {number} in its place")
        if columns[4] != SKIPPED:
            last.hypotheses.append(hypothesis._replace(pieces=hypothesis.pieces if columns[5] else []))
    if last is not None:
        yield last
