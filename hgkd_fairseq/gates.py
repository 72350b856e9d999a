"""When to distil: per-token statistics in, per-token weights out. No fairseq here.

A gate answers METHOD's question "when": it reads how probable a token is under the student and under the teacher and
returns the weights of the terms of the loss

    loss = sum_t  data_t * CE(y_t, P_student)  +  teacher_t * KL(P_teacher^tau || P_student)
                  +  uniform_t * CE(1/V, P_student).

The statistics come detached: no gradient passes from a gate into the student. Most gates are pure functions; one that
remembers something (a queue) or learns something is a class, made once for a run.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hgkd_fairseq.ranges import FINITE, POSITIVE, SHARE, WEIGHT, Range


class TokenStatistics(NamedTuple):
    """What a gate sees: n of the N non-pad tokens of a batch, in order (all detached, fp32 or fp64).

    Which n: whole sentences for a gate of scope "sentence", all N of them for scope "batch", any run of neighbours for
    scope "token".
    """

    student_logprob: Tensor  # (n,) nats, of the token the gate reads, under the student (temperature 1)
    teacher_logprob: Tensor  # (n,) nats, of the same token, under the teacher
    sentence: Tensor  # (n,) int64, row of `sentence_count` that the token belongs to
    sentence_count: int  # S
    vocabulary: int = 0  # V
    progress: float = 0.0  # share of the training's updates that are made, 0 to 1
    instance: Tensor | None = None  # (n,) int64, number of the token's sentence in the training set; None outside of it


class GateWeights(NamedTuple):
    """Weights of the terms of the loss, each (n,) and of the statistics' dtype."""

    data: Tensor
    teacher: Tensor
    uniform: Tensor | None = None  # of the cross-entropy with the uniform distribution; None: 0


class GateError(ValueError):
    """A gate, or a parameter of one, that does not exist or does not fit; `option` is the parameter, or "gate"."""

    def __init__(self, message: str, option: str = "gate"):
        super().__init__(message)
        self.option = option


@runtime_checkable
class Observer(Protocol):
    """A gate that sees what came of each training step."""

    def observe(self, output, gather: Callable[[Tensor], Tensor]) -> None:
        """Called after each training step of a worker.

        Args:
            output: the :class:`hgkd_fairseq.loss.DistillationOutput` of the worker's batch. Where the batch was only
                repeated to keep the workers in step, its `tokens_mask` is False everywhere.
            gather: joins one tensor of the same size from each data-parallel worker, along the first dimension.
        """


@dataclass(frozen=True)
class Gate:
    """An answer to "when", with its parameters bound.

    Attributes:
        name: the value of ``--gate``.
        weights: ``TokenStatistics -> GateWeights``.
        scope: ``"token"`` where each token is decided alone, ``"sentence"`` where whole sentences must be in view (the
            loss cuts its chunks between sentences), ``"batch"`` where all tokens must be (the loss then makes the
            forward products twice: once for the statistics, once for the gradients).
        needs_teacher: False for a gate whose teacher weight is always 0.
        compares: whether it compares the student's probability of a token with the teacher's, so that ``gate_on`` and
            ``gate_temperature`` mean something.
        uniform: whether its weights have a `uniform` part.
        timed: whether it changes with `progress`, so that the length of the training must be known.
        constant: whether its weights do not depend on the two log-probabilities, so that they are known beforehand.
        ranges: what its parameters may be, by name; a number without one must be finite.
        equation: one line, as ``hgkd gates`` prints it.
        source: the paper it comes from.
    """

    name: str
    weights: Callable[[TokenStatistics], GateWeights]
    scope: str = "token"
    needs_teacher: bool = True
    compares: bool = True
    uniform: bool = False
    timed: bool = False
    constant: bool = False
    equation: str = ""
    source: str = ""
    ranges: Mapping[str, Range] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters that are trained with the student's."""
        return isinstance(self.weights, torch.nn.Module)


GATES: dict[str, Gate] = {}

SCOPES = ("token", "sentence", "batch")
WEIGHT_RULES = ("independent", "convex")
HKD = "Lee et al., EMNLP 2022, arXiv:2210.12427"


