"""Binarised data of a teacher's translations, in the dictionaries of the data that were translated, so that the same
teacher can teach every token of them."""

from __future__ import annotations

import shutil
from array import array
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from fairseq.data import Dictionary, indexed_dataset

from hgkd_fairseq import files
from hgkd_fairseq.data.shards import sync
from hgkd_fairseq.data.translations import hash_of
from hgkd_fairseq.errors import UserError

SENTENCES, DROPPED, SUMMARY, RECORD = "sentences.tsv", "dropped.tsv", "summary.md", "distilled.json"
REFERENCE, TRANSLATION = "reference", "translation"


class Row(NamedTuple):
    """A pair to train on.

    Attributes:
        number: of the sentence in the data that were translated.
        origin: REFERENCE or TRANSLATION.
        rank: of the hypothesis among the sentence's; 0 for a reference.
        target: (T,) ids, with the end of sentence.
    """

    number: int
    origin: str
    rank: int
    target: torch.Tensor


def ids_of(pieces: Iterable[str], dictionary: Dictionary) -> torch.Tensor:
    """(T,) int32, of pieces that the dictionary has, with the end of sentence.

    Raises:
        KeyError: a piece that it does not have.
    """
    return torch.tensor([*[dictionary.indices[piece] for piece in pieces], dictionary.eos()], dtype=torch.int32)


def write(folder: Path, data: str, task, subset: str, rows: Iterable[Row]) -> int:
    """Binarise pairs to a folder that is there, and copy the other subsets and the dictionaries.

    Args:
        folder: to write to.
        data: folder that was translated.
        task: of it.
        subset: that was translated.
        rows: the pairs.

    Returns: their number.

    Raises:
        UserError: what has been written is not what was meant; nothing is left to train on.
    """
    dataset = task.dataset(subset)
    source, target = task.cfg.source_lang, task.cfg.target_lang
    copied = copy_others(Path(data), folder, subset)
    prefixes = {language: folder / f"{subset}.{source}-{target}.{language}" for language in (source, target)}
    builders = {
        language: indexed_dataset.make_builder(f"{prefixes[language]}.bin", "mmap", len(dictionary))
        for language, dictionary in ((source, task.source_dictionary), (target, task.target_dictionary))
    }
    expected = array("Q"), array("Q")  # hashes of the sources and targets; a list of text would take ten times as much
    with files.writing(folder / SENTENCES) as stream:
        stream.write("row\tsentence\torigin\trank\n")
        for place, row in enumerate(rows):
            ids = dataset.src[row.number]
            builders[source].add_item(ids.int())
            builders[target].add_item(row.target.int())
            for hashes, side in zip(expected, (ids, row.target), strict=True):
                hashes.append(int(hash_of(side), 16))
            stream.write(f"{place}\t{row.number}\t{row.origin}\t{row.rank}\n")
    if not expected[0]:
        raise UserError("no translation is left to train on; keep more of them with --keep")
    for language, builder in builders.items():
        builder.finalize(f"{prefixes[language]}.idx")
    check(prefixes[source], prefixes[target], expected)
    for file, digest in copied.items():
        if files.sha256(folder / file) != digest:
            raise UserError(f"{file} is not what it is in {data}, after it was copied; try again")
    return len(expected[0])


def copy_others(data: Path, folder: Path, subset: str) -> dict[str, str]:
    """Validation and test sets and dictionaries, byte for byte; their SHA-256."""
    copied = {}
    for pattern in ("*.bin", "*.idx", "dict.*.txt"):
        for file in sorted(data.glob(pattern)):
            if not file.name.startswith(f"{subset}."):
                copied[file.name] = files.sha256(file)
                shutil.copyfile(file, folder / file.name)
    return copied


def check(source: Path, target: Path, expected: tuple[array, array]) -> None:
    """Whether what can be read now is what was to be written, row by row; `expected`: hashes of sources and targets.

    Raises:
        UserError: names the first row that is not.
    """
    for prefix in (source, target):
        for suffix in (".bin", ".idx"):
            sync(prefix.with_name(prefix.name + suffix))
    sides = [indexed_dataset.MMapIndexedDataset(str(prefix)) for prefix in (source, target)]
    if {len(side) for side in sides} != {len(expected[0])}:
        counts = f"{source} has {len(sides[0])} rows and {target} {len(sides[1])}"
        raise UserError(f"{counts}, to be written were {len(expected[0])}; try again")
    for row, hashes in enumerate(zip(*expected, strict=True)):
        try:
            found = [int(hash_of(side[row]), 16) for side in sides]
        except ValueError:  # numpy's: the file ends before the row does
            found = []
        if found != [*hashes]:
            raise UserError(f"row {row} of {source} or {target} is not what was to be written; try again")
