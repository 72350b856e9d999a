"""Synthetic parallel corpora in fairseq's binary format, with sentence lengths like those of web text and tokens drawn
from a Zipf distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from fairseq.data import Dictionary, indexed_dataset

LONGEST = 1024  # tokens in the longest sentence, including EOS
SPECIAL, EOS = 4, 2


def dictionary(types: int) -> Dictionary:
    """Return a dictionary with `types` types in total, including the special symbols."""
    found = Dictionary()
    for index in range(types - len(found)):
        found.add_symbol(f"w{index}")
    return found


def write(folder: Path, pairs: dict[str, int], types: int, longest: int = LONGEST, seed: int = 1) -> None:
    """Write binarised German-English subsets that share one dictionary.

    Source lengths are log-normal, with a median of 21 and a mean of 29 tokens before EOS, clipped to `longest`; the
    first pair of each subset has the maximum length. A target has about as many tokens as its source, and 90 % of its
    tokens are copied from the same position of the source.

    Args:
        folder: output folder; created if it does not exist. Existing files are overwritten.
        pairs: number of sentence pairs of each subset, by the subset's name.
        types: size of the dictionary, including the special symbols.
        longest: maximum length of a sentence in tokens, including EOS.
        seed: seed of the random generator.
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
        place = np.arange(len(target)) - np.repeat(np.cumsum(other) - other, other)  # position in the sentence
        copied = (place < np.repeat(lengths, other)) & (rng.random(len(target)) < 0.9)
        target[copied] = source[(np.repeat(np.cumsum(lengths) - lengths, other) + place)[copied]]
        save(folder / f"{subset}.de-en.de", source, lengths, types)
        save(folder / f"{subset}.de-en.en", target, other, types)


def zipf(rng: np.random.Generator, count: int, types: int) -> np.ndarray:
    """Draw `count` int32 token ids whose probability is about proportional to 1 / rank.

    The logarithm of the rank is uniform. The ids start after the special symbols.
    """
    return SPECIAL - 1 + np.exp(rng.random(count, np.float32) * np.log(types - SPECIAL)).astype(np.int32)


def save(prefix: Path, tokens: np.ndarray, lengths: np.ndarray, types: int) -> None:
    """Write PREFIX.bin and PREFIX.idx with one vectorised write instead of fairseq's call per sentence.

    Args:
        prefix: path of the files without their extension.
        tokens: (tokens,) int32 concatenated sentences without EOS; an EOS is appended to each.
        lengths: (sentences,) int64 length of each sentence without EOS.
        types: size of the dictionary, from which fairseq derives the data type of the ids.
    """
    builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", types)
    ended = np.insert(tokens, np.cumsum(lengths), EOS)
    builder._data_file.write(ended.astype(builder._dtype).tobytes())
    builder._sizes.extend((lengths + 1).tolist())
    builder.finalize(f"{prefix}.idx")