def register_gate(
    name: str,
    *,
    equation: str,
    source: str,
    scope: str = "token",
    needs_teacher: bool = True,
    compares: bool = True,
    uniform: bool = False,
    timed: bool = False,
    constant: bool = False,
    ranges: Mapping[str, Range] | None = None,
):
    """Decorator: register a gate under ``name``, the value that ``--gate`` takes.

    On a function ``TokenStatistics -> GateWeights``, whose keyword-only arguments are the gate's parameters; or on a
    class that is made from its parameters once for a run and is called like that function. Such an object may be an
    `Observer`, and may have ``state``, a dict of tensors that is saved with the checkpoints; where it is an nn.Module
    its parameters are trained with the student's.

    Raises:
        ValueError: the name is taken, or the scope is none of "token", "sentence" and "batch".
    """
    if scope not in SCOPES:
        raise ValueError(f'scope of gate "{name}" is "{scope}"; it must be one of "token", "sentence", "batch"')

    def register(made):
        if name in GATES:
            raise ValueError(f'a gate named "{name}" is registered already; choose another name')
        GATES[name] = Gate(
            name, made, scope, needs_teacher, compares, uniform, timed, constant, equation, source, ranges or {}
        )
        return made

    return register


def parameters(name: str) -> dict[str, object]:
    """Names and defaults of a gate's parameters."""
    signature = inspect.signature(GATES[name].weights)
    return {
        parameter.name: parameter.default
        for parameter in signature.parameters.values()
        if parameter.kind == parameter.KEYWORD_ONLY
    }


def get_gate(gate: str | Gate, **values) -> Gate:
    """The gate of that name with these parameters; a `Gate` passes through.

    Raises:
        GateError: an unknown name (the known ones are listed), a parameter that this gate does not have or refuses.
    """
    if isinstance(gate, Gate):
        return gate
    if gate not in GATES:
        raise GateError(f'unknown gate "{gate}"; known gates: {", ".join(sorted(GATES))}')
    kind, known = GATES[gate], parameters(gate)
    for option in values:
        if option not in known:
            takers = [name for name in sorted(GATES) if option in parameters(name)]
            raise GateError(f'gate "{gate}" does not take it; it belongs to {", ".join(takers) or "no gate"}', option)
        value = values[option]
        span = kind.ranges.get(option, FINITE if isinstance(value, float) else None)
        if span and (problem := span.problem(value)):
            raise GateError(f"{value} is {span.otherwise}; with gate {gate} {problem}", option)
    made: Any = kind.weights
    if inspect.isclass(made):
        made = made(**values)
    elif known:
        made = functools.partial(made, **values)
    if values:
        made(NO_TOKENS)  # where a gate refuses a value itself it is here, not in the first step
    return replace(kind, weights=made)


NO_TOKENS = TokenStatistics(torch.zeros(0), torch.zeros(0), torch.zeros(0, dtype=torch.int64), 0, vocabulary=2)


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


# ------------------------------------------------------------------------------------------------------ the data alone


@register_gate(
    "none", equation="data 1, teacher 0", source="cross-entropy", needs_teacher=False, compares=False, constant=True
)
def none(statistics: TokenStatistics) -> GateWeights:
    ones = torch.ones_like(statistics.student_logprob)
    return GateWeights(data=ones, teacher=torch.zeros_like(ones))


# ------------------------------------------------------------------------------------------------------- the hard gate


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
    return hard_weights(sentence_margin(statistics) > 0, statistics.student_logprob.dtype)


# ------------------------------------------------------------------------------------------------------------ controls


@register_gate(
    "token-reversed", equation="g_t = 1[p_t < q_t]; data 1 - g_t, teacher g_t", source="control: HKD-T upside down"
)
def token_reversed(statistics: TokenStatistics) -> GateWeights:
    return hard_weights(statistics.student_logprob < statistics.teacher_logprob, statistics.student_logprob.dtype)


