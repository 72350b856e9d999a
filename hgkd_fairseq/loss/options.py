"""Options of the loss, and the inputs and per-token results that its implementations share."""

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
FUSED_GATE_ON = ("gold", "argmax")  # the values of gate_on that the kernels support
FUSED = "kl"  # the divergence that the kernels implement
# The statistics requested by gates that the kernels compute (at the teacher's temperature) and that stores contain.
FUSED_ASKS = {"teacher_entropy"}
TEACHER_TEMPERATURE = 1.5  # the paper's
JSD_BETA, SKEW_ALPHA = 0.5, 0.1  # the ordinary Jensen-Shannon divergence; the value of DistiLLM
RANGES = {
    "teacher_temperature": POSITIVE,
    "label_smoothing": BELOW_1,
    "confidence_penalty": WEIGHT,
    "jsd_beta": SHARE,
    "skew_alpha": BELOW_1,
}

# The weights of a chunk of C tokens, or a function that computes them: from the log-probabilities (C,) of the token
# that the gate reads, under student and teacher, and, if the gate requests further statistics, a dict of these.
Decide = GateWeights | Callable[..., GateWeights]


def decided(decide: Decide, student_read: Tensor, teacher_read: Tensor, *asked: dict[str, Tensor]) -> GateWeights:
    return decide if isinstance(decide, GateWeights) else decide(student_read, teacher_read, *asked)


class Sparse(NamedTuple):
    """The probabilities of K tokens under the teacher's distribution q at its temperature.

    They are either exact, or the relative frequencies of tokens sampled from q, which are an unbiased estimate of q.
    """

    ids: Tensor  # (..., K) int64; if fewer than K tokens are known, the first is repeated with probability 0
    probability: Tensor  # (..., K); their sum plus the rest is 1
    rest: Tensor | None = None  # (...,) total probability of all other tokens; None: 0
    entropy: Tensor | None = None  # (...,) nats, of the full q, for the value of the KL; None: of the known part

    def map(self, function: Callable[[Tensor], Tensor]) -> Sparse:
        return Sparse(*[None if tensor is None else function(tensor) for tensor in self])  # type: ignore[arg-type]


class Known(NamedTuple):
    """Values of N tokens that are known in advance, in addition to the logits or in place of them."""

    gold: Tensor | None = None  # (N,) nats, log q of the gold token as the gate reads it
    sparse: Sparse | None = None  # (N, K), q in place of the teacher's logits
    student: Tensor | None = None  # (N,) nats, log p of the gold token, read by the gate in place of its own
    entropy: Tensor | None = None  # (N,) nats, entropy of q as the gate reads it, for a gate that requests it

    def map(self, function: Callable[[Tensor], Tensor]) -> Known:
        sparse = None if self.sparse is None else self.sparse.map(function)
        rest = (self.gold, self.student, self.entropy)
        gold, student, entropy = (None if tensor is None else function(tensor) for tensor in rest)
        return Known(gold, sparse, student, entropy)

    def suffices(self, options: Options) -> bool:
        """Return whether these values are all that the gate reads of the teacher."""
        asks = set(options.gate.asks) - ({"teacher_entropy"} if self.entropy is not None else set())
        return self.gold is not None and not asks

    def asked(
        self, made: Sequence[dict[str, Tensor]], dtype: torch.dtype, rows: slice = slice(None)
    ) -> Sequence[dict[str, Tensor]]:
        """Return the statistics of some rows that the gate requests, as a sequence of at most one dict.

        They are those in `made`, which were computed from the logits, and the known ones, which take precedence.
        """
        if self.entropy is None:
            return made
        return [{**dict(*made), "teacher_entropy": self.entropy[rows].to(dtype)}]


NOTHING = Known()


