"""What gates are made of."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hgkd_fairseq.gates.contract import GateWeights, Option, TokenStatistics
from hgkd_fairseq.ranges import SHARE

KdShare = Annotated[float, Option("a, weight of the teacher's term", SHARE)]


def hard_weights(to_teacher: Tensor, dtype: torch.dtype) -> GateWeights:
    """Weights of a hard switch: `to_teacher` (n,) bool; True -> learn from the teacher only, False -> the data only."""
    teacher = to_teacher.to(dtype)
    return GateWeights(data=1 - teacher, teacher=teacher)


def sentence_sums(values: Tensor, statistics: TokenStatistics) -> Tensor:
    """Sum of per-token `values` (n,) over each sentence, (S,)."""
    return values.new_zeros(statistics.sentence_count).index_add_(0, statistics.sentence, values)


def sentence_margin(statistics: TokenStatistics) -> Tensor:
    """(n,) by how much the student's log-probability of a token's whole sentence is above the teacher's."""
    # The sum of differences, not the difference of sums: long sentences have sums near -100 and margins near 0.
    gap = statistics.student_logprob - statistics.teacher_logprob
    return sentence_sums(gap, statistics)[statistics.sentence]


def mixed(statistics: TokenStatistics, weight: float) -> GateWeights:
    """data 1 - weight, teacher weight."""
    teacher = torch.full_like(statistics.student_logprob, weight)
    return GateWeights(data=1 - teacher, teacher=teacher)


def smoothed(data: Tensor, weight: float, gold: Tensor, vocabulary: int) -> GateWeights:
    """`data` plus `weight` times the cross-entropy with a target that has `gold` (n,) on the gold token and the rest
    spread evenly: (gold - r) onehot + V r uniform, with r = (1 - gold) / (V - 1)."""
    rest = (1 - gold) / (vocabulary - 1)
    return GateWeights(data + weight * (gold - rest), torch.zeros_like(data), weight * vocabulary * rest)
