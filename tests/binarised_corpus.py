"""Helpers that write and read fairseq's binarised data without fairseq-preprocess."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fairseq.data import Dictionary, data_utils, indexed_dataset


def dictionary_of(symbols: Iterable[str]) -> Dictionary:
    """Return a dictionary of the special symbols followed by `symbols`, in order."""
    found = Dictionary()
    for symbol in symbols:
        found.add_symbol(symbol)
    return found


def write(folder: Path, subset: str, pair: str, sides: Sequence[Iterable[str]], dictionaries: Sequence[Dictionary]):
    """Write SUBSET.PAIR.LANGUAGE.bin, SUBSET.PAIR.LANGUAGE.idx and dict.LANGUAGE.txt of both languages of a pair."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines, dictionary in zip(pair.split("-"), sides, dictionaries, strict=True):
        prefix = folder / f"{subset}.{pair}.{language}"
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
        for line in lines:
            builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).int())
        builder.finalize(f"{prefix}.idx")
        dictionary.save(str(folder / f"dict.{language}.txt"))


def read(folder: Path, subset: str, pair: str) -> list[list[str]]:
    """Return the lines of text of both languages of a pair."""
    found = []
    for language in pair.split("-"):
        dictionary = Dictionary.load(str(folder / f"dict.{language}.txt"))
        prefix = str(folder / f"{subset}.{pair}.{language}")
        found.append([dictionary.string(ids) for ids in data_utils.load_indexed_dataset(prefix, dictionary)])
    return found
