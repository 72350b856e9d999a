"""The gate of ALM-KD: a row of learned weights for each training sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import torch
from torch import Tensor

from hgkd_fairseq.gates.contract import GateError, GateWeights, Option, TokenStatistics
from hgkd_fairseq.gates.registry import register_gate
from hgkd_fairseq.ranges import Range

HELD_OUT = (
    "share of the training sentences that is kept aside to learn the weights on, or a subset of the data, but not the "
    "one that chooses the checkpoint"
)
WEIGHT_RULES = ("independent", "convex")
EPOCHS = Range(1, 2**31, "a number of epochs, 1 or more; the published one is 10")
CHANGE = Range(1e-6, 2, "a change of weights between 0 and 2; 0.05 to 0.2 is usual")


@register_gate(
    "instance",
    equation="data a_s, teacher b_s, learned for each training sentence s on sentences that are kept aside "
    "(--held-out, --refresh-interval, --refresh-change, --weight-rule)",
    source="ALM-KD, Sivasubramanian et al. 2022, with a step that is scaled to its gradient",
    compares=False,
    constant=True,
)
class Instance:
    """A row of weights for each training sentence, constant between refreshes (meta_gradient.py has the equations).

    State: "data" and "teacher" (S,), "held_out" (S,) bool, the sentences that are kept aside, "learned" (S,) bool,
    those whose weights were learned in some refresh, and "epoch", that of the last one. A sentence of another set
    (validation) has the weights that all begin with.
    """

    DATA, TEACHER, LARGEST = 0.1, 0.9, 2.0

    def __init__(
        self,
        *,
        held_out: Annotated[str, Option(HELD_OUT)] = "0.02",
        refresh_interval: Annotated[int, Option("epochs between two refreshes of the weights", EPOCHS)] = 10,
        refresh_change: Annotated[float, Option("median change of a weight in a refresh", CHANGE)] = 0.1,
        weight_rule: Annotated[str, Option("how weights may move", choices=WEIGHT_RULES)] = "independent",
    ):
        if weight_rule not in WEIGHT_RULES:
            raise GateError(f'"{weight_rule}" is none of {", ".join(WEIGHT_RULES)}', "weight_rule")
        self.held_out, self.interval, self.change, self.rule = held_out, refresh_interval, refresh_change, weight_rule
        self.state: dict[str, Tensor] = {}

    @classmethod
    def learned_rows(cls, table: Mapping[str, Tensor]) -> Tensor:
        """(S,) bool, the rows of a state that a refresh has learned: not those of sentences that were kept aside or too
        long to train on. A state without that column is of an older version: rows that moved."""
        moved = (table["data"] != cls.DATA) | (table["teacher"] != cls.TEACHER)
        return table.get("learned", moved)

    def begin(self, held_out: Tensor) -> None:
        """Make the table; `held_out` (S,) bool says which sentences of the training set are kept aside."""
        start = torch.ones(held_out.shape, device=held_out.device)
        rows = {"data": self.DATA * start, "teacher": self.TEACHER * start}
        learned = torch.zeros_like(held_out)
        self.state.update(rows, held_out=held_out, learned=learned, epoch=torch.zeros((), dtype=torch.int64))

    def __call__(self, statistics: TokenStatistics) -> GateWeights:
        student, index = statistics.student_logprob, statistics.instance
        if index is None:
            return GateWeights(torch.full_like(student, self.DATA), torch.full_like(student, self.TEACHER))
        if not self.state:
            raise GateError('gate "instance" has no table yet: call its begin() with the size of the training set')
        if self.state["data"].device != student.device:  # once: the tables come from a checkpoint
            self.state.update({name: value.to(student.device) for name, value in self.state.items()})
        return GateWeights(*[self.state[name][index].to(student.dtype) for name in ("data", "teacher")])
