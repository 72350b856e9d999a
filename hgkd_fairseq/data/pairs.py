"""Data of several language pairs, as fairseq's multilingual task samples or concatenates them.

Each sentence of each pair has a number of its own: its place in its pair's data, after all sentences of those
before it. fairseq's own numbers begin with 0 in each pair.
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
    """The data of one pair, whose samples have numbers from `first` on."""

    def __init__(self, dataset: FairseqDataset, first: int):
        super().__init__(dataset)
        self.first = first

    def __getitem__(self, index):
        sample = self.dataset[index]
        return {**sample, "id": self.first + int(index)}

    def collater(self, samples, **options):
        return self.dataset.collater(samples, **options)


def parts(dataset: Any) -> list:
    """The data of each pair; of one pair's, they themselves."""
    return list(dataset.datasets) if isinstance(dataset, SEVERAL) else [dataset]


def ends(dataset: Any) -> np.ndarray:
    """(P,) of each pair the number after that of its last sentence."""
    return np.cumsum([len(part) for part in parts(dataset)])


def sentences(dataset: Any) -> int:
    """How many there are, each counted once."""
    return int(ends(dataset)[-1])


def numbers(dataset: Any, indices: np.ndarray) -> np.ndarray:
    """The numbers of the sentences that stand at some indices of a data set. Sampled data have one sentence at several
    indices, or at none."""
    if not isinstance(dataset, SampledMultiDataset):
        return indices
    firsts = ends(dataset) - [len(part) for part in parts(dataset)]
    places = (dataset._get_dataset_and_index(int(index)) for index in indices)
    return np.array([firsts[part] + inside for part, inside in places], np.int64)


def number(dataset: Any) -> None:
    """Have the samples of all pairs carry their numbers as their "id"."""
    first = 0
    for place, part in enumerate(dataset.datasets):
        dataset.datasets[place] = Numbered(part, first)
        first += len(part)


def with_pairs(
    collater: Callable[..., dict], last: np.ndarray, of_part: Sequence[int], samples: list, **options
) -> dict:
    """A batch that also says of which pair each sentence is, "pair" (B,)."""
    batch = collater(samples, **options)
    if not batch:  # None where there are no samples, of a worker that has run out of them
        return {}
    places = np.searchsorted(last, batch["id"].numpy(), side="right")
    batch["pair"] = torch.tensor([of_part[place] for place in places])
    return batch


def names(task: Any) -> list[str]:
    """A multilingual task's pairs, those of extra data among them."""
    extra = [pair for given in (task.args.extra_lang_pairs or {}).values() for pair in given.split(",")]
    return list(dict.fromkeys(pair if "-" in pair else f"{pair}-{pair}" for pair in [*task.lang_pairs, *extra]))


def tell_pairs(dataset: Any, task: Any) -> None:
    """Have the batches say so.

    Args:
        dataset: with numbers.
        task: whose data they are.
    """
    known, keys = names(task), getattr(dataset, "keys", None) or [f"main:{pair}" for pair in task.lang_pairs]
    of_part = [known.index(key.partition(":")[2]) for key in keys]
    dataset.collater = functools.partial(with_pairs, dataset.collater, ends(dataset), of_part)


def same_pass(dataset: Any, epoch: int) -> None:
    """Let a virtual epoch go on with the order that its pass over the data began with. fairseq draws that order in the
    first epoch of a pass, and anew where a run is resumed in a later one: some sentences would come twice, and others
    not at all."""
    if not isinstance(dataset, SampledMultiEpochDataset) or not dataset._current_epoch_start_index:
        return
    begun = epoch - dataset._current_epoch_start_index // dataset.virtual_epoch_size
    dataset._random_global_indices = dataset.load_next_shard = None
    dataset.set_epoch(begun)
    dataset.set_epoch(epoch)


def targets(dataset: Any, indices: Iterable[int], without: Sequence[int]) -> Iterator[torch.Tensor]:
    """The targets (length,) of some sentences by their numbers, less the tokens `without`."""
    last, all_parts = ends(dataset), parts(dataset)
    drop = torch.tensor(list(without))
    for index in indices:
        part = int(np.searchsorted(last, index, side="right"))
        first = int(last[part]) - len(all_parts[part])
        target = all_parts[part][index - first]["target"]
        yield target[~torch.isin(target, drop)]
