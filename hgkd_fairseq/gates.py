"""When to distil: per-token statistics in, per-token weights out. Pure functions of tensors; no fairseq here.

A gate answers METHOD's question "when": it reads how probable a token is under the student and under the teacher and
returns two weights per token, one for the data term and one for the teacher term of the loss

    loss = sum_t  data_t * CE(y_t, P_student)  +  teacher_t * KL(P_teacher^tau || P_student).

No gradient passes through a gate: the statistics come detached.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class TokenStatistics(NamedTuple):
    """What a gate sees, for the N non-pad tokens of some whole sentences (all detached, fp32 or fp64)."""

    student_logprob: Tensor  # (N,) nats, of the token the gate reads, under the student (temperature 1)
    teacher_logprob: Tensor  # (N,) nats, of the same token, under the teacher
    sentence: Tensor  # (N,) int64, row of `sentence_count` that the token belongs to
    sentence_count: int  # S


class GateWeights(NamedTuple):
    """Weights of the two terms of the loss, each (N,) and of the statistics' dtype."""

    data: Tensor
    teacher: Tensor


@dataclass(frozen=True)
class Gate:
    """A registered answer to "when".

    Attributes:
        name: the value of ``--gate``.
        weights: ``TokenStatistics -> GateWeights``.
        scope: ``"token"`` where each token is decided alone, ``"sentence"`` where whole sentences must be in view
            (the loss then cuts its chunks between sentences).
        needs_teacher: False for a gate whose teacher weight is always 0.
        equation: one line, as ``hgkd`` prints it.
        source: the paper it comes from.
    """

    name: str
    weights: Callable[[TokenStatistics], GateWeights]
    scope: str
    needs_teacher: bool
    equation: str
    source: str


GATES: dict[str, Gate] = {}

HKD = "Lee et al., EMNLP 2022, arXiv:2210.12427"


def register_gate(name: str, *, equation: str, source: str, scope: str = "token", needs_teacher: bool = True):
    """Decorator: register ``TokenStatistics -> GateWeights`` under ``name``, the value that ``--gate`` takes.

    Raises:
        ValueError: the name is taken, or the scope is neither "token" nor "sentence".
    """
    if scope not in ("token", "sentence"):
        raise ValueError(f'scope of gate "{name}" is "{scope}"; it must be "token" or "sentence"')

    def register(function: Callable[[TokenStatistics], GateWeights]):
        if name in GATES:
            raise ValueError(f'a gate named "{name}" is registered already; choose another name')
        GATES[name] = Gate(name, function, scope, needs_teacher, equation, source)
        return function

    return register


def get_gate(gate: str | Gate) -> Gate:
    """The gate of that name (a `Gate` passes through). Raises ValueError that lists the known names."""
    if isinstance(gate, Gate):
        return gate
    if gate not in GATES:
        raise ValueError(f'unknown gate "{gate}"; known gates: {", ".join(sorted(GATES))}')
    return GATES[gate]


def hard_weights(to_teacher: Tensor, dtype: torch.dtype) -> GateWeights:
    """Weights of a hard switch: `to_teacher` (N,) bool; True -> learn from the teacher only, False -> the data only."""
    teacher = to_teacher.to(dtype)
    return GateWeights(data=1 - teacher, teacher=teacher)


def sentence_sums(values: Tensor, statistics: TokenStatistics) -> Tensor:
    """Sum of per-token `values` (N,) over each sentence, (S,)."""
    return values.new_zeros(statistics.sentence_count).index_add_(0, statistics.sentence, values)


@register_gate("none", equation="data 1, teacher 0", source="cross-entropy", needs_teacher=False)
def none(statistics: TokenStatistics) -> GateWeights:
    ones = torch.ones_like(statistics.student_logprob)
    return GateWeights(data=ones, teacher=torch.zeros_like(ones))


@register_gate("token", equation="g_t = 1[p_t > q_t]; data 1 - g_t, teacher g_t", source=f"HKD-T, {HKD}")
def token(statistics: TokenStatistics) -> GateWeights:
    # Strict: where both agree exactly the data teaches.
    return hard_weights(statistics.student_logprob > statistics.teacher_logprob, statistics.student_logprob.dtype)


@register_gate(
    "sentence",
    scope="sentence",
    equation="g = 1[sum_t log p_t > sum_t log q_t]; data 1 - g, teacher g",
    source=f"HKD-S, {HKD}",
)
def sentence(statistics: TokenStatistics) -> GateWeights:
    # The sum of differences, not the difference of sums: long sentences have sums near -100 and margins near 0.
    margin = sentence_sums(statistics.student_logprob - statistics.teacher_logprob, statistics)
    return hard_weights((margin > 0)[statistics.sentence], statistics.student_logprob.dtype)
