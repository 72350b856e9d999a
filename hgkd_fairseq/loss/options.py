"""The settings of the loss, checked once, and the per-token results that every implementation returns."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq.gates import Gate, GateWeights
from hgkd_fairseq.ranges import BELOW_1, POSITIVE, SHARE, WEIGHT

GATE_ON = {
    "gold": "the gold one",
    "argmax": "the student's argmax",
    "student-draw": "one drawn from the student's distribution",
    "teacher-draw": "one drawn from the teacher's, as the gate reads it",
}
DRAWN = ("student-draw", "teacher-draw")
FUSED_GATE_ON = ("gold", "argmax")  # of these, what the kernels know
FUSED = "kl"  # the divergence that the kernels know
FUSED_ASKS = {"teacher_entropy"}  # what gates may ask for of the kernels, at the teacher's temperature, and of stores
TEACHER_TEMPERATURE = 1.5  # of the paper
JSD_BETA, SKEW_ALPHA = 0.5, 0.1  # the Jensen-Shannon divergence; as DistiLLM has it
RANGES = {
    "teacher_temperature": POSITIVE,
    "label_smoothing": BELOW_1,
    "confidence_penalty": WEIGHT,
    "jsd_beta": SHARE,
    "skew_alpha": BELOW_1,
}

# A chunk's weights: known beforehand, or made from the log-probability of the token that the gate reads under the
# student and under the teacher, each (C,), and from what else the gate asks for, where it does.
Decide = GateWeights | Callable[..., GateWeights]


def decided(decide: Decide, student_read: Tensor, teacher_read: Tensor, *asked: dict[str, Tensor]) -> GateWeights:
    return decide if isinstance(decide, GateWeights) else decide(student_read, teacher_read, *asked)


class Sparse(NamedTuple):
    """A teacher's distribution q, at its temperature, of which the probabilities of K tokens are known; exactly, or as
    an unbiased estimate of all of q, the shares of draws from it."""

    ids: Tensor  # (..., K) int64; fewer than K repeat the first, with probability 0
    probability: Tensor  # (..., K), with the rest they sum to 1
    rest: Tensor | None = None  # (...,) the probability of all other tokens together; None: 0
    entropy: Tensor | None = None  # (...,) nats, of the whole q, for the value of the KL; None: that of what is known

    def map(self, function: Callable[[Tensor], Tensor]) -> Sparse:
        return Sparse(*[None if tensor is None else function(tensor) for tensor in self])  # type: ignore[arg-type]


class Known(NamedTuple):
    """What is known beforehand of N tokens, besides the logits or in place of them."""

    gold: Tensor | None = None  # (N,) nats, log q of the gold token as the gate reads it
    sparse: Sparse | None = None  # (N, K)
    student: Tensor | None = None  # (N,) nats, log p of the gold token, which the gate reads in place of the student's
    entropy: Tensor | None = None  # (N,) nats, of q as the gate reads it, for a gate that asks for it

    def map(self, function: Callable[[Tensor], Tensor]) -> Known:
        sparse = None if self.sparse is None else self.sparse.map(function)
        rest = (self.gold, self.student, self.entropy)
        gold, student, entropy = (None if tensor is None else function(tensor) for tensor in rest)
        return Known(gold, sparse, student, entropy)

    def suffices(self, options: Options) -> bool:
        """Whether it is all that the gate reads of the teacher."""
        asks = set(options.gate.asks) - ({"teacher_entropy"} if self.entropy is not None else set())
        return self.gold is not None and not asks

    def asked(
        self, made: Sequence[dict[str, Tensor]], dtype: torch.dtype, rows: slice = slice(None)
    ) -> Sequence[dict[str, Tensor]]:
        """What the gate asks for of some rows: of what was `made` for it, one dict or none, and what is known, which
        goes before."""
        if self.entropy is None:
            return made
        return [{**dict(*made), "teacher_entropy": self.entropy[rows].to(dtype)}]


NOTHING = Known()


class Head(NamedTuple):
    """Features and the linear layer that turns them into logits over the vocabulary.

    ``weight=None`` means that ``hidden`` holds the logits themselves (or log-probabilities).
    """

    hidden: Tensor  # (..., D), or (..., V) where weight is None
    weight: Tensor | None  # (V, D)
    bias: Tensor | None = None  # (V,)

    @property
    def vocabulary(self) -> int:
        return self.hidden.size(-1) if self.weight is None else self.weight.size(0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        """The head with `function` of each tensor that it has."""
        return Head(*[None if tensor is None else function(tensor) for tensor in self])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Options:
    """How the loss is computed; see :func:`hgkd_fairseq.loss.gated_distillation` for the meaning of each."""

    gate: Gate
    gate_on: str = "gold"
    teacher_temperature: float = TEACHER_TEMPERATURE
    tempered_gate: bool = True
    label_smoothing: float = 0.0
    confidence_penalty: float = 0.0
    progress: float = 0.0
    top1: bool = False
    divergence: str = FUSED  # a key of equations.DIVERGENCES
    jsd_beta: float = JSD_BETA
    skew_alpha: float = SKEW_ALPHA

    def __post_init__(self):
        if self.gate_on not in GATE_ON:
            raise ValueError(f'gate_on is "{self.gate_on}"; it must be one of {", ".join(GATE_ON)}')
        for name, span in {**RANGES, "progress": SHARE}.items():
            if problem := span.problem(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}; {problem}")

    @property
    def needs_argmax(self) -> bool:
        return self.top1 or (self.gate_on == "argmax" and self.gate.needs_teacher)

    @property
    def fused(self) -> bool:
        """Whether the rows' own mathematics, and so the kernels, may know it; else `rows.autograd_step` does it."""
        asks = not self.gate.asks or (set(self.gate.asks) <= FUSED_ASKS and not self.reads_untempered)
        return self.divergence == FUSED and self.gate_on in FUSED_GATE_ON and asks

    @property
    def needs_mean(self) -> bool:
        """Whether the mean log-probability over the vocabulary is part of the loss."""
        return self.label_smoothing > 0 or self.gate.uniform

    @property
    def reads_untempered(self) -> bool:
        """Whether the gate reads the teacher at temperature 1 and the loss another one."""
        return self.gate.needs_teacher and not self.tempered_gate and self.teacher_temperature != 1

    @property
    def closes_first(self) -> bool:
        """Whether the gate may be decided before the teacher's logits are made, and it pays: it gives tokens no
        teacher, and asks nothing of it but the gold token's log-probability."""
        more = self.gate_on != "gold" or bool(self.gate.asks) or self.gate.learned
        return self.gate.closes and not more

    @property
    def asked_outside(self) -> Options:
        """The same with a gate that no kernel recognises: it reads other numbers than the kernel's own."""
        if self.gate.learned:  # none does
            return self
        return replace(self, gate=replace(self.gate, weights=functools.partial(self.gate.weights)))

    @property
    def without_teacher(self) -> Options:
        """The same for rows to which the gate gives no teacher."""
        return replace(self, gate=replace(self.gate, needs_teacher=False))

    def gold_weight(self, vocabulary: int) -> tuple[float, float]:
        """(weight of the gold token, weight of every token) of fairseq's label smoothing: eps_i = eps / (V - 1)."""
        every = self.label_smoothing / (vocabulary - 1)
        return 1 - self.label_smoothing - every, every


class TokenResults(NamedTuple):
    """Per-token results for N tokens, detached except `loss`; `None` where not asked for."""

    loss: Tensor  # (N,) or, where an implementation sums as it goes, a scalar sum
    nll: Tensor  # (N,) nats, plain -log p(gold)
    data_term: Tensor  # (N,) nats, what the gate's data weight multiplies
    kl: Tensor  # (N,) nats, the divergence, KL(teacher || student), of every token, whatever its weight; 0: no teacher,
    #             or a gate that was decided first gave the token none
    uniform_term: Tensor | None  # (N,) nats, the cross-entropy with the uniform distribution; of a gate that weights it
    student_read: Tensor  # (N,) nats, log p of the token the gate reads
    teacher_read: Tensor  # (N,) nats, log q of it; that of the student without a teacher
    teacher_mask: Tensor  # (N,) bool, teacher weight > 0
    confidence: Tensor | None  # (N,) probability of the student's argmax
    correct: Tensor | None  # (N,) bool, the student's argmax is the gold token
    teacher_share: Tensor | None = None  # (N,) teacher weight of both weights; None: teacher_mask says it, 0 or 1
