"""Types of a teacher's output for a batch of B sentences and T target positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hgkd_fairseq import loss
from hgkd_fairseq.loss import Head


class Gold(NamedTuple):
    """Precomputed statistics of the gold tokens under the teacher, (B, T) each, in nats; undefined at padding."""

    temperature: float
    logprob: Tensor  # log q of the gold token at temperature 1
    tempered: Tensor  # log q of the gold token at `temperature`
    entropy: Tensor  # entropy of q at `temperature`

    def at(self, temperature: float) -> Tensor | None:
        """Return log q of the gold tokens (B, T) at a temperature, or None if it was not precomputed."""
        return {1.0: self.logprob, self.temperature: self.tempered}.get(temperature)

    def entropy_at(self, temperature: float) -> Tensor | None:
        """Return the entropy of q (B, T) at a temperature, or None if it was not precomputed."""
        return self.entropy if temperature == self.temperature else None


class Dense(NamedTuple):
    """The complete distribution of a teacher, as features and output layer of each ensemble member.

    The loss computes the logits from them at any temperature, for a chunk of tokens at a time, without gradient.
    """

    heads: list[Head]  # one per member, hidden (B, T, D); empty if only `gold` is known
    gold: Gold | None = None
    # The same features with all symbols of the members, if the teacher has symbols that the student lacks; else empty.
    whole: Sequence[Head] = ()

    def after(self, skip: int) -> Dense:
        """Return the output without the first `skip` target positions."""
        heads, whole = (
            [head._replace(hidden=head.hidden[:, skip:]) for head in members] for members in (self.heads, self.whole)
        )
        return Dense(heads, self.gold and _map(self.gold, lambda tensor: tensor[:, skip:]), whole)


class Sparse(NamedTuple):
    """A part of a teacher's distribution: the ids and probabilities (B, T, K) of K tokens at ``gold.temperature``."""

    distribution: loss.Sparse
    gold: Gold

    @property
    def heads(self) -> list[Head]:
        return []

    def after(self, skip: int) -> Sparse:
        def cut(tensor: Tensor) -> Tensor:
            return tensor[:, skip:]

        return Sparse(self.distribution.map(cut), _map(self.gold, cut))


def _map(gold: Gold, function: Callable[[Tensor], Tensor]) -> Gold:
    return Gold(gold.temperature, *map(function, gold[1:]))


Signal = Dense | Sparse
