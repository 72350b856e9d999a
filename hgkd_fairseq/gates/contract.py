"""What a gate sees, what it answers, and what it may be: the contract between gates and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hgkd_fairseq.ranges import Range


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
    instance: Tensor | None = None  # (n,) int64, number of the token's sentence in the training set, None
    #                                outside of it; for the gate "pair" of its language pair
    asked: Mapping[str, Tensor] = MappingProxyType({})  # (n,) each, what the gate asks for of ASKED


# What a gate may ask for by name, of the student's distribution p and the teacher's q as the gate reads it.
ASKED = {
    "student_above": "sum_v p(v) 1[p(v) > q(v)]",
    "student_entropy": "H(p), nats",
    "teacher_entropy": "H(q), nats",
}


class GateWeights(NamedTuple):
    """Weights of the terms of the loss, each (n,) and of the statistics' dtype."""

    data: Tensor
    teacher: Tensor
    uniform: Tensor | None = None  # of the cross-entropy with the uniform distribution; None: 0

    @property
    def teacher_share(self) -> Tensor:
        """(n,) teacher / (data + teacher); 0 where both are."""
        return self.teacher / (self.data + self.teacher).clamp(min=torch.finfo(self.teacher.dtype).tiny)


class GateError(ValueError):
    """A gate, or a parameter of one, that does not exist or does not fit; `option` is the parameter, or "gate"."""

    def __init__(self, message: str, option: str = "gate"):
        super().__init__(message)
        self.option = option


class Option(NamedTuple):
    """Of a gate's parameter what its type and default do not say; written where the parameter is::

    def soft(statistics, *, gate_sharpness: Annotated[float, Option("slope k", WEIGHT)] = 1.0)
    """

    help: str
    range: Range | None = None  # a number without one must be finite
    choices: tuple[str, ...] = ()


class Parameter(NamedTuple):
    """A gate's parameter, which is an option of the command line: gate_share is --gate-share."""

    name: str
    type: type  # float, int or str
    default: Any
    option: Option

    def problem(self, value: Any, gate: str) -> str | None:
        """None for a value that it may have in that gate; otherwise what is wrong with it."""
        if self.option.choices and value not in self.option.choices:
            return f'"{value}" is none of {", ".join(self.option.choices)}'
        span = self.option.range
        if span and (problem := span.problem(value)):
            return f"{value} is {span.otherwise}; with gate {gate} {problem}"
        return None


@runtime_checkable
class Observer(Protocol):
    """A gate that sees what came of each training step."""

    def observe(self, output, gather: Callable[[Tensor], Tensor]) -> None:
        """Called with each batch that a worker trains on, before its gradient is used.

        Args:
            output: the :class:`hgkd_fairseq.loss.DistillationOutput` of the worker's batch. Where the batch was only
                repeated to keep the workers in step, its `tokens_mask` is False everywhere.
            gather: joins one tensor of the same size from each data-parallel worker, along the first dimension.
        """


@runtime_checkable
class Remembering(Protocol):
    """A gate that remembers: `state` is saved with the checkpoints and given back when training resumes."""

    state: dict[str, Tensor]


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
            ``tempered_gate`` mean something.
        uniform: whether its weights have a `uniform` part.
        timed: whether it changes with `progress`, so that the length of the training must be known.
        constant: whether its weights do not depend on the two log-probabilities, so that they are known beforehand.
        asks: the statistics of `ASKED` that it sees beside them. The kernels make the teacher's entropy, at the loss's
            temperature; with any other plain torch does the rows.
        closes: whether it gives tokens the teacher's weight 0, so that it pays to decide before the teacher's logits
            are made, where the teacher's log-probabilities of the gold tokens are known.
        parameters: by name, as the gate declares them.
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
    asks: tuple[str, ...] = ()
    closes: bool = False
    equation: str = ""
    source: str = ""
    parameters: Mapping[str, Parameter] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        """Whether the gate has parameters that are trained with the student's."""
        return isinstance(self.weights, torch.nn.Module)

    @property
    def observer(self) -> Observer | None:
        """Itself, where it sees what came of each training step."""
        return self.weights if isinstance(self.weights, Observer) else None

    @property
    def remembering(self) -> Remembering | None:
        """Itself, where it has a memory that is kept with the checkpoints."""
        return self.weights if isinstance(self.weights, Remembering) else None
