"""The gate for several language pairs: a pair learns from its teacher while its accuracy is below a threshold."""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from hgkd_fairseq.gates.contract import GateWeights, Option, TokenStatistics
from hgkd_fairseq.gates.registry import register_gate
from hgkd_fairseq.gates.tools import KdShare
from hgkd_fairseq.ranges import WEIGHT

Margin = Annotated[float, Option("per cent of accuracy by which a student must be above its teacher", WEIGHT)]


@register_gate(
    "pair",
    equation="of a language pair with accuracy(student) < accuracy(teacher) + m on the validation set data 1 - a, "
    "teacher a; of others data 1 (--kd-weight a, --pair-margin m)",
    source="Tan et al., ICLR 2019, arXiv:1902.10461, with the accuracy of top-1 predictions in place of BLEU",
    compares=False,
    constant=True,
)
class Pair:
    """Gate that distils a language pair while the student's accuracy is below the teacher's plus `pair_margin`.

    `instance` of the statistics is the index of the token's pair. State: "open" (P,) bool, whether each pair learns
    from its teacher; before the first comparison all pairs do. The authors' code (RayeRen/multilingual-kd-pytorch,
    alpha-strategy threshold) has the same rule with m = 1 BLEU and a = 0.9.
    """

    def __init__(self, *, kd_weight: KdShare = 0.5, pair_margin: Margin = 1.0):
        self.weight, self.margin = kd_weight, pair_margin
        self.state: dict[str, Tensor] = {}

    def compare(self, student: Tensor, teacher: Tensor) -> None:
        """Decide which pairs learn from their teachers, from the accuracies of student and teacher, (P,) per cent."""
        self.state["open"] = student < teacher + self.margin

    def __call__(self, statistics: TokenStatistics) -> GateWeights:
        teacher = torch.full_like(statistics.student_logprob, self.weight)
        if statistics.instance is not None and self.state:
            opened = self.state["open"].to(teacher.device)[statistics.instance]
            teacher = torch.where(opened, teacher, torch.zeros_like(teacher))
        return GateWeights(1 - teacher, teacher)
