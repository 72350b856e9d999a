"""Confidence intervals by resampling sentences, streaming: the tokens of one sentence are not independent."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95


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

    def update(self, sentences: Iterable[int], statistics: Tensor) -> None:
        """Add S sentences: their numbers (each to be given once, at least 0) and statistics (S, K)."""
        replicates = self.sums.size(0)
        draws = np.stack([np.random.default_rng([self.seed, i]).poisson(1.0, replicates) for i in sentences])  # (S, R)
        self.sums += torch.from_numpy(draws).double().T @ statistics.cpu().double()

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
