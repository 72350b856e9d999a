"""The student as a gate reads it with --gate-dropout off."""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.plugin import features


@torch.no_grad()
def gold_logprob(model: torch.nn.Module, sample: dict, target: Tensor, **options) -> Tensor:
    """(B, T) log-probabilities (nats) of the gold tokens under a model without dropout, by another forward pass.

    Args:
        sample: a batch of fairseq's.
        target: (B, T), the last T tokens of the batch's targets.
        options: of :func:`gated_distillation`.
    """
    with features.without_dropout(model):
        student = features.head(model, sample["net_input"])
    hidden = student.hidden[:, -target.size(1) :]
    read = gated_distillation(
        hidden, student.weight, None, None, target, gate="none", student_bias=student.bias, **options
    )
    return -read.token_nll
