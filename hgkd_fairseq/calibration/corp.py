"""CORP decomposition of proper scores of the top-1 prediction (Dimitriadis, Gneiting and Jordan, PNAS 2021,
doi:10.1073/pnas.2016191118).

The event, y = 1, is that the top-1 prediction is right; the forecast is its confidence f. Let S be the mean score of
the forecasts, S_C that of the forecasts recalibrated by isotonic regression of y on f (pool adjacent violators), and
S_R that of a constant forecast, the frequency of the event. Then

    S = MCB - DSC + UNC,    MCB = S - S_C (miscalibration),  DSC = S_R - S_C (discrimination),  UNC = S_R (uncertainty)

MCB is the gain from a monotone recalibration fitted on the same sample; it is therefore never negative, and biased
upwards. DSC measures how well the confidence separates right predictions from wrong ones, whatever its scale. UNC does
not depend on the forecasts. The scores are

    Brier   (f - y)^2                                in [0, 1]
    NLL     -y log2 f - (1 - y) log2 (1 - f)         bits
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hgkd_fairseq.calibration.histogram import CORRECT, COUNT

RESOLUTION = 2.0**-24  # of 1 - f in fp32; confidences are clamped to this distance from 0 and 1 to keep the NLL finite


class Split(NamedTuple):
    """Decomposition of a mean score, which is miscalibration - discrimination + uncertainty."""

    miscalibration: float
    discrimination: float
    uncertainty: float


def binary_nll(confidence: Tensor, correct: Tensor) -> Tensor:
    """Return the NLL in bits, (N,) fp64, of events `correct` (N,), 0 or 1, with the probabilities `confidence` (N,).

    Confidences are clamped to [RESOLUTION, 1 - RESOLUTION].
    """
    p = confidence.double().clamp(RESOLUTION, 1 - RESOLUTION)
    y = correct.double()
    return -(y * p.log2() + (1 - y) * (1 - p).log2())


def brier_entropy(share: np.ndarray) -> np.ndarray:
    """Return the expected Brier score, of the shape of `share`, of calibrated forecasts `share`."""
    return share * (1 - share)


def nll_entropy(share: np.ndarray) -> np.ndarray:
    """Return the expected NLL in bits, of the shape of `share`, of calibrated forecasts `share`, with 0 log 0 = 0."""
    p = np.clip(share, 1e-300, 1)
    q = np.clip(1 - share, 1e-300, 1)
    return -(share * np.log2(p) + (1 - share) * np.log2(q))


def split(table: Tensor, brier: float, nll: float) -> dict[str, Split]:
    """Return the decompositions of both scores, by "brier" and "nll".

    Args:
        table: (3, C) count, summed confidence and summed correctness (0 or 1 each) of cells in ascending order of
            confidence. All predictions of a cell get one recalibrated forecast. With one cell per distinct confidence
            the decomposition is the published one; with the cells of `FineHistogram` it is a close approximation in
            constant memory.
        brier: mean Brier score of the predictions.
        nll: mean NLL of the predictions, in bits.

    Returns:
        The decompositions; all NaN without predictions.
    """
    cells = table[:, table[COUNT] > 0].double().cpu().numpy()
    if not cells.size:
        nothing = Split(*[float("nan")] * 3)
        return {"brier": nothing, "nll": nothing}
    count, correct = cells[COUNT], cells[CORRECT]
    recalibrated = isotonic(correct / count, count)
    total = count.sum()
    found = {}
    for name, entropy, score in (("brier", brier_entropy, brier), ("nll", nll_entropy, nll)):
        calibrated = float((count * entropy(recalibrated)).sum() / total)
        reference = float(entropy(correct.sum() / total))
        found[name] = Split(score - calibrated, reference - calibrated, reference)
    return found


def isotonic(outcome: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the non-decreasing values (C,) with the least weighted squared distance from `outcome` (C,).

    The outcomes are in ascending order of their forecasts. Each value is the weighted mean of the adjacent outcomes
    that share it.
    """
    from scipy.optimize import isotonic_regression  # needs SciPy 1.12; no other module needs SciPy

    return isotonic_regression(outcome, weights=weight).x


def exact(confidence: Tensor, correct: Tensor) -> dict[str, Split]:
    """Return the published decompositions of N predictions in memory, by "brier" and "nll".

    It is :func:`split` with one cell per distinct confidence.

    Args:
        confidence: (N,) in [0, 1].
        correct: (N,) booleans, or 0 and 1.
    """
    confidence, correct = confidence.double(), correct.double()
    values, index, counts = confidence.unique(return_inverse=True, return_counts=True)
    right = torch.zeros_like(values).index_add_(0, index, correct)
    table = torch.stack([counts.double(), values * counts, right])
    brier = float((confidence - correct).square().mean())
    return split(table, brier, float(binary_nll(confidence, correct).mean()))
