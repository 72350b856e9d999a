"""Binarised data that a test makes without fairseq-preprocess: text lines and a dictionary to the files of a folder."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from fairseq.data import Dictionary, data_utils, indexed_dataset


def dictionary_of(symbols: Iterable[str]) -> Dictionary:
    """Of these symbols in this order, after the special ones."""
    found = Dictionary()
    for symbol in symbols:
        found.add_symbol(symbol)
    return found


def write(folder: Path, subset: str, pair: str, sides: Sequence[Iterable[str]], dictionaries: Sequence[Dictionary]):
    """SUBSET.PAIR.LANGUAGE.bin and .idx of both languages of a pair, and their dict.LANGUAGE.txt."""
    folder.mkdir(parents=True, exist_ok=True)
    for language, lines, dictionary in zip(pair.split("-"), sides, dictionaries, strict=True):
        prefix = folder / f"{subset}.{pair}.{language}"
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
        for line in lines:
            builder.add_item(dictionary.encode_line(line, add_if_not_exist=False).int())
        builder.finalize(f"{prefix}.idx")
        dictionary.save(str(folder / f"dict.{language}.txt"))


def read(folder: Path, subset: str, pair: str) -> list[list[str]]:
    """The lines of both languages."""
    found = []
    for language in pair.split("-"):
        dictionary = Dictionary.load(str(folder / f"dict.{language}.txt"))
        prefix = str(folder / f"{subset}.{pair}.{language}")
        found.append([dictionary.string(ids) for ids in data_utils.load_indexed_dataset(prefix, dictionary)])
    return found
