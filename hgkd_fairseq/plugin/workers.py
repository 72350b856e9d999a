"""Communication between data-parallel workers in a training step."""

from __future__ import annotations

import dataclasses

import torch
from fairseq.distributed import utils as distributed_utils

from hgkd_fairseq.gates import Gate
from hgkd_fairseq.loss import DistillationOutput


def gather(values: torch.Tensor) -> torch.Tensor:
    """Concatenate tensors (n, ...) of the same shape, one from each data-parallel worker, to (workers * n, ...)."""
    group = distributed_utils.get_data_parallel_group()
    if distributed_utils.get_world_size(group) == 1:
        return values
    return torch.cat(distributed_utils.all_gather(values, group))


def show(out: DistillationOutput, gate: Gate, idle: bool) -> None:
    """Pass the output of a training step to the gate if it is an observer.

    Args:
        out: output of the loss for this worker's batch.
        gate: gate of the criterion.
        idle: whether the batch is a dummy that only keeps the workers synchronised; the gate then sees no tokens.
    """
    if gate.observer:
        seen = dataclasses.replace(out, tokens_mask=torch.zeros_like(out.tokens_mask)) if idle else out
        gate.observer.observe(seen, gather)
