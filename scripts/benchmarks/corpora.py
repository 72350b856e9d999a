"""Binarised corpora of any size, written without text: lengths as those of web text, words by Zipf's law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fairseq.data import Dictionary, indexed_dataset

LONGEST = 1024  # tokens of a sentence, its end included
AT_ONCE = 100_000  # pairs drawn at a time


def dictionary(types: int) -> Dictionary:
    """Of that many types, the special ones included."""
    found = Dictionary()
    for index in range(types - len(found)):
        found.add_symbol(f"w{index}")
    return found


def write(folder: Path, pairs: dict[str, int], types: int, longest: int = LONGEST, seed: int = 1) -> None:
    """Subsets of that many pairs, `de` to `en`, with one dictionary of `types` types.

    Lengths are log-normal, 21 tokens in the median and 30 in the mean; the first pair is as long as any may be. A
    translation has about as many tokens as its source, nine of ten of them the same ones.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = dictionary(types)
    for language in ("de", "en"):
        words.save(str(folder / f"dict.{language}.txt"))
    for subset, count in pairs.items():
        prefixes = [folder / f"{subset}.de-en.{language}" for language in ("de", "en")]
        source, target = (indexed_dataset.make_builder(f"{prefix}.bin", "mmap", types) for prefix in prefixes)
        for start in range(0, count, AT_ONCE):
            for de, en in sentences(rng, min(AT_ONCE, count - start), types, longest, first=start == 0):
                source.add_item(de)
                target.add_item(en)
        for builder, prefix in ((source, prefixes[0]), (target, prefixes[1])):
            builder.finalize(f"{prefix}.idx")


def zipf(rng: np.random.Generator, count: int, types: int) -> np.ndarray:
    """Words with a probability of about 1 / rank: the logarithm of a rank is uniform."""
    special = 4
    return special - 1 + np.exp(rng.random(count) * np.log(types - special)).astype(np.int64)


def sentences(rng: np.random.Generator, count: int, types: int, longest: int, first: bool):
    """Pairs of int tensors that end in EOS (2)."""
    lengths = np.clip(rng.lognormal(3.05, 0.8, count), 1, longest - 1).astype(int)
    other = np.clip(lengths * rng.normal(1, 0.1, count), 1, longest - 1).astype(int)
    if first:
        lengths[0] = other[0] = longest - 1
    drawn = zipf(rng, int(lengths.sum() + other.sum()), types)
    copied = rng.random(int(other.sum())) < 0.9
    at, at_copied = 0, 0
    for length, length_of_other in zip(lengths, other, strict=True):
        source, target = drawn[at : at + length], drawn[at + length : at + length + length_of_other]
        same = min(length, length_of_other)
        target[:same] = np.where(copied[at_copied : at_copied + same], source[:same], target[:same])
        at, at_copied = at + length + length_of_other, at_copied + length_of_other
        yield tuple(torch.from_numpy(np.append(side, 2).astype(np.int32)) for side in (source, target))
