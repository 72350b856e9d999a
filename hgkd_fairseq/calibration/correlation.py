"""Rank correlation of two numbers per sentence, such as log-probability and quality, with bootstrap intervals."""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd_fairseq.calibration.bootstrap import LEVEL, poisson_draws

PART = 2**20  # resamples x sentences that are processed at a time; several tables of this size are in memory


def spearman(
    first: Tensor,  # (N,)
    second: Tensor,  # (N,)
    weight: Tensor | None = None,  # (R, N) how often each pair counts in each resample; None: once
) -> Tensor:
    """Return Spearman's rank correlations (Spearman 1904), (R,), or (1,) without weights.

    They are Pearson's correlations of the ranks. Equal values share the mean of their ranks. A pair with weight w is
    equivalent to w equal pairs. NaN where one of the two variables is constant.

    Args:
        first: (N,) values of the first variable; at least one.
        second: (N,) values of the second variable.
        weight: (R, N) counts of each pair in each resample.
    """
    weight = first.new_ones(1, first.numel(), dtype=torch.float64) if weight is None else weight.double()
    x, y = (ranks(values, weight) for values in (first, second))
    total = weight.sum(1, keepdim=True)
    x, y = (values - (weight * values).sum(1, keepdim=True) / total for values in (x, y))
    covariance, *variances = ((weight * one * other).sum(1) for one, other in ((x, y), (x, x), (y, y)))
    scale = (variances[0] * variances[1]).sqrt()
    # Rounding may leave a tiny variance where all ranks are equal; it is treated as 0.
    return (covariance / scale).where(scale > 1e-9 * total[:, 0], torch.full_like(scale, torch.nan)).clamp(-1, 1)


def ranks(
    values: Tensor,  # (N,)
    weight: Tensor,  # (R, N)
) -> Tensor:
    """Return ranks from 1 upwards, (R, N); equal values share the mean of their ranks."""
    _, place = values.double().unique(return_inverse=True)  # index among the distinct values in ascending order
    counts = weight.new_zeros(weight.size(0), int(place.max()) + 1).index_add_(1, place, weight)
    return (counts.cumsum(1) - counts + (counts + 1) / 2)[:, place]


def spearman_interval(
    first: Tensor,  # (N,)
    second: Tensor,  # (N,)
    sentences: list[int],  # N sentence numbers
    replicates: int,
    seed: int,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the ends of the percentile interval of :func:`spearman` under the resamples of :class:`SentenceBootstrap`.

    Args:
        first: (N,) values of the first variable, one per sentence.
        second: (N,) values of the second variable.
        sentences: N sentence numbers, at least 0.
        replicates: number of resamples, at least 1.
        seed: random seed, at least 0.
        level: fraction of the resamples between the two ends.

    Returns:
        The lower and the upper end; NaN if no resample has a correlation.
    """
    draws = torch.from_numpy(poisson_draws(sentences, replicates, seed)).T  # (R, N) uint8
    parts = draws.split(max(PART // max(len(sentences), 1), 1))
    found = torch.cat([spearman(first, second, part) for part in parts])
    low, high = torch.nanquantile(found, found.new_tensor([(1 - level) / 2, (1 + level) / 2]))
    return float(low), float(high)
