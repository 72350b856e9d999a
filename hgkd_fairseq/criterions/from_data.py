"""The student beside the data alone: language tokens, and what a gate reads with --gate-dropout off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hgkd_fairseq.loss import DistillationOutput, Head, gated_distillation
from hgkd_fairseq.plugin import features


def from_data(student: Head, target: Tensor, **options: Any) -> DistillationOutput:
    """Cross-entropy.

    Args:
        student: hidden (B, T, D).
        target: (B, T).
        options: of :func:`gated_distillation`.
    """
    return gated_distillation(
        student.hidden, student.weight, None, None, target, gate="none", student_bias=student.bias, **options
    )


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
    student = student._replace(hidden=student.hidden[:, student.hidden.size(1) - target.size(1) :])
    return -from_data(student, target, **options).token_nll