class Head(NamedTuple):
    """Hidden states and the linear layer that projects them to logits over the vocabulary.

    ``weight=None`` means that ``hidden`` is the logits themselves (or log-probabilities).
    """

    hidden: Tensor  # (..., D), or (..., V) if weight is None
    weight: Tensor | None  # (V, D)
    bias: Tensor | None = None  # (V,)

    @property
    def vocabulary(self) -> int:
        return self.hidden.size(-1) if self.weight is None else self.weight.size(0)

    def map(self, function: Callable[[Tensor], Tensor]) -> Head:
        """Return the head with `function` applied to each of its tensors."""
        return Head(*[None if tensor is None else function(tensor) for tensor in self])  # type: ignore[arg-type]


@dataclass(frozen=True)
class Options:
    """Options of the loss; :func:`hgkd_fairseq.loss.gated_distillation` documents each of them.

    Raises:
        ValueError: `gate_on` is unknown, or a number is out of its range.
    """

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
        """Whether `rows.row_statistics` (and a kernel) can compute these options; else `rows.autograd_step` does."""
        if not self.gate.needs_teacher:  # neither the divergence nor the token that the gate reads matters
            return not self.gate.asks
        asks = not self.gate.asks or (set(self.gate.asks) <= FUSED_ASKS and not self.reads_untempered)
        return self.divergence == FUSED and self.gate_on in FUSED_GATE_ON and asks

    @property
    def needs_mean(self) -> bool:
        """Whether the loss contains the mean log-probability over the vocabulary."""
        return self.label_smoothing > 0 or self.gate.uniform

    @property
    def reads_untempered(self) -> bool:
        """Whether the gate reads the teacher at temperature 1 while the loss uses another temperature."""
        return self.gate.needs_teacher and not self.tempered_gate and self.teacher_temperature != 1

    @property
    def closes_first(self) -> bool:
        """Whether the gate can be evaluated first, so that the teacher's logits are not needed for all tokens.

        This is so if it gives some tokens no teacher weight, reads nothing of the teacher but the log-probability of
        the gold token, and is not learned.
        """
        more = self.gate_on != "gold" or bool(self.gate.asks) or self.gate.learned
        return self.gate.closes and not more

    @property
    def asked_outside(self) -> Options:
        """These options with a gate that no kernel recognises, so that it is evaluated outside the kernel.

        A kernel would apply a gate that it recognises to the log-probabilities that it computes, not to given ones.
        """
        if self.gate.learned:  # no kernel recognises it
            return self
        return replace(self, gate=replace(self.gate, weights=functools.partial(self.gate.weights)))

    @property
    def without_teacher(self) -> Options:
        """These options for rows whose teacher weight is 0."""
        return replace(self, gate=replace(self.gate, needs_teacher=False))

    def gold_weight(self, vocabulary: int) -> tuple[float, float]:
        """Return fairseq's label smoothing as (weight of the gold token, weight of every token).

        They are 1 - eps - eps_i and eps_i, with eps_i = eps / (V - 1); the gold token has both.
        """
        every = self.label_smoothing / (vocabulary - 1)
        return 1 - self.label_smoothing - every, every


class TokenResults(NamedTuple):
    """Per-token results of N tokens, detached except for `loss`; None if not requested."""

    loss: Tensor  # (N,) nats, or their sum, a scalar, from an implementation that computes chunks
    nll: Tensor  # (N,) nats, plain -log p(gold)
    data_term: Tensor  # (N,) nats, the term that the data weight multiplies
    kl: Tensor  # (N,) nats, the divergence of the student from the teacher, whatever its weight; 0 without a teacher
    #             and if the gate, evaluated before the teacher's logits, gives the token no teacher weight
    uniform_term: Tensor | None  # (N,) nats, the cross-entropy with the uniform distribution, if the gate weights it
    student_read: Tensor  # (N,) nats, log p of the token that the gate reads
    teacher_read: Tensor  # (N,) nats, log q of the same token; without a teacher equal to student_read
    teacher_mask: Tensor  # (N,) bool, teacher weight > 0
    confidence: Tensor | None  # (N,) probability of the student's argmax
    correct: Tensor | None  # (N,) bool, whether the student's argmax is the gold token
    teacher_share: Tensor | None = None  # (N,) teacher weight / (data + teacher weight); None: teacher_mask, 0 or 1
