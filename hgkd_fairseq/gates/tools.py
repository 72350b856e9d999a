"""Helper functions and parameter types that gates share."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hgkd_fairseq.gates.contract import GateWeights, Option, TokenStatistics
from hgkd_fairseq.ranges import SHARE

KdShare = Annotated[float, Option("a, weight of the teacher's term", SHARE)]


def hard_weights(to_teacher: Tensor, dtype: torch.dtype) -> GateWeights:
    """Return the weights of a hard switch: teacher 1 where `to_teacher` (n,) bool is True, data 1 elsewhere."""
    teacher = to_teacher.to(dtype)
    return GateWeights(data=1 - teacher, teacher=teacher)


def sentence_sums(values: Tensor, statistics: TokenStatistics) -> Tensor:
    """Return the sums (S,) of per-token `values` (n,) over each sentence."""
    return values.new_zeros(statistics.sentence_count).index_add_(0, statistics.sentence, values)


def sentence_margin(statistics: TokenStatistics) -> Tensor:
    """Return the student's minus the teacher's log-probability of each token's whole sentence, (n,) nats."""
    # A sum of differences loses less precision than a difference of sums: sums of long sentences are near -100, margins
    # near 0.
    gap = statistics.student_logprob - statistics.teacher_logprob
    return sentence_sums(gap, statistics)[statistics.sentence]


def mixed(statistics: TokenStatistics, weight: float) -> GateWeights:
    """Return constant weights (n,): data 1 - `weight`, teacher `weight`."""
    teacher = torch.full_like(statistics.student_logprob, weight)
    return GateWeights(data=1 - teacher, teacher=teacher)


def smoothed(data: Tensor, weight: float, gold: Tensor, vocabulary: int) -> GateWeights:
    """Return the weights of the loss `data` (n,) * data term + `weight` * cross-entropy with a smoothed target.

    The target gives the gold token the probability `gold` (n,) and each other token r = (1 - gold) / (V - 1); it is
    (gold - r) onehot + V r uniform.
    """
    rest = (1 - gold) / (vocabulary - 1)
    return GateWeights(data + weight * (gold - rest), torch.zeros_like(data), weight * vocabulary * rest)
