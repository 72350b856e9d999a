"""What data-parallel workers tell each other of a training step."""

from __future__ import annotations

import dataclasses

import torch
from fairseq.distributed import utils as distributed_utils

from hgkd_fairseq.gates import Gate
from hgkd_fairseq.loss import DistillationOutput


def gather(values: torch.Tensor) -> torch.Tensor:
    """One tensor of the same size from each data-parallel worker, joined."""
    group = distributed_utils.get_data_parallel_group()
    if distributed_utils.get_world_size(group) == 1:
        return values
    return torch.cat(distributed_utils.all_gather(values, group))


def show(out: DistillationOutput, gate: Gate, idle: bool) -> None:
    """Show a gate that observes what came of a step.

    Args:
        idle: whether the batch was only repeated by fairseq to keep the workers in step: it counts for nothing.
    """
    if gate.observer:
        seen = dataclasses.replace(out, tokens_mask=torch.zeros_like(out.tokens_mask)) if idle else out
        gate.observer.observe(seen, gather)
