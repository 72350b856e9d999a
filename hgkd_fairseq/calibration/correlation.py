"""Rank correlation by sentence, with a bootstrap interval: does a model know which of its translations are good?"""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd_fairseq.calibration.bootstrap import LEVEL, poisson_draws

PART = 2**20  # resamples x sentences at a time: some tables of so many numbers are alive


def spearman(
    first: Tensor,  # (N,)
    second: Tensor,  # (N,)
    weight: Tensor | None = None,  # (R, N) how often each counts; once unless given
) -> Tensor:
    """(R,) Spearman's rank correlations (Spearman 1904), Pearson's of the ranks; (1,) without weights.

    Equal numbers share the mean of their ranks. One that counts w times is w equal ones. NaN where one of the two does
    not vary.
    """
    weight = first.new_ones(1, first.numel(), dtype=torch.float64) if weight is None else weight.double()
    x, y = (ranks(values, weight) for values in (first, second))
    total = weight.sum(1, keepdim=True)
    x, y = (values - (weight * values).sum(1, keepdim=True) / total for values in (x, y))
    covariance, *variances = ((weight * one * other).sum(1) for one, other in ((x, y), (x, x), (y, y)))
    scale = (variances[0] * variances[1]).sqrt()
    # What rounding leaves of the variance of equal ranks is no variance.
    return (covariance / scale).where(scale > 1e-9 * total[:, 0], torch.full_like(scale, torch.nan)).clamp(-1, 1)


def ranks(
    values: Tensor,  # (N,)
    weight: Tensor,  # (R, N)
) -> Tensor:
    """(R, N) ranks from 1 on, those of equal values their mean."""
    _, place = values.double().unique(return_inverse=True)  # of each among the distinct values, which rise
    counts = weight.new_zeros(weight.size(0), int(place.max()) + 1).index_add_(1, place, weight)
    return (counts.cumsum(1) - counts + (counts + 1) / 2)[:, place]


def spearman_interval(
    first: Tensor,  # (N,)
    second: Tensor,  # (N,)
    sentences: list[int],  # N, their numbers
    replicates: int,
    seed: int,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Percentile interval of :func:`spearman` under the resamples of :class:`SentenceBootstrap`; NaN without any that
    have a correlation."""
    draws = torch.from_numpy(poisson_draws(sentences, replicates, seed)).T  # (R, N), a byte each
    parts = draws.split(max(PART // max(len(sentences), 1), 1))
    found = torch.cat([spearman(first, second, part) for part in parts])
    low, high = torch.nanquantile(found, found.new_tensor([(1 - level) / 2, (1 + level) / 2]))
    return float(low), float(high)
