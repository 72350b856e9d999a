"""Binarised corpora of any size, written without text: lengths as those of web text, words by Zipf's law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fairseq.data import Dictionary, indexed_dataset

LONGEST = 1024  # tokens of a sentence, its end included
SPECIAL, EOS = 4, 2


def dictionary(types: int) -> Dictionary:
    """Of that many types, the special ones included."""
    found = Dictionary()
    for index in range(types - len(found)):
        found.add_symbol(f"w{index}")
    return found


def write(folder: Path, pairs: dict[str, int], types: int, longest: int = LONGEST, seed: int = 1) -> None:
    """Subsets of that many pairs, `de` to `en`, with one dictionary of `types` types.

    Lengths are log-normal, 21 tokens in the median and 29 in the mean; the first pair is as long as any may be. A
    translation has about as many tokens as its source, nine of ten of them the same ones.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = dictionary(types)
    for language in ("de", "en"):
        words.save(str(folder / f"dict.{language}.txt"))
    for subset, count in pairs.items():
        lengths = np.clip(rng.lognormal(3.05, 0.8, count), 1, longest - 1).astype(np.int64)
        other = np.clip(lengths * rng.normal(1, 0.1, count), 1, longest - 1).astype(np.int64)
        lengths[0] = other[0] = longest - 1
        source, target = zipf(rng, lengths.sum(), types), zipf(rng, other.sum(), types)
        place = np.arange(len(target)) - np.repeat(np.cumsum(other) - other, other)  # in its sentence
        copied = (place < np.repeat(lengths, other)) & (rng.random(len(target)) < 0.9)
        target[copied] = source[(np.repeat(np.cumsum(lengths) - lengths, other) + place)[copied]]
        save(folder / f"{subset}.de-en.de", source, lengths, types)
        save(folder / f"{subset}.de-en.en", target, other, types)


def zipf(rng: np.random.Generator, count: int, types: int) -> np.ndarray:
    """Words with a probability of about 1 / rank: the logarithm of a rank is uniform."""
    return SPECIAL - 1 + np.exp(rng.random(count, np.float32) * np.log(types - SPECIAL)).astype(np.int32)


def save(prefix: Path, tokens: np.ndarray, lengths: np.ndarray, types: int) -> None:
    """Sentences one behind another, to which EOS is added, as fairseq's own builder would write them one by one."""
    builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", types)
    ended = np.insert(tokens, np.cumsum(lengths), EOS)
    builder._data_file.write(ended.astype(builder._dtype).tobytes())
    builder._sizes.extend((lengths + 1).tolist())
    builder.finalize(f"{prefix}.idx")
