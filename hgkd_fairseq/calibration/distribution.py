"""Scores of whole predicted distributions, (N, V) probabilities: Brier score, and calibration tables for weighted ECE
and Full-ECE."""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd_fairseq.calibration.histogram import COUNT, tabulate


def brier(
    probability: Tensor,  # (N, V), rows sum to 1
    gold: Tensor,  # (N,) int64
) -> Tensor:
    """Return the Brier scores, (N,) in [0, 2]: sums over the classes of (p - 1[gold])^2 (Brier 1950, eq. 2).

    Their mean equals `sklearn.metrics.brier_score_loss(..., scale_by_half=False)`.
    """
    gold_probability = probability.gather(1, gold[:, None]).squeeze(1)
    return probability.square().sum(1) - 2 * gold_probability + 1


def distribution_tables(
    probability: Tensor,  # (N, V), rows sum to 1
    gold: Tensor,  # (N,) int64
    bins: int,
    group: Tensor,  # (N,) int64 in [0, groups)
    groups: int,
) -> Tensor:
    """Return calibration tables over all V classes of each prediction, (groups, 2, 3, bins): weighted, and full.

    In the first table each class is weighted by its probability. Its ECE is the weighted ECE of Kumar and Sarawagi 2019
    (arXiv:1903.00802, section 2),

        1 / N  sum_b | sum over the p_iv in bin b of p_iv (1[gold_i = v] - p_iv) |

    since the weights of a prediction sum to 1. The ECE of the second table is the Full-ECE of Liu et al. 2024
    (arXiv:2406.11345),

        sum_b |B_b| / N |acc(B_b) - conf(B_b)|  =  1 / N  sum_b | sum over the p_iv in bin b of (1[gold_i = v] - p_iv) |

    where |B_b| of the N V probabilities are in bin b, acc(B_b) is the fraction of these that belong to the gold token,
    and conf(B_b) is their mean. The second table therefore has unweighted sums of probabilities and of gold tokens, and
    counts divided by V, so that they sum to N.
    """
    # Fewer than `bins` classes of a distribution have a probability above 1 / bins. Only these are binned one by one;
    # the first bin is what remains of the totals, since all other classes belong to it.
    row, column = (probability > 1 / bins).nonzero(as_tuple=True)
    high, right = probability[row, column], column == gold[row]
    one = torch.ones(probability.size(0), dtype=torch.float64, device=probability.device)
    gold_probability = probability.gather(1, gold[:, None]).squeeze(1).double()
    mass, squares = probability.sum(1).double(), probability.square().sum(1).double()
    tables = []
    for weight, whole in ((high, (mass, squares, gold_probability)), (None, (probability.size(1) * one, mass, one))):
        table = tabulate(high, right, bins, weight, group[row], groups)
        totals = torch.zeros(groups, 3, dtype=torch.float64, device=probability.device)
        totals.index_add_(0, group, torch.stack(whole, dim=1))
        table[:, :, 0] += totals - table.sum(2)
        tables.append(table)
    tables[1][:, COUNT] /= probability.size(1)
    return torch.stack(tables, dim=1)
