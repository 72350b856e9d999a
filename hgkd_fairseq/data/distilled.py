"""Binarised training data made of a teacher's translations.

They have the dictionaries of the translated data, so that the same teacher can also score every token of them.
"""

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
    """A training pair.

    Attributes:
        number: number of the sentence in the translated data, from 0.
        origin: origin of the target, REFERENCE or TRANSLATION.
        rank: rank of the hypothesis among those of the sentence; 0 for a reference.
        target: (T,) token ids, with the end of sentence.
    """

    number: int
    origin: str
    rank: int
    target: torch.Tensor


def ids_of(pieces: Iterable[str], dictionary: Dictionary) -> torch.Tensor:
    """Return the ids of pieces, (T,) int32, with the end of sentence.

    Raises:
        KeyError: a piece is not in the dictionary.
    """
    return torch.tensor([*[dictionary.indices[piece] for piece in pieces], dictionary.eos()], dtype=torch.int32)


def write(folder: Path, data: str, task, subset: str, rows: Iterable[Row]) -> int:
    """Write pairs as a binarised subset, and copy the other subsets and the dictionaries.

    The file SENTENCES in the folder lists the origin of each row. Binarised data and copies are read back and compared.

    Args:
        folder: existing folder to write to.
        data: folder of the translated data.
        task: translation task on `data`, with the subset loaded.
        subset: name of the translated subset.
        rows: pairs, in the order in which they are written.

    Returns:
        The number of pairs.

    Raises:
        UserError: there are no pairs, or what is read back differs from what was written.
    """
    dataset = task.dataset(subset)
    source, target = task.cfg.source_lang, task.cfg.target_lang
    copied = copy_others(Path(data), folder, subset)
    prefixes = {language: folder / f"{subset}.{source}-{target}.{language}" for language in (source, target)}
    builders = {
        language: indexed_dataset.make_builder(f"{prefixes[language]}.bin", "mmap", len(dictionary))
        for language, dictionary in ((source, task.source_dictionary), (target, task.target_dictionary))
    }
    expected = array("Q"), array("Q")  # hashes of sources and targets; strings would take ten times the memory
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
    """Copy the dictionaries and all subsets but `subset`.

    Returns:
        The SHA-256 of each file that was copied, by its name.
    """
    copied = {}
    for pattern in ("*.bin", "*.idx", "dict.*.txt"):
        for file in sorted(data.glob(pattern)):
            if not file.name.startswith(f"{subset}."):
                copied[file.name] = files.sha256(file)
                shutil.copyfile(file, folder / file.name)
    return copied


def check(source: Path, target: Path, expected: tuple[array, array]) -> None:
    """Read binarised data back and compare each row with what should have been written.

    Args:
        source: prefix of the files (.bin, .idx) of the sources.
        target: prefix of the files of the targets.
        expected: hashes of the sources and of the targets, row by row.

    Raises:
        UserError: the number of rows or a row differs; the message names the first such row.
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
        except ValueError:  # from numpy, if the file ends before the row does
            found = []
        if found != [*hashes]:
            raise UserError(f"row {row} of {source} or {target} is not what was to be written; try again")
