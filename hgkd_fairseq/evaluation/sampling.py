"""Sampling of translations in which what is drawn for a sentence depends on the seed and the sentence's number, and not
on the batch that it is in, on the order of the batches or on the process."""

from __future__ import annotations

import torch
from fairseq.search import Search
from torch import Tensor

# The constants of splitmix64 (Steele, Lea, Flood 2014), as signed numbers.
STEP, FIRST, SECOND = (number - 2**64 for number in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def mixed(number: Tensor) -> Tensor:
    """splitmix64's finaliser, of int64."""
    for shift, factor in ((30, FIRST), (27, SECOND)):
        number = (number ^ ((number >> shift) & (2 ** (64 - shift) - 1))) * factor
    return number ^ ((number >> 31) & (2**33 - 1))


def uniform(seed: int, sentence: Tensor, step: int, beam: Tensor) -> Tensor:
    """Numbers of (0, 1), float64, one for each of `sentence` (int64) and `beam`, which are broadcast."""
    offset = (seed * STEP + 2**63) % 2**64 - 2**63  # of 64 bits, with a sign
    state = mixed(mixed(sentence * 2**20 + step) + offset)
    return ((mixed(state + (beam + 1) * STEP) & (2**32 - 1)).double() + 0.5) / 2**32


def placed(cumulated: Tensor, drawn: Tensor) -> Tensor:
    """(..., 1) int64, the first of cumulated probabilities (..., V) that is above `drawn` (..., 1) of their sum."""
    place = torch.searchsorted(cumulated, drawn * cumulated[..., -1:], right=True)
    return place.clamp(max=cumulated.size(-1) - 1)


class SeededSampling(Search):
    """fairseq's sampling (from the top k types, or the smallest set of probability p), drawn by :func:`uniform`."""

    def __init__(self, dictionary, seed: int, topk: int = 0, topp: float = 0.0):
        super().__init__(dictionary)
        self.seed, self.topk, self.topp = seed, topk, topp

    def step(self, step, lprobs, scores, prev_output_tokens=None, original_batch_idxs=None):
        """Args:
            lprobs: (B, beam, V).
            scores: (B, beam, step), cumulated.
            original_batch_idxs: (B,) numbers of the sentences.

        Returns: scores, types and places among the beams, (B, beam) each.
        """
        beam = torch.arange(lprobs.size(1), device=lprobs.device)
        probability, types = lprobs.double().softmax(-1), None
        if self.topk:
            probability, types = probability.topk(min(self.topk, probability.size(-1)))
        elif self.topp:
            probability, types = probability.sort(descending=True, stable=True)
        cumulated = probability.cumsum(-1)
        if self.topp:  # up to the first type with which the sum reaches p
            last = (cumulated < self.topp).sum(-1, keepdim=True).clamp(max=cumulated.size(-1) - 1)
            cumulated = cumulated.minimum(cumulated.gather(-1, last))
        drawn = uniform(self.seed, original_batch_idxs[:, None], step, beam)[..., None]
        place = placed(cumulated, drawn)
        found = (place if types is None else types.gather(-1, place)).squeeze(-1)
        gained = lprobs.gather(-1, found[..., None]).squeeze(-1)
        if step:
            gained = gained + scores[:, :, step - 1]
        return gained, found, beam.expand_as(found)
