"""What a teacher says of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from hgkd_fairseq import loss
from hgkd_fairseq.loss import Head


class Gold(NamedTuple):
    """What is known of each target token beforehand, (B, T) each, in nats; at pads anything."""

    temperature: float
    logprob: Tensor  # log q of the gold token at temperature 1
    tempered: Tensor  # at `temperature`
    entropy: Tensor  # of q at `temperature`

    def at(self, temperature: float) -> Tensor | None:
        """(B, T) log q of the gold tokens; None where it is not known."""
        return {1.0: self.logprob, self.temperature: self.tempered}.get(temperature)

    def entropy_at(self, temperature: float) -> Tensor | None:
        """(B, T) H(q); None where it is not known."""
        return self.entropy if temperature == self.temperature else None


class Dense(NamedTuple):
    """Features (B, T, D) and output layer of each member of an ensemble: its logits can be made at any temperature, a
    chunk of tokens at a time. No gradient passes through them."""

    heads: list[Head]
    gold: Gold | None = None
    # Where the teacher has symbols that the student lacks: the members with all of theirs, of the same features.
    whole: Sequence[Head] = ()

    def after(self, skip: int) -> Dense:
        """From the `skip`-th target token on."""
        heads, whole = (
            [head._replace(hidden=head.hidden[:, skip:]) for head in members] for members in (self.heads, self.whole)
        )
        return Dense(heads, self.gold and _map(self.gold, lambda tensor: tensor[:, skip:]), whole)


class Sparse(NamedTuple):
    """Ids and probabilities (B, T, K) at the temperature of `gold`, and what is known of the rest."""

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
