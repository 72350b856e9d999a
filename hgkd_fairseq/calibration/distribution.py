"""Scores of whole predicted distributions: Brier score and the tables of weighted ECE, from (N, V) probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd_fairseq.calibration.histogram import tabulate


def brier(
    probability: Tensor,  # (N, V), rows sum to 1
    gold: Tensor,  # (N,) int64
) -> Tensor:
    """(N,) Brier scores in [0, 2], sum over the classes of (p - 1[gold])^2 (Brier 1950, eq. 2).

    It is `sklearn.metrics.brier_score_loss(..., scale_by_half=False)`.
    """
    gold_probability = probability.gather(1, gold[:, None]).squeeze(1)
    return probability.square().sum(1) - 2 * gold_probability + 1


def weighted_tables(
    probability: Tensor,  # (N, V), rows sum to 1
    gold: Tensor,  # (N,) int64
    bins: int,
    group: Tensor,  # (N,) int64 in [0, groups)
    groups: int,
) -> Tensor:
    """(groups, 3, bins) calibration tables over all V classes of each prediction, each weighted by its probability.

    Their ECE is the weighted ECE of Kumar and Sarawagi 2019 (arXiv:1903.00802, section 2),

        1 / N  sum_b | sum over the p_iv in bin b of p_iv (1[gold_i = v] - p_iv) |

    since the weights of a prediction add up to 1.
    """
    # Fewer than `bins` classes of a distribution lie above 1 / bins: the others share the first bin, as what is left.
    row, column = (probability > 1 / bins).nonzero(as_tuple=True)
    high = probability[row, column]
    tables = tabulate(high, column == gold[row], bins, high, group[row], groups)
    gold_probability = probability.gather(1, gold[:, None]).squeeze(1)
    whole = torch.stack([probability.sum(1), probability.square().sum(1), gold_probability], dim=1).double()  # (N, 3)
    totals = torch.zeros(groups, 3, dtype=torch.float64, device=probability.device).index_add_(0, group, whole)
    tables[:, :, 0] += totals - tables.sum(2)
    return tables