@register_gate(
    "sentence-reversed",
    scope="sentence",
    equation="g = 1[sum_t log p_t < sum_t log q_t]; data 1 - g, teacher g",
    source="control: HKD-S upside down",
)
def sentence_reversed(statistics: TokenStatistics) -> GateWeights:
    return hard_weights(sentence_margin(statistics) < 0, statistics.student_logprob.dtype)


@register_gate(
    "random",
    equation="the decisions of gate token, shuffled among the tokens in view; with --gate-share Bernoulli(share)",
    source="control: opens as often as HKD-T, but anywhere",
    ranges={"gate_share": SHARE},
)
def random(statistics: TokenStatistics, *, gate_share: float | None = None) -> GateWeights:
    student = statistics.student_logprob
    drawn = torch.rand(student.shape, device=student.device)
    if gate_share is None:
        return hard_weights((token(statistics).teacher > 0)[drawn.argsort()], student.dtype)
    return hard_weights(drawn < gate_share, student.dtype)


# --------------------------------------------------------------------------------- other published answers to "when"


def mixed(statistics: TokenStatistics, weight: float) -> GateWeights:
    """data 1 - weight, teacher weight."""
    teacher = torch.full_like(statistics.student_logprob, weight)
    return GateWeights(data=1 - teacher, teacher=teacher)


@register_gate(
    "always",
    equation="data 1 - a, teacher a (--kd-weight a)",
    source="Word-KD, Kim and Rush, EMNLP 2016, arXiv:1606.07947; SD, Furlanello et al., ICML 2018, arXiv:1805.04770",
    compares=False,
    constant=True,
    ranges={"kd_weight": SHARE},
)
def always(statistics: TokenStatistics, *, kd_weight: float = 1.0) -> GateWeights:
    return mixed(statistics, kd_weight)


@register_gate(
    "progressive",
    equation="data 1 - a u/U, teacher a u/U at update u of U (--kd-weight a)",
    source="PS-KD, Kim et al., ICCV 2021, arXiv:2006.12000, with updates in place of epochs",
    compares=False,
    constant=True,
    timed=True,
    ranges={"kd_weight": SHARE},
)
def progressive(statistics: TokenStatistics, *, kd_weight: float = 0.8) -> GateWeights:
    return mixed(statistics, kd_weight * statistics.progress)


@register_gate(
    "annealed",
    equation="teacher 1, data 0 for a share of the updates (--gate-share), then data 1, teacher 0",
    source="Annealing KD, Jafari et al., EACL 2021, arXiv:2104.07163, with KL in place of a regression on logits",
    compares=False,
    constant=True,
    timed=True,
    ranges={"gate_share": SHARE},
)
def annealed(statistics: TokenStatistics, *, gate_share: float = 0.7) -> GateWeights:
    return mixed(statistics, 1.0 if statistics.progress < gate_share else 0.0)


@register_gate(
    "soft",
    equation="g_t = sigmoid(k (log p_t - log q_t)); data 1 - g_t, teacher g_t (--gate-sharpness k)",
    source="the hard gate without its step; k -> infinity is HKD-T",
    ranges={"gate_sharpness": WEIGHT},
)
def soft(statistics: TokenStatistics, *, gate_sharpness: float = 1.0) -> GateWeights:
    teacher = torch.sigmoid(gate_sharpness * (statistics.student_logprob - statistics.teacher_logprob))
    return GateWeights(data=1 - teacher, teacher=teacher)


@register_gate(
    "soft-learned",
    equation="g_t = sigmoid(a + k (log p_t - log q_t)) with a and k learned; data 1 - g_t, teacher g_t",
    source="in the spirit of Wei et al. 2024, whose exact form is unpublished; ours",
    compares=False,
    ranges={"gate_sharpness": WEIGHT},
)
class SoftLearned(torch.nn.Module):
    """Its parameters follow the gradient of the loss: where the teacher's term is the smaller, the gate opens."""

    def __init__(self, *, gate_sharpness: float = 1.0):
        super().__init__()
        self.offset = torch.nn.Parameter(torch.zeros(()))
        self.sharpness = torch.nn.Parameter(torch.tensor(float(gate_sharpness)))

    def forward(self, statistics: TokenStatistics) -> GateWeights:
        gap = statistics.student_logprob - statistics.teacher_logprob
        teacher = torch.sigmoid(self.offset.to(gap.dtype) + self.sharpness.to(gap.dtype) * gap)
        return GateWeights(data=1 - teacher, teacher=teacher)


