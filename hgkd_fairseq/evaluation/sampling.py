"""Reproducible sampling of translations: the draws of a sentence depend on the seed and the sentence's number, not on
its batch, the order of the batches or the process."""

from __future__ import annotations

import torch
from fairseq.search import Search
from torch import Tensor

# The constants of splitmix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers.
STEP, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(number: Tensor) -> Tensor:
    """Apply the finalizer of splitmix64 to each of the int64 numbers."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        number = (number ^ ((number >> shift) & (2 ** (64 - shift) - 1))) * factor
    return number ^ ((number >> 31) & (2**33 - 1))


def uniform(seed: int, sentence: Tensor, step: int, beam: Tensor) -> Tensor:
    """Compute pseudorandom numbers, uniform in (0, 1), for the draws of a decoding step.

    Args:
        seed: any integer.
        sentence: int64 numbers of the sentences.
        step: index of the step, less than 2**20.
        beam: int64 indices in the beam, broadcast with `sentence`.

    Returns:
        float64 numbers, in the broadcast shape.
    """
    offset = (seed * STEP + 2**63) % 2**64 - 2**63  # as a signed 64-bit integer
    state = mixed(mixed(sentence * 2**20 + step) + offset)
    return ((mixed(state + (beam + 1) * STEP) & (2**32 - 1)).double() + 0.5) / 2**32


def placed(cumulated: Tensor, drawn: Tensor) -> Tensor:
    """Draw from cumulative distributions by inversion.

    Args:
        cumulated: (..., V) cumulative probabilities, which need not end at 1.
        drawn: (..., 1) uniform numbers in (0, 1).

    Returns:
        (..., 1) int64, the first index whose cumulative probability exceeds the share `drawn` of the total.
    """
    place = torch.searchsorted(cumulated, drawn * cumulated[..., -1:], right=True)
    return place.clamp(max=cumulated.size(-1) - 1)


class SeededSampling(Search):
    """Sampling for fairseq's search, as its own class Sampling, with draws by :func:`uniform`.

    Args:
        dictionary: target dictionary.
        seed: seed of the draws.
        topk: sample from the k most probable tokens; 0: from all.
        topp: sample from the smallest set of most probable tokens whose total probability reaches p; 0: from all.
    """

    def __init__(self, dictionary, seed: int, topk: int = 0, topp: float = 0.0):
        super().__init__(dictionary)
        self.seed, self.topk, self.topp = seed, topk, topp

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """Draw the next token of each hypothesis.

        Args:
            step: index of the step.
            lprobs: (B, beam, V) log-probabilities of the next token.
            scores: (B, beam, step) cumulative log-probabilities of the hypotheses.
            prev_output_tokens: not used.
            original_batch_idxs: (B,) numbers of the sentences.

        Returns:
            Cumulative log-probabilities, tokens, and indices of the hypotheses that they continue, (B, beam) each.
        """
        beam = torch.arange(lprobs.size(1), device=lprobs.device)
        probability, types = lprobs.double().softmax(-1), None
        if self.topk:
            probability, types = probability.topk(min(self.topk, probability.size(-1)))
        elif self.topp:
            probability, types = probability.sort(descending=True, stable=True)
        cumulated = probability.cumsum(-1)
        if self.topp:  # up to the first token with which the sum reaches p
            last = (cumulated < self.topp).sum(-1, keepdim=True).clamp(max=cumulated.size(-1) - 1)
            cumulated = cumulated.minimum(cumulated.gather(-1, last))
        drawn = uniform(self.seed, original_batch_idxs[:, None], step, beam)[..., None]
        place = placed(cumulated, drawn)
        found = (place if types is None else types.gather(-1, place)).squeeze(-1)
        gained = lprobs.gather(-1, found[..., None]).squeeze(-1)
        if step:
            gained = gained + scores[:, :, step - 1]
        return gained, found, beam.expand_as(found)
