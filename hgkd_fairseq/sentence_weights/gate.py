"""The gate of ALM-KD: two learned loss weights, data and teacher, for each training sentence."""

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
    """Gate with a data weight and a teacher weight for each training sentence, constant between two refreshes.

    Sivasubramanian et al., 2022 (ALM-KD); meta_gradient.py contains the equations, refresh.py updates the weights.
    Tokens without a training sentence (`instance` is None, as in validation) get the initial weights `DATA` and
    `TEACHER`.

    Attributes:
        state: the tensors that are saved in the checkpoints, for S training sentences; empty before :meth:`begin`.
            "data" and "teacher" (S,): the weights; "held_out" (S,) bool: the held-out sentences; "learned" (S,) bool:
            the sentences whose weights at least one refresh has updated; "epoch" (0-d int64): the epoch of the last
            refresh, 0 before the first one. :class:`refresh.Refresh` adds "lengths".

    Raises:
        GateError: `weight_rule` is unknown (constructor), or the gate is called with sentence numbers before
            :meth:`begin`.
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
        """Return a mask (S,) bool of the sentences whose weights a refresh has updated.

        Held-out sentences and those too long to train on are excluded. Checkpoints of older versions have no "learned"
        column; for them, a sentence counts as learned if one of its weights differs from its initial value.

        Args:
            table: a gate's state, with the columns "data" and "teacher".
        """
        moved = (table["data"] != cls.DATA) | (table["teacher"] != cls.TEACHER)
        return table.get("learned", moved)

    def begin(self, held_out: Tensor) -> None:
        """Initialise the state from `held_out` (S,) bool, the mask of the held-out training sentences."""
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
        if self.state["data"].device != student.device:  # only once, after loading from a checkpoint
            self.state.update({name: value.to(student.device) for name, value in self.state.items()})
        return GateWeights(*[self.state[name][index].to(student.dtype) for name in ("data", "teacher")])
