"""A teacher's translations of a subset, in shards: writing, reading and validation.

A line of translations.tsv in a shard has the following columns, separated by tabs: the number of the sentence in the
subset, from 0; a hash of its source; the rank of the hypothesis among those of the sentence, from 0; its score, which
is the log-probability (nats) divided by the length to the power of the length penalty; its status, WHOLE, LIMIT or
SKIPPED; its pieces, separated by blanks. Lines are in the order of the data.
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
# LIMIT: the translation has the maximum length. SKIPPED: the source is longer than the teacher accepts.
WHOLE, LIMIT, SKIPPED = "whole", "limit", "skipped"


class Hypothesis(NamedTuple):
    """A translation of a sentence.

    Attributes:
        pieces: pieces, without the end of sentence.
        score: log-probability (nats) divided by the length to the power of the length penalty.
        limit: whether the translation has the maximum length.
    """

    pieces: list[str]
    score: float
    limit: bool


class Translated(NamedTuple):
    """A sentence and its hypotheses, the best one first; none if its source is longer than the teacher accepts."""

    number: int  # number of the sentence in the subset, from 0
    source: str  # hash_of the source tokens
    hypotheses: list[Hypothesis]


def hash_of(ids: Any) -> str:
    """Return a 64-bit hash, in 16 hexadecimal digits, of a sentence's token ids (T,), a sequence or CPU tensor."""
    return hashlib.blake2b(np.asarray(ids, dtype="<i4").tobytes(), digest_size=8).hexdigest()


def hashes(data: str, subset: str) -> dict[str, dict[str, str]]:
    """Return the hashes of binarised data for a manifest.

    Args:
        data: folder that fairseq-preprocess has written.
        subset: name of a subset.

    Returns:
        The SHA-256 of the files of the subset ("data") and of the dictionaries ("dictionaries"), each by file name.

    Raises:
        UserError: `data` is not a folder, or `subset` is "train" and there is a train1, a part of it to fairseq.
        OSError: a file cannot be read.
    """
    folder = Path(data)
    if not folder.is_dir():
        raise UserError(f"{data} is no folder; name one that fairseq-preprocess wrote, of several one at a time")
    # fairseq joins train, train1, ... but no other subsets.
    more = sorted(folder.glob(f"{subset}1.*-*.*.idx")) if subset == "train" else []
    if more:
        raise UserError(f"{more[0]} is another part of {subset}: binarise them as one")
    found = {"data": f"{subset}.*-*.*", "dictionaries": "dict.*.txt"}
    return {
        kind: {file.name: files.sha256(file) for file in sorted(folder.glob(pattern))}
        for kind, pattern in found.items()
    }


def check_pieces(dictionary: Dictionary) -> None:
    """Check that all types of a dictionary can be written to a file of translations and read back.

    Raises:
        UserError: a type contains a blank, a tab or a line break, or occurs twice.
    """
    for number, piece in enumerate(dictionary.symbols):
        if any(letter in piece for letter in " \t\r\n") or dictionary.index(piece) != number:
            raise UserError(f"the target dictionary's type {number}, {piece!r}, holds white space or stands twice")


def lines(one: Translated) -> Iterator[str]:
    """Yield the lines of a sentence in translations.tsv.

    Raises:
        UserError: a score is not finite.
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
    """Write the file of a shard.

    Args:
        folder: folder of the shard.
        found: sentences of the shard, in their order.

    Raises:
        UserError: a score is not finite, or the file cannot be written.
    """
    with files.writing(folder / FILE) as stream:
        for one in found:
            stream.writelines(lines(one))


def opened(folder: str, data: str | None = None, subset: str | None = None) -> Shards:
    """Open a folder of translations.

    Args:
        folder: folder that `hgkd translate` has written.
        data: folder of binarised data; if given, the translations must be of these data and dictionaries.
        subset: if given, the translations must be of this subset.

    Raises:
        UserError: there are no translations, or they are of other data, dictionaries or another subset.
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
    """Yield all sentences in order, and verify that no file has changed and no sentence is missing or misplaced.

    Raises:
        UserError: a shard is not finished or a file is not valid; the message names the file and the problem.
    """
    expected = 0  # number of the next sentence
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
