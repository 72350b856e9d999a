"""The interface between gates and loss: the statistics that a gate reads, its weights, and its description."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hgkd_fairseq.ranges import Range


class TokenStatistics(NamedTuple):
    """Statistics of n of the N non-pad tokens of a batch, in order: the input of a gate. Detached, in fp32 or fp64.

    The n tokens are whole sentences for a gate of scope "sentence", all N tokens for scope "batch", and any run of
    consecutive tokens for scope "token".
    """

    student_logprob: Tensor  # (n,) nats, student's log-probability of the token that the gate reads, untempered
    teacher_logprob: Tensor  # (n,) nats, teacher's log-probability of the same token
    sentence: Tensor  # (n,) int64, index of the token's sentence, from 0 to sentence_count - 1
    sentence_count: int  # S; may exceed the number of sentences, so that some indices do not occur
    vocabulary: int = 0  # V, number of tokens in the vocabulary
    progress: float = 0.0  # fraction of the training updates that are done, 0 to 1
    instance: Tensor | None = None  # (n,) int64, index of the token's sentence in the training set, None outside
    #                                of it; for the gate "pair" index of the token's language pair
    asked: Mapping[str, Tensor] = MappingProxyType({})  # (n,) each, the further statistics of `Gate.asks`, by name


# Further statistics that a gate may request by name. p is the student's distribution, q the teacher's at the
# temperature at which the gate reads it.
ASKED = {
    "student_above": "sum_v p(v) 1[p(v) > q(v)]",
    "student_entropy": "H(p), nats",
    "teacher_entropy": "H(q), nats",
}


class GateWeights(NamedTuple):
    """Weights of the terms of the loss, each of shape (n,) and of the statistics' dtype."""

    data: Tensor
    teacher: Tensor
    uniform: Tensor | None = None  # weight of the cross-entropy with the uniform distribution; None: 0

    @property
    def teacher_share(self) -> Tensor:
        """The teacher's share of the two weights, teacher / (data + teacher), (n,); 0 where both are 0."""
        return self.teacher / (self.data + self.teacher).clamp(min=torch.finfo(self.teacher.dtype).tiny)


class GateError(ValueError):
    """Raised for an unknown or invalid gate or gate parameter; `option` is the parameter's name, or "gate"."""

    def __init__(self, message: str, option: str = "gate"):
        super().__init__(message)
        self.option = option


class Option(NamedTuple):
    """Help text, range and choices of a gate's parameter, given in the annotation of the parameter::

    def soft(statistics, *, gate_sharpness: Annotated[float, Option("slope k", WEIGHT)] = 1.0)
    """

    help: str
    range: Range | None = None  # allowed values of a number; None: any finite number
    choices: tuple[str, ...] = ()


class Parameter(NamedTuple):
    """A parameter of a gate. It is also a command-line option: gate_share is --gate-share."""

    name: str
    type: type  # float, int or str
    default: Any
    option: Option

    def problem(self, value: Any, gate: str) -> str | None:
        """Return None if the parameter of `gate` may have this value, otherwise a message that says why it may not.

        Type, choices and range are checked; a float may be given as an int.
        """
        allowed = (int, float) if self.type is float else self.type
        if not isinstance(value, allowed) or isinstance(value, bool):
            return f"{value!r} is no {self.type.__name__}"
        if self.option.choices and value not in self.option.choices:
            return f'"{value}" is none of {", ".join(self.option.choices)}'
        span = self.option.range
        if span and (problem := span.problem(value)):
            return f"{value} is {span.otherwise}; with gate {gate} {problem}"
        return None


@runtime_checkable
class Observer(Protocol):
    """A gate that receives the outcome of each training step."""

    def observe(self, output, gather: Callable[[Tensor], Tensor]) -> None:
        """Process the outcome of one training batch. Each worker calls it for each batch, before the gradient is used.

        Args:
            output: the :class:`hgkd_fairseq.loss.DistillationOutput` of the worker's batch. If the batch is repeated
                only to keep the workers in step, its `tokens_mask` is False everywhere.
            gather: function that concatenates the tensors of all data-parallel workers, which have the same size, along
                the first dimension.
        """


@runtime_checkable
class Remembering(Protocol):
    """A gate with state: `state` is saved with the checkpoints and restored when training resumes."""

    state: dict[str, Tensor]


@dataclass(frozen=True)
class Gate:
    """The function that computes a gate's weights, and the properties of the gate that loss and criterion rely on.

    The gates in `GATES` are unbound; `get_gate` returns a gate with its parameters bound.

    Attributes:
        name: the value of ``--gate``.
        weights: callable ``TokenStatistics -> GateWeights``; of an unbound gate that is a class, the class.
        scope: ``"token"`` if each token is decided alone, ``"sentence"`` if the gate needs whole sentences (the loss
            then cuts its chunks between sentences), ``"batch"`` if it needs all tokens of the batch (the loss then
            computes the forward products twice: once for the statistics, once for the gradients).
        needs_teacher: False for a gate whose teacher weight is always 0.
        compares: whether the gate compares the student's probability of a token with the teacher's, so that ``gate_on``
            and ``tempered_gate`` apply to it.
        uniform: whether the weights have a `uniform` part.
        timed: whether the weights depend on `progress`, so that the length of the training must be known.
        constant: whether the weights do not depend on the two log-probabilities, so that they are known in advance.
        asks: names of the further statistics, keys of `ASKED`, that the gate requests. The kernels compute only the
            teacher's entropy, and only at the loss's temperature; for anything else plain torch computes the rows.
        closes: whether the gate gives some tokens the teacher weight 0. If the teacher's log-probabilities of the gold
            tokens are known in advance, such a gate is evaluated first, and their logits are not computed.
        parameters: declared parameters by name.
        equation: the weights in one line, as printed by ``hgkd gates``.
        source: the paper that the gate comes from.
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
        """Whether the gate is an nn.Module, whose parameters are trained with the student's."""
        return isinstance(self.weights, torch.nn.Module)

    @property
    def observer(self) -> Observer | None:
        """The gate's `weights` if they are an `Observer`, otherwise None."""
        return self.weights if isinstance(self.weights, Observer) else None

    @property
    def remembering(self) -> Remembering | None:
        """The gate's `weights` if they are `Remembering`, otherwise None."""
        return self.weights if isinstance(self.weights, Remembering) else None
