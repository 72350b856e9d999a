"""Data of several language pairs, as fairseq's multilingual task samples or concatenates them.

Here each sentence has a unique number: its index in the data of its pair plus the number of sentences of all pairs
before it. (fairseq numbers the sentences of each pair from 0.)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from fairseq.data import (
    BaseWrapperDataset,
    ConcatDataset,
    FairseqDataset,
    SampledMultiDataset,
    SampledMultiEpochDataset,
)

SEVERAL = (ConcatDataset, SampledMultiDataset)


class Numbered(BaseWrapperDataset):
    """Data of one language pair, whose samples have the numbers `first`, `first` + 1, ... as their "id"."""

    def __init__(self, dataset: FairseqDataset, first: int):
        super().__init__(dataset)
        self.first = first

    def __getitem__(self, index):
        sample = self.dataset[index]
        return {**sample, "id": self.first + int(index)}

    def collater(self, samples, **options):
        return self.dataset.collater(samples, **options)


def parts(dataset: Any) -> list:
    """Return the data sets of all language pairs; for data of a single pair, a list of the data set itself."""
    return list(dataset.datasets) if isinstance(dataset, SEVERAL) else [dataset]


def ends(dataset: Any) -> np.ndarray:
    """Return, for each of P pairs, the number of its last sentence plus 1, (P,) int64."""
    return np.cumsum([len(part) for part in parts(dataset)])


def sentences(dataset: Any) -> int:
    """Return the number of distinct sentences in data of one or several pairs."""
    return int(ends(dataset)[-1])


def numbers(dataset: Any, indices: np.ndarray) -> np.ndarray:
    """Return the sentence numbers, (I,), at some indices, (I,), of data of one or several pairs.

    In sampled data a sentence may be at several indices, or at none.
    """
    if not isinstance(dataset, SampledMultiDataset):
        return indices
    firsts = ends(dataset) - [len(part) for part in parts(dataset)]
    places = (dataset._get_dataset_and_index(int(index)) for index in indices)
    return np.array([firsts[part] + inside for part, inside in places], np.int64)


def number(dataset: Any) -> None:
    """Wrap the data of each pair, in place, such that samples have their unique numbers as their "id"."""
    first = 0
    for place, part in enumerate(dataset.datasets):
        dataset.datasets[place] = Numbered(part, first)
        first += len(part)


def with_pairs(
    collater: Callable[..., dict], last: np.ndarray, of_part: Sequence[int], samples: list, **options
) -> dict:
    """Collate a batch and add "pair" (B,) int64, the index of the language pair of each sentence.

    Args:
        collater: collater of the data set.
        last: (P,) numbers, as :func:`ends` returns them.
        of_part: index of the language pair of each of P data sets.
        samples: samples of the batch.
        options: keyword arguments of the collater.
    """
    batch = collater(samples, **options)
    if not batch:  # fairseq returns None without samples, which happens on a worker that has run out of batches
        return {}
    places = np.searchsorted(last, batch["id"].numpy(), side="right")
    batch["pair"] = torch.tensor([of_part[place] for place in places])
    return batch


def names(task: Any) -> list[str]:
    """Return the distinct language pairs of a multilingual task, such as "de-en", including those of extra data."""
    extra = [pair for given in (task.args.extra_lang_pairs or {}).values() for pair in given.split(",")]
    return list(dict.fromkeys(pair if "-" in pair else f"{pair}-{pair}" for pair in [*task.lang_pairs, *extra]))


def tell_pairs(dataset: Any, task: Any) -> None:
    """Wrap the collater of a data set such that batches have "pair", indices in :func:`names`; see :func:`with_pairs`.

    Args:
        dataset: data of several pairs, to which :func:`number` has been applied.
        task: multilingual task of the data.
    """
    known, keys = names(task), getattr(dataset, "keys", None) or [f"main:{pair}" for pair in task.lang_pairs]
    of_part = [known.index(key.partition(":")[2]) for key in keys]
    dataset.collater = functools.partial(with_pairs, dataset.collater, ends(dataset), of_part)


def same_pass(dataset: Any, epoch: int) -> None:
    """Restore the order of the current pass over the data, for a run that is resumed in the middle of a pass.

    fairseq divides a pass into virtual epochs and draws the order of the sentences in the first of them. A run that is
    resumed in a later one would draw a different order, and see some sentences of the pass twice and others not at all.

    Args:
        dataset: data of the task; anything but a SampledMultiEpochDataset is left as it is.
        epoch: current (virtual) epoch, from 1.
    """
    if not isinstance(dataset, SampledMultiEpochDataset) or not dataset._current_epoch_start_index:
        return
    begun = epoch - dataset._current_epoch_start_index // dataset.virtual_epoch_size
    dataset._random_global_indices = dataset.load_next_shard = None
    dataset.set_epoch(begun)
    dataset.set_epoch(epoch)


def targets(dataset: Any, indices: Iterable[int], without: Sequence[int]) -> Iterator[torch.Tensor]:
    """Yield the targets (length,) of the sentences with some numbers, without the tokens `without`.

    Args:
        dataset: data of one or several pairs.
        indices: sentence numbers.
        without: ids of tokens that are removed from the targets.
    """
    last, all_parts = ends(dataset), parts(dataset)
    drop = torch.tensor(list(without))
    for index in indices:
        part = int(np.searchsorted(last, index, side="right"))
        first = int(last[part]) - len(all_parts[part])
        target = all_parts[part][index - first]["target"]
        yield target[~torch.isin(target, drop)]
