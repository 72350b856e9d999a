"""Scores of whole predicted distributions: Brier score and the tables of weighted ECE and Full-ECE, from (N, V)
probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from hgkd_fairseq.calibration.histogram import COUNT, tabulate


def brier(
    probability: Tensor,  # (N, V), rows sum to 1
    gold: Tensor,  # (N,) int64
) -> Tensor:
    """(N,) Brier scores in [0, 2], sum over the classes of (p - 1[gold])^2 (Brier 1950, eq. 2).

    It is `sklearn.metrics.brier_score_loss(..., scale_by_half=False)`.
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
    """(groups, 2, 3, bins) calibration tables over all V classes of each prediction: weighted, and full.

    In the first each class counts as much as its probability. Its ECE is the weighted ECE of Kumar and Sarawagi 2019
    (arXiv:1903.00802, section 2),

        1 / N  sum_b | sum over the p_iv in bin b of p_iv (1[gold_i = v] - p_iv) |

    since the weights of a prediction add up to 1. The ECE of the second is the Full-ECE of Liu et al. 2024
    (arXiv:2406.11345),

        sum_b |B_b| / N |acc(B_b) - conf(B_b)|  =  1 / N  sum_b | sum over the p_iv in bin b of (1[gold_i = v] - p_iv) |

    with N predictions, |B_b| of the N V probabilities in bin b, the share acc(B_b) of the gold ones and the mean
    conf(B_b) of these: it sums probabilities and gold ones as they are, and counts each class 1 / V.
    """
    # Fewer than `bins` classes of a distribution lie above 1 / bins: the others share the first bin, as what is left.
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
