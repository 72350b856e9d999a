"""Confidence intervals by resampling sentences, streaming: the tokens of one sentence are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95
SENTENCES = 1000  # whose draws are alive at a time


def poisson_draws(sentences: Sequence[int], replicates: int, seed: int) -> np.ndarray:
    """(S, R) uint8, how often each of S sentences counts in each resample; see :class:`SentenceBootstrap`."""
    found = np.empty((len(sentences), replicates), np.uint8)  # more than 255 times has a probability of 1e-508
    for row, number in zip(found, sentences, strict=True):
        row[:] = np.random.default_rng([seed, number]).poisson(1.0, replicates)
    return found


class SentenceBootstrap:
    """Sums of per-sentence statistics under `replicates` resamples of the sentences, in (replicates, K) numbers.

    In each replicate a sentence counts as often as a Poisson variable of mean 1 says, which for many sentences is the
    bootstrap's drawing with replacement (Hanley and MacGibbon 2006; Chamandy et al. 2012). The draws of a sentence
    depend on the seed and its number alone: not on order, batches or workers, and two models scored on one test set are
    resampled alike, so that the difference of their replicates is a paired bootstrap.

    Args:
        statistics: K, numbers a sentence.
        replicates: resamples.
        seed: at least 0.
    """

    def __init__(self, statistics: int, replicates: int = 1000, seed: int = 1):
        self.seed = seed
        self.sums = torch.zeros(replicates, statistics, dtype=torch.float64)

    def update(self, sentences: Sequence[int], statistics: Tensor) -> None:
        """Add S sentences: their numbers (each to be given once, at least 0) and statistics (S, K)."""
        statistics = statistics.cpu().double()
        for start in range(0, len(sentences), SENTENCES):
            some = slice(start, start + SENTENCES)
            draws = poisson_draws(sentences[some], self.sums.size(0), self.seed)
            self.sums += torch.from_numpy(draws).double().T @ statistics[some]

    def merge(self, other: SentenceBootstrap) -> None:
        """Add the sentences of another one. Raises ValueError where seeds or shapes differ."""
        if (other.seed, other.sums.shape) != (self.seed, self.sums.shape):
            raise ValueError("cannot merge bootstraps of different seeds, replicates or statistics")
        self.sums = self.sums + other.sums

    def interval(self, score: Callable[[Tensor], Tensor], level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Percentile interval (Efron and Tibshirani 1993, chapter 13) of a score.

        Noise makes an ECE larger, in a resample more than in the sample: where a model is all but calibrated, the
        interval lies above the true ECE, and may lie above the sample's. In a simulation with 1,000 sentences it held a
        true ECE of 8.5 % in 90 of 100 draws and one of 0.7 % (1.3 % in the sample) in none.

        Args:
            score: of sums (R, K) the scores (R, ...); NaN where a replicate has none, which is left out.
            level: share of the replicates between the ends.

        Returns:
            The lower and the upper end, (...) each; NaN without replicates.
        """
        values = score(self.sums)
        if not values.size(0):
            values = values.new_full((1, *values.shape[1:]), torch.nan)
        low, high = torch.nanquantile(
            values, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype), dim=0
        )
        return low, high


class Difference(NamedTuple):
    """Of a score of two systems: the second's less the first's."""

    value: float
    low: float  # ends of the interval
    high: float
    p: float  # two-sided


def paired(
    first: Tensor,  # (R,) a score of the first system under R resamples, NaN where one has none
    second: Tensor,  # (R,) of the second under the same
    value: float,
    level: float = LEVEL,
) -> Difference:
    """Paired bootstrap of a difference whose value on the sample is `value` (Koehn 2004; Efron and Tibshirani 1993,
    section 16.4).

    The resampled differences, moved to mean 0, show what chance alone would make of systems that do not differ; p is
    how often it makes a difference as large as `value`, counting the sample itself as one resample, so it is never
    below 1 / (R + 1). Resampling makes an ECE larger, but both systems' alike: much of it cancels in a difference.
    """
    differences = second - first
    differences = differences[~differences.isnan()]
    centred = differences - differences.mean()
    p = (1 + int((centred.abs() >= abs(value)).sum())) / (1 + len(differences))
    low, high = torch.quantile(differences, differences.new_tensor([(1 - level) / 2, (1 + level) / 2]))
    return Difference(value, float(low), float(high), p)
