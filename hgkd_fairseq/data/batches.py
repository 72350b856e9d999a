"""Lengths of the targets in a batch, grouping of sentences into batches, and all targets of the training data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask


def with_target_lengths(collater: Callable[..., dict], pad: int, samples: list, **options) -> dict:
    """Collate a batch and add "target_lengths", the number of tokens of each target, a list of length B.

    They are host integers, as counting on a GPU would synchronise host and device in every step.
    """
    batch = collater(samples, **options)
    if batch.get("target") is not None:
        batch["target_lengths"] = batch["target"].ne(pad).sum(1).tolist()
    return batch


def count_targets(dataset: FairseqDataset, pad: int) -> None:
    """Wrap the collater of a data set such that batches have "target_lengths"; see :func:`with_target_lengths`."""
    dataset.collater = functools.partial(with_target_lengths, dataset.collater, pad)


def target_lengths(sample: dict, skip: int, pad: int) -> list[int]:
    """Return the number of tokens of each target in a batch, without its first `skip` positions, a list of length B.

    Batches of a task with a teacher have "target_lengths", which is used if `skip` is 0. Otherwise the tokens are
    counted here, so call this before any operation of the batch is queued on the device: the host then waits only for
    the previous step.
    """
    counted = None if skip else sample.get("target_lengths")
    return (sample["target"][:, skip:] != pad).sum(1).tolist() if counted is None else counted


def filled(order: Iterable[int], length: Callable[[int], int], most: int) -> Iterator[list[int]]:
    """Group sentences into batches, in their order, and yield the batches.

    A batch has as many sentences as fit into `most` tokens with padding, and at least one.

    Args:
        order: sentence numbers.
        length: function that returns the length of a sentence in tokens.
        most: maximum number of tokens in a batch, padding included.
    """
    batch: list[int] = []
    widest = 0
    for one in order:
        wider = max(widest, length(one))
        if batch and wider * (len(batch) + 1) > most:
            yield batch
            batch, wider = [], length(one)
        batch.append(one)
        widest = wider
    if batch:
        yield batch


def training_targets(task: FairseqTask, max_tokens: int | None, without: Sequence[int] = ()) -> Iterator[torch.Tensor]:
    """Yield the targets (length,) that a translation task trains on.

    They are the targets of all folders of the task's data, with fairseq's further parts (train1, ...) and repetitions.
    Sentences that are too long or held out are left out. The task's training subset is replaced until the end of the
    iteration, which restores it.

    Args:
        task: translation task.
        max_tokens: maximum number of tokens in a batch, which limits the length of sentences as in training.
        without: ids of tokens that are removed from the targets.

    Raises:
        UserError: the training subset does not exist.
    """
    subset = task.cfg.train_subset
    shown = task.datasets.get(subset)
    limit = utils.resolve_max_positions(task.max_positions(), max_tokens)
    drop = torch.tensor(without, dtype=torch.int64)
    try:
        for epoch, _ in enumerate(utils.split_paths(task.cfg.data), 1):
            task.load_dataset(subset, epoch=epoch, combine=True)
            dataset = task.datasets[subset]
            kept = task.filter_indices_by_size(np.arange(len(dataset)), dataset, limit, ignore_invalid_inputs=True)
            for target in (dataset.tgt[index] for index in kept):
                yield target[~torch.isin(target, drop)] if without else target
    finally:
        task.datasets.pop(subset, None)
        if shown is not None:
            task.datasets[subset] = shown
