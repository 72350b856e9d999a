"""Streaming confidence intervals by bootstrap over sentences, as the tokens of one sentence are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95  # of confidence intervals
SENTENCES = 1000  # number of sentences whose draws are in memory at a time


def poisson_draws(sentences: Sequence[int], replicates: int, seed: int) -> np.ndarray:
    """Draw how often each sentence counts in each resample; see :class:`SentenceBootstrap`.

    Args:
        sentences: S sentence numbers, at least 0.
        replicates: R, number of resamples.
        seed: random seed, at least 0.

    Returns:
        (S, R) uint8 counts.
    """
    found = np.empty((len(sentences), replicates), np.uint8)  # a count above 255 has a probability of 1e-508
    for row, number in zip(found, sentences, strict=True):
        row[:] = np.random.default_rng([seed, number]).poisson(1.0, replicates)
    return found


class SentenceBootstrap:
    """Streaming Poisson bootstrap over sentences: sums of per-sentence statistics in each resample.

    In each replicate the weight of a sentence is drawn from a Poisson distribution of mean 1, which for many sentences
    approximates drawing with replacement (Hanley and MacGibbon 2006; Chamandy et al. 2012). The weights of a sentence
    depend only on the seed and the sentence's number, not on order, batches or workers. Two models scored on the same
    test set are therefore resampled alike, and the differences of their replicates form a paired bootstrap.

    Args:
        statistics: K, number of statistics per sentence.
        replicates: R, number of resamples.
        seed: random seed, at least 0.

    Attributes:
        sums: (R, K) fp64, weighted sums of the statistics.
    """

    def __init__(self, statistics: int, replicates: int = 1000, seed: int = 1):
        self.seed = seed
        self.sums = torch.zeros(replicates, statistics, dtype=torch.float64)

    def update(self, sentences: Sequence[int], statistics: Tensor) -> None:
        """Add sentences.

        Args:
            sentences: S sentence numbers, at least 0; equal numbers get equal weights.
            statistics: (S, K), statistics of each sentence.
        """
        statistics = statistics.cpu().double()
        for start in range(0, len(sentences), SENTENCES):
            some = slice(start, start + SENTENCES)
            draws = poisson_draws(sentences[some], self.sums.size(0), self.seed)
            self.sums += torch.from_numpy(draws).double().T @ statistics[some]

    def merge(self, other: SentenceBootstrap) -> None:
        """Add the sentences of another instance.

        Raises:
            ValueError: seeds, replicates or numbers of statistics differ.
        """
        if (other.seed, other.sums.shape) != (self.seed, self.sums.shape):
            raise ValueError("cannot merge bootstraps of different seeds, replicates or statistics")
        self.sums = self.sums + other.sums

    def interval(self, score: Callable[[Tensor], Tensor], level: float = LEVEL) -> tuple[Tensor, Tensor]:
        """Return the percentile interval (Efron and Tibshirani 1993, chapter 13) of a score.

        An ECE is biased upwards, in a resample more than in the sample: for an almost calibrated model the interval
        lies above the true ECE, and may lie above that of the sample. In a simulation with 1,000 sentences it contained
        a true ECE of 8.5 % in 90 of 100 draws, and one of 0.7 % (1.3 % in the sample) in none.

        Args:
            score: function from sums (R, K) to scores (R, ...); replicates whose score is NaN are left out.
            level: fraction of the replicates between the two ends.

        Returns:
            The lower and the upper end, (...) each; NaN where no replicate has a score.
        """
        values = score(self.sums)
        if not values.size(0):
            values = values.new_full((1, *values.shape[1:]), torch.nan)
        low, high = torch.nanquantile(
            values, torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=values.dtype), dim=0
        )
        return low, high


class Difference(NamedTuple):
    """Difference of a score between two systems, second minus first, with its interval and p-value."""

    value: float
    low: float  # ends of the interval
    high: float
    p: float  # two-sided


def paired(
    first: Tensor,  # (R,) score of the first system in each of R resamples; NaN where it has none
    second: Tensor,  # (R,) score of the second system in the same resamples
    value: float,  # the difference on the sample itself
    level: float = LEVEL,
) -> Difference:
    """Test the difference of a score between two systems by paired bootstrap (Koehn 2004; Efron and Tibshirani 1993,
    section 16.4).

    The resampled differences, shifted to mean 0, are the distribution under the null hypothesis of equal systems. The
    two-sided p is the fraction of them that are at least as large as `value` in absolute value, with the sample counted
    as one more resample, so that it is never below 1 / (R + 1). Resampling biases an ECE upwards, but for both systems
    alike: much of the bias cancels in a difference.

    At least one resample must have a score of both systems; resamples without one are left out.
    """
    differences = second - first
    differences = differences[~differences.isnan()]
    centred = differences - differences.mean()
    p = (1 + int((centred.abs() >= abs(value)).sum())) / (1 + len(differences))
    low, high = torch.quantile(differences, differences.new_tensor([(1 - level) / 2, (1 + level) / 2]))
    return Difference(value, float(low), float(high), p)
