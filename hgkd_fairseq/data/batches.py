"""What a batch says of its targets, and all targets that are trained on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.tasks import FairseqTask


def with_target_lengths(collater: Callable[..., dict], pad: int, samples: list, **options) -> dict:
    """A batch that also says how many tokens each target has, as host integers: to count them on a GPU the host would
    have to wait for it in every step."""
    batch = collater(samples, **options)
    if batch.get("target") is not None:
        batch["target_lengths"] = batch["target"].ne(pad).sum(1).tolist()
    return batch


def count_targets(dataset: FairseqDataset, pad: int) -> None:
    """Have the batches of a data set say so."""
    dataset.collater = functools.partial(with_target_lengths, dataset.collater, pad)


def target_lengths(sample: dict, skip: int, pad: int) -> list[int]:
    """Tokens of each target of a batch from its `skip`-th on. A task with a teacher has counted them; elsewhere it is
    done here: before anything of the batch is queued on the device, so that the host waits for the last step alone."""
    counted = None if skip else sample.get("target_lengths")
    return (sample["target"][:, skip:] != pad).sum(1).tolist() if counted is None else counted


def filled(order: Iterable[int], length: Callable[[int], int], most: int) -> Iterator[list[int]]:
    """Batches of sentences in their order, each of as many as have at most `most` tokens with pads, or of one."""
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
    """The targets (length,) that a task trains on, those of fairseq's train1, ... and repeated ones among them, in all
    folders, less the tokens `without`; without those that are too long or kept aside.

    Raises:
        UserError: the data are not there.
    """
    subset = task.cfg.train_subset
    shown = task.datasets.get(subset)
    limit = utils.resolve_max_positions(task.max_positions(), max_tokens)
    drop = torch.tensor(without, dtype=torch.int64)
    for epoch, _ in enumerate(utils.split_paths(task.cfg.data), 1):
        task.load_dataset(subset, epoch=epoch, combine=True)
        dataset = task.datasets[subset]
        kept = task.filter_indices_by_size(np.arange(len(dataset)), dataset, limit, ignore_invalid_inputs=True)
        for target in (dataset.tgt[index] for index in kept):
            yield target[~torch.isin(target, drop)] if without else target
    if shown is None:
        del task.datasets[subset]
    else:
        task.datasets[subset] = shown
