"""Losses from the data alone: of language tokens, and what a gate reads of the student with --gate-dropout off."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hgkd_fairseq.loss import DistillationOutput, Head, gated_distillation
from hgkd_fairseq.plugin import features


def from_data(student: Head, target: Tensor, **options: Any) -> DistillationOutput:
    """Return the cross-entropy of the student on the targets, as :func:`gated_distillation` with gate "none".

    Args:
        student: features (B, T, D) and output layer.
        target: gold tokens (B, T).
        options: further options of :func:`gated_distillation`.
    """
    return gated_distillation(
        student.hidden, student.weight, None, None, target, gate="none", student_bias=student.bias, **options
    )


@torch.no_grad()
def gold_logprob(model: torch.nn.Module, sample: dict, target: Tensor, **options) -> Tensor:
    """Return the log-probabilities (B, T), in nats, of the gold tokens under a model without dropout; 0 at pads.

    This takes another forward pass.

    Args:
        model: the student.
        sample: batch of fairseq.
        target: gold tokens (B, T), the last T columns of the batch's targets.
        options: options of :func:`gated_distillation`.
    """
    with features.without_dropout(model):
        student = features.head(model, sample["net_input"])
    student = student._replace(hidden=student.hidden[:, student.hidden.size(1) - target.size(1) :])
    return -from_data(student, target, **options).token_nll
