"""The paper's hard gates, "token" and "sentence", variants and controls of them, and "none": the data alone.

Lee et al., "Hard Gate Knowledge Distillation", EMNLP 2022, arXiv:2210.12427.
"""

from __future__ import annotations

from typing import Annotated

import torch

from hgkd_fairseq.gates.contract import GateError, GateWeights, Option, TokenStatistics
from hgkd_fairseq.gates.registry import register_gate
from hgkd_fairseq.gates.tools import KdShare, hard_weights, mixed, sentence_margin, sentence_sums
from hgkd_fairseq.ranges import SHARE

TeacherShare = Annotated[float | None, Option("share of the tokens that the teacher gets", SHARE)]
Floor = Annotated[str, Option("LO,HI: the teacher's weight where the gate is closed, and where it is open")]
Margin = Annotated[float, Option("m, nats a token by which a target's surprisal may be above the teacher's entropy")]
Rest = Annotated[
    float, Option("b, weight of the teacher's term where the target is not typical; 0 drops the pair", SHARE)
]
HKD = "Lee et al., EMNLP 2022, arXiv:2210.12427"


@register_gate(
    "none", equation="data 1, teacher 0", source="cross-entropy", needs_teacher=False, compares=False, constant=True
)
def none(statistics: TokenStatistics) -> GateWeights:
    ones = torch.ones_like(statistics.student_logprob)
    return GateWeights(data=ones, teacher=torch.zeros_like(ones))


@register_gate("token", closes=True, equation="g_t = 1[p_t > q_t]; data 1 - g_t, teacher g_t", source=f"HKD-T, {HKD}")
def token(statistics: TokenStatistics) -> GateWeights:
    # A strict inequality: a token of equal probability is learned from the data.
    return hard_weights(statistics.student_logprob > statistics.teacher_logprob, statistics.student_logprob.dtype)


@register_gate(
    "sentence",
    scope="sentence",
    closes=True,
    equation="g = 1[sum_t log p_t > sum_t log q_t]; data 1 - g, teacher g",
    source=f"HKD-S, {HKD}",
)
def sentence(statistics: TokenStatistics) -> GateWeights:
    return hard_weights(sentence_margin(statistics) > 0, statistics.student_logprob.dtype)


@register_gate(
    "floor",
    equation="teacher HI where p_t > q_t, else LO; data 1 - teacher (--gate-floor LO,HI)",
    source="HKD-T that leaves neither the data nor the teacher alone; ours",
)
def floor(statistics: TokenStatistics, *, gate_floor: Floor = "0.3,0.7") -> GateWeights:
    return floored(token(statistics), gate_floor)


@register_gate(
    "sentence-floor",
    scope="sentence",
    equation="teacher HI where sum_t log p_t > sum_t log q_t, else LO; data 1 - teacher (--gate-floor LO,HI)",
    source="HKD-S that leaves neither the data nor the teacher alone; ours",
)
def sentence_floor(statistics: TokenStatistics, *, gate_floor: Floor = "0.3,0.7") -> GateWeights:
    return floored(sentence(statistics), gate_floor)


@register_gate(
    "expected",
    equation="teacher sum_v p(v) 1[p(v) > q(v)], data 1 - teacher",
    source="the rule of HKD-T in its mean over the student's tokens, so that no sampled gold token decides; ours",
    compares=False,
    asks=("student_above",),
)
def expected(statistics: TokenStatistics) -> GateWeights:
    teacher = statistics.asked["student_above"]
    return GateWeights(1 - teacher, teacher)


@register_gate(
    "typical",
    scope="sentence",
    equation="data 0, teacher b where mean_t (-log q_t - H(q at t)) > m; else data 1 - a, teacher a (--kd-weight a, "
    "--typical-margin m, --untypical-weight b)",
    source="the teacher as a gauge of the targets: under a calibrated one the surprisal of a right target is its "
    "entropy in the mean, of a wrong one more; ours",
    compares=False,
    asks=("teacher_entropy",),
)
def typical(
    statistics: TokenStatistics,
    *,
    kd_weight: KdShare = 0.7,
    typical_margin: Margin = 1.0,
    untypical_weight: Rest = 1.0,
) -> GateWeights:
    above = -statistics.teacher_logprob - statistics.asked["teacher_entropy"]  # nats
    wrong = sentence_sums(above - typical_margin, statistics)[statistics.sentence] > 0
    right = mixed(statistics, kd_weight)
    return GateWeights(right.data.masked_fill(wrong, 0), right.teacher.masked_fill(wrong, untypical_weight))


def floored(decided: GateWeights, gate_floor: str) -> GateWeights:
    closed, opened = floor_weights(gate_floor)
    teacher = closed + (opened - closed) * decided.teacher
    return GateWeights(1 - teacher, teacher)


def floor_weights(text: str) -> tuple[float, float]:
    """Parse "LO,HI": return the teacher's weights where the gate is closed and where it is open; LO may exceed HI.

    Raises:
        GateError: the text is not two numbers between 0 and 1.
    """
    try:
        closed, opened = map(float, text.split(","))
    except ValueError:
        closed = opened = -1.0
    if SHARE.problem(closed) or SHARE.problem(opened):
        raise GateError(f'"{text}" is no LO,HI: two weights between 0 and 1, as 0.3,0.7', "gate_floor")
    return closed, opened


@register_gate(
    "token-reversed",
    closes=True,
    equation="g_t = 1[p_t < q_t]; data 1 - g_t, teacher g_t",
    source="control: HKD-T upside down",
)
def token_reversed(statistics: TokenStatistics) -> GateWeights:
    return hard_weights(statistics.student_logprob < statistics.teacher_logprob, statistics.student_logprob.dtype)


@register_gate(
    "sentence-reversed",
    scope="sentence",
    closes=True,
    equation="g = 1[sum_t log p_t < sum_t log q_t]; data 1 - g, teacher g",
    source="control: HKD-S upside down",
)
def sentence_reversed(statistics: TokenStatistics) -> GateWeights:
    return hard_weights(sentence_margin(statistics) < 0, statistics.student_logprob.dtype)


@register_gate(
    "random",
    closes=True,
    equation="the decisions of gate token, shuffled among the tokens in view; with --gate-share Bernoulli(share)",
    source="control: opens as often as HKD-T, but anywhere",
)
def random(
    statistics: TokenStatistics,
    *,
    gate_share: TeacherShare = None,
) -> GateWeights:
    student = statistics.student_logprob
    drawn = torch.rand(student.shape, device=student.device)
    if gate_share is None:
        return hard_weights((token(statistics).teacher > 0)[drawn.argsort()], student.dtype)
    return hard_weights(drawn < gate_share, student.dtype)