@register_gate(
    "instance",
    equation="data a_s, teacher b_s, learned for each training sentence s on sentences that are kept aside "
    "(--held-out, --refresh-interval, --refresh-change, --weight-rule)",
    source="ALM-KD, Sivasubramanian et al. 2022, with a step that is scaled to its gradient",
    compares=False,
    constant=True,
    ranges={
        "refresh_interval": Range(1, 2**31, "a number of epochs, 1 or more; the published one is 10"),
        "refresh_change": Range(1e-6, 2, "a change of weights between 0 and 2; 0.05 to 0.2 is usual"),
    },
)
class Instance:
    """A row of weights for each training sentence, constant between refreshes (instance_weights.py has the equations).

    State: "data" and "teacher" (S,), "held_out" (S,) bool, the sentences that are kept aside, "learned" (S,) bool,
    those whose weights were learned in some refresh, and "epoch", that of the last one. A sentence of another set
    (validation) has the weights that all begin with.
    """

    DATA, TEACHER, LARGEST = 0.1, 0.9, 2.0

    def __init__(
        self,
        *,
        held_out: str = "0.02",
        refresh_interval: int = 10,
        refresh_change: float = 0.1,
        weight_rule: str = "independent",
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


SELECTIVE = "Selective-KD, Wang et al., ACL 2021, arXiv:2105.12967"


def selected(statistics: TokenStatistics, threshold: Tensor, kd_weight: float) -> GateWeights:
    """Data 1 on all tokens, the teacher beside it where the student's NLL reaches `threshold` (0-d)."""
    student = statistics.student_logprob
    return GateWeights(data=torch.ones_like(student), teacher=kd_weight * (-student >= threshold).to(student.dtype))


@register_gate(
    "selective-batch",
    scope="batch",
    equation="data 1, teacher a 1[NLL_t in the batch's top share] (--kd-weight a, --gate-share)",
    source=SELECTIVE,
    compares=False,
    ranges={"kd_weight": WEIGHT, "gate_share": SHARE},
)
def selective_batch(statistics: TokenStatistics, *, kd_weight: float = 1.0, gate_share: float = 0.5) -> GateWeights:
    nll = -statistics.student_logprob
    if not nll.numel():
        return selected(statistics, nll.sum(), kd_weight)
    count = round(gate_share * nll.numel())
    threshold = nll.topk(count).values[-1] if count else torch.full_like(nll[0], torch.inf)
    return selected(statistics, threshold, kd_weight)


@register_gate(
    "selective-global",
    equation="data 1, teacher a 1[NLL_t >= quantile 1 - share of the last NLLs] (--kd-weight a, --gate-share, "
    "--gate-queue)",
    source=SELECTIVE,
    compares=False,
    ranges={
        "kd_weight": WEIGHT,
        "gate_share": SHARE,
        # the most that torch.quantile takes
        "gate_queue": Range(1, 2**24, "a number of tokens, 1 to 16 million; the paper's is 30000 to 50000"),
    },
)
class SelectiveGlobal:
    """The quantile of the last `gate_queue` tokens that training has seen, of all workers.

    It is taken before a batch joins the queue; while the queue is empty every token is selected.
    """

    def __init__(self, *, kd_weight: float = 1.0, gate_share: float = 0.5, gate_queue: int = 30000):
        self.kd_weight, self.share = kd_weight, gate_share
        self.size = gate_queue
        # The newest NLLs, with nan before them until there are so many, and their quantile.
        self.state = {"queue": torch.zeros(0), "threshold": torch.tensor(-torch.inf)}

    def __call__(self, statistics: TokenStatistics) -> GateWeights:
        student = statistics.student_logprob
        threshold = self.state["threshold"].to(student.device, student.dtype, non_blocking=True)
        return selected(statistics, threshold, self.kd_weight)

    def observe(self, output, gather: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Add a batch. `gather` joins one tensor of the same size from each worker. The host never waits: all sizes are
        known beforehand."""
        nll = output.token_nll.float().masked_fill(~output.tokens_mask, torch.nan).flatten()
        fresh = gather(newest(nll, self.size))
        before = {name: value.to(fresh, non_blocking=True) for name, value in self.state.items()}
        queue = newest(torch.cat([before["queue"], fresh]), self.size)
        threshold = torch.nanquantile(queue.double(), 1 - self.share).float()  # nan of none
        self.state.update(queue=queue, threshold=torch.where(threshold.isnan(), before["threshold"], threshold))


def newest(values: Tensor, size: int) -> Tensor:
    """(size,) the last of the `values` (n,) that are not nan, in their order; nan before them where they are few."""
    order = values.isnan().logical_not().to(torch.uint8).argsort(stable=True)  # nan first
    return torch.cat([values.new_full((size,), torch.nan), values[order]])[-size:]


# ---------------------------------------------------------------------------------- smoothing that depends on the token


def smoothed(data: Tensor, weight: float, gold: Tensor, vocabulary: int) -> GateWeights:
    """`data` plus `weight` times the cross-entropy with a target that has `gold` (n,) on the gold token and the rest
    spread evenly: (gold - r) onehot + V r uniform, with r = (1 - gold) / (V - 1)."""
    rest = (1 - gold) / (vocabulary - 1)
    return GateWeights(data + weight * (gold - rest), torch.zeros_like(data), weight * vocabulary * rest)


@register_gate(
    "virtual-teacher",
    needs_teacher=False,
    compares=False,
    constant=True,
    uniform=True,
    equation="(1 - a) CE + a CE(q, p), q = c on gold, the rest even, tempered (--kd-weight a, --virtual-gold c, "
    "--virtual-temperature)",
    source="TF-KD, Yuan et al., CVPR 2020, arXiv:1909.11723",
    ranges={"kd_weight": SHARE, "virtual_gold": SHARE, "virtual_temperature": POSITIVE},
)
def virtual_teacher(
    statistics: TokenStatistics,
    *,
    kd_weight: float = 0.1,
    virtual_gold: float = 0.9,
    virtual_temperature: float = 1.5,
) -> GateWeights:
    others = math.log(statistics.vocabulary - 1)
    # p^(1 / tau), normalised: gold odds are c (V - 1) / (1 - c) to one other token. In logarithms: no power overflows.
    known = (math.log(virtual_gold) if virtual_gold else -math.inf) - math.log(max(1 - virtual_gold, 1e-12))
    odds = (known + others) / virtual_temperature - others
    gold = torch.full_like(statistics.student_logprob, odds).sigmoid()
    return smoothed(torch.full_like(gold, 1 - kd_weight), kd_weight, gold, statistics.vocabulary)


@register_gate(
    "beta",
    scope="batch",
    compares=False,
    uniform=True,
    equation="(1 - a) CE + a CE(q_t, p), q_t = b_t on gold, the rest even; b ~ Beta(c, 1), sorted as the teacher's "
    "probability of gold is (--kd-weight a, --beta-shape c)",
    source="Beta smoothing, Zhang and Sabuncu, NeurIPS 2020, arXiv:2006.05065",
    ranges={"kd_weight": SHARE, "beta_shape": POSITIVE},
)
def beta(statistics: TokenStatistics, *, kd_weight: float = 0.4, beta_shape: float = 4.0) -> GateWeights:
    teacher = statistics.teacher_logprob
    # Beta(c, 1) is u^(1 / c) of a uniform u.
    drawn = torch.rand(teacher.shape, device=teacher.device, dtype=teacher.dtype).pow(1 / beta_shape).sort().values
    gold = torch.empty_like(drawn)
    gold[teacher.argsort()] = drawn
    return smoothed(torch.full_like(gold, 1 - kd_weight), kd_weight, gold, statistics.vocabulary)
