"""What a proper score of the top-1 prediction consists of: CORP (Dimitriadis, Gneiting and Jordan, PNAS 2021,
doi:10.1073/pnas.2016191118).

The event is that the top-1 prediction is right, y = 1, and the forecast its confidence f. With S the mean score of the
forecasts, S_C that of the forecasts recalibrated by isotonic regression of y on f (pool adjacent violators), and S_R
that of one forecast for all, the share of events,

    S = MCB - DSC + UNC,    MCB = S - S_C (miscalibration),  DSC = S_R - S_C (discrimination),  UNC = S_R (uncertainty)

MCB is what a monotone recalibration fitted on this very sample would gain, so that it is never below 0 and a little
too large; DSC how well the confidence tells right predictions from wrong ones, whatever its scale; UNC does not depend
on the forecasts. Scores:

    Brier   (f - y)^2                                in [0, 1]
    NLL     -y log2 f - (1 - y) log2 (1 - f)         bits
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hgkd_fairseq.calibration.histogram import CORRECT, COUNT

RESOLUTION = 2.0**-24  # of 1 - f in fp32: a confidence nearer to 0 or 1 is taken for this near, so that NLL is finite


class Split(NamedTuple):
    """Of a mean score: miscalibration - discrimination + uncertainty."""

    miscalibration: float
    discrimination: float
    uncertainty: float


def binary_nll(confidence: Tensor, correct: Tensor) -> Tensor:
    """(N,) bits, of confidences (N,) that `correct` (N,), 0 or 1, happens; see :data:`RESOLUTION`."""
    p = confidence.double().clamp(RESOLUTION, 1 - RESOLUTION)
    y = correct.double()
    return -(y * p.log2() + (1 - y) * (1 - p).log2())


def brier_entropy(share: np.ndarray) -> np.ndarray:
    """The Brier score of a calibrated forecast: its expectation where the event has that probability."""
    return share * (1 - share)


def nll_entropy(share: np.ndarray) -> np.ndarray:
    """Bits; likewise of NLL, with 0 log 0 = 0."""
    p = np.clip(share, 1e-300, 1)
    q = np.clip(1 - share, 1e-300, 1)
    return -(share * np.log2(p) + (1 - share) * np.log2(q))


def split(table: Tensor, brier: float, nll: float) -> dict[str, Split]:
    """The splits of both scores, "brier" and "nll".

    Args:
        table: (3, C) counts, summed confidence and summed correctness (of 0 or 1) of cells whose confidence rises. The
            predictions of one cell are recalibrated as one: with one cell for each distinct confidence the split is the
            published one, and with the cells of `FineHistogram` all but that, in constant memory.
        brier: mean Brier score of the predictions.
        nll: their mean NLL, bits.

    Returns:
        NaN all without predictions.
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
    """(C,) the values that rise and have the least weighted squares from the outcomes (C,), which are in the order of
    their forecasts. Each is the mean outcome of the neighbours that share it."""
    from scipy.optimize import isotonic_regression  # of SciPy 1.12 on; nothing else here needs it

    return isotonic_regression(outcome, weights=weight).x


def exact(confidence: Tensor, correct: Tensor) -> dict[str, Split]:
    """:func:`split` of arrays of N predictions, a cell for each distinct confidence: for N that fit into memory."""
    confidence, correct = confidence.double(), correct.double()
    values, index, counts = confidence.unique(return_inverse=True, return_counts=True)
    right = torch.zeros_like(values).index_add_(0, index, correct)
    table = torch.stack([counts.double(), values * counts, right])
    brier = float((confidence - correct).square().mean())
    return split(table, brier, float(binary_nll(confidence, correct).mean()))
