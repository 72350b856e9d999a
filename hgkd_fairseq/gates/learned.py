"""Gates that replace the step of the hard gate by a sigmoid, with fixed or learned parameters."""

from __future__ import annotations

from typing import Annotated

import torch

from hgkd_fairseq.gates.contract import GateWeights, Option, TokenStatistics
from hgkd_fairseq.gates.registry import register_gate
from hgkd_fairseq.ranges import WEIGHT

Sharpness = Annotated[float, Option("slope k of the sigmoid, at its start where it is learned", WEIGHT)]


@register_gate(
    "soft",
    equation="g_t = sigmoid(k (log p_t - log q_t)); data 1 - g_t, teacher g_t (--gate-sharpness k)",
    source="the hard gate without its step; k -> infinity is HKD-T",
)
def soft(statistics: TokenStatistics, *, gate_sharpness: Sharpness = 1.0) -> GateWeights:
    teacher = torch.sigmoid(gate_sharpness * (statistics.student_logprob - statistics.teacher_logprob))
    return GateWeights(data=1 - teacher, teacher=teacher)


@register_gate(
    "soft-learned",
    equation="g_t = sigmoid(a + k (log p_t - log q_t)) with a and k learned; data 1 - g_t, teacher g_t",
    source="in the spirit of Wei et al. 2024, whose exact form is unpublished; ours",
)
class SoftLearned(torch.nn.Module):
    """Sigmoid gate with learned offset and slope, trained by the gradient of the loss.

    The gradient opens the gate for tokens whose teacher term is smaller than their data term.
    """

    def __init__(self, *, gate_sharpness: Sharpness = 1.0):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(()))
        self.sharpness = torch.nn.Parameter(torch.tensor(float(gate_sharpness)))

    def forward(self, statistics: TokenStatistics) -> GateWeights:
        gap = statistics.student_logprob - statistics.teacher_logprob
        teacher = torch.sigmoid(self.offset.to(gap.dtype) + self.sharpness.to(gap.dtype) * gap)
        return GateWeights(data=1 - teacher, teacher=teacher)
