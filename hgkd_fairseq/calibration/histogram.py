"""Streaming binned calibration scores, from a table of sums whose size does not depend on the number of predictions.

A table is (..., 3, bins): count, summed confidence and summed correctness of each bin. The functions accept any leading
dimensions (sentences, bootstrap replicates) and return scores of these dimensions, as fractions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

COUNT, CONFIDENCE, CORRECT = range(3)


def tabulate(
    confidence: Tensor,  # (N,) in [0, 1]
    correct: Tensor,  # (N,) booleans, or numbers in [0, 1]
    bins: int,
    weight: Tensor | None = None,  # (N,) weight of each prediction; None: 1
    group: Tensor | None = None,  # (N,) int64 in [0, groups); None: one group
    groups: int = 1,
) -> Tensor:
    """Return the tables of each group of predictions, (groups, 3, bins) fp64, on the device of the predictions.

    Bin b holds confidences in (b / bins, (b + 1) / bins]. The first bin includes 0, and NaN, which makes its sums NaN.
    """
    # fp64 counts are exact to 2^53 tokens; fp32 would stop counting at 2^24.
    confidence, correct = confidence.double(), correct.double()
    weight = torch.ones_like(confidence) if weight is None else weight.double()
    index = (confidence * bins).ceil().nan_to_num().long().clamp(1, bins) - 1
    if group is not None:
        index = index + group * bins
    sums = torch.zeros(3, groups * bins, dtype=torch.float64, device=confidence.device)
    sums.index_add_(1, index, torch.stack([weight, weight * confidence, weight * correct]))
    return sums.view(3, groups, bins).transpose(0, 1)


def surplus(table: Tensor) -> Tensor:
    """Return summed confidence minus summed correctness of each bin, (..., bins); positive if overconfident."""
    return table[..., CONFIDENCE, :] - table[..., CORRECT, :]


def gaps(table: Tensor) -> Tensor:
    """Return mean confidence minus accuracy of each bin, (..., bins); positive if overconfident, 0 in empty bins."""
    count = table[..., COUNT, :]
    return surplus(table) / count.where(count > 0, torch.ones_like(count))


def count(table: Tensor) -> Tensor:
    """Return the number (or summed weight) of all predictions, (...)."""
    return table[..., COUNT, :].sum(-1)


def ece(table: Tensor) -> Tensor:
    """Return the expected calibration error, sum_b |sum confidence - sum correct| / N (Guo et al. 2017, equation 3).

    NaN without predictions.
    """
    return surplus(table).abs().sum(-1) / count(table)


def mce(table: Tensor, min_count: int = 1) -> Tensor:
    """Return the maximum calibration error (Guo et al. 2017, equation 5): the largest absolute gap of the bins with at
    least `min_count` predictions.

    NaN if there is no such bin. With min_count=1 it is never below the ECE.
    """
    counted = table[..., COUNT, :] >= max(min_count, 1)
    worst = gaps(table).abs().where(counted, torch.full((), -1.0, dtype=table.dtype)).amax(-1)
    return worst.where(counted.any(-1), torch.full((), torch.nan, dtype=table.dtype))


def rms(table: Tensor) -> Tensor:
    """Return the root mean square calibration error, sqrt(sum_b n_b / N gap_b^2) (Nguyen and O'Connor 2015, section 3).

    NaN without predictions.
    """
    return ((table[..., COUNT, :] * gaps(table).square()).sum(-1) / count(table)).sqrt()


def debiased_squares(table: Tensor) -> Tensor:
    """Return the debiased estimate of the squared calibration error of binned predictions (Kumar, Liang and Ma, NeurIPS
    2019, arXiv:1909.10155, section 5),

        sum_b n_b / N ((conf_b - acc_b)^2 - acc_b (1 - acc_b) / (n_b - 1))

    The second term is an unbiased estimate of the variance of acc_b, by which the plain estimate is too large. The
    result may be negative by chance. As in the authors' library, a bin with a single prediction, whose variance is
    unknown, contributes 0. The estimate assumes independent predictions; those of one sentence are dependent, so that
    some bias remains. NaN without predictions.
    """
    number = table[..., COUNT, :]
    errors = number * (gaps(table).square() - _accuracy_variance(table, number - 1))
    return errors.where(number > 1, torch.zeros_like(errors)).sum(-1) / count(table)


def debiased_rms(table: Tensor) -> Tensor:
    """Return the square root of :func:`debiased_squares`, the debiased error of the paper; 0 if that is negative."""
    return debiased_squares(table).clamp(min=0).sqrt()


def debiased_ece(table: Tensor) -> Tensor:
    """Return the ECE minus an estimate of its bias, that of the library of Kumar et al. 2019 for the L1 norm.

    If each acc_b were resampled from a normal distribution of mean acc_b and variance s_b^2 = acc_b (1 - acc_b) / n_b,
    the expectation of the ECE would be

        sum_b n_b / N E|g_b + s_b Z|,    E|g + s Z| = s sqrt(2 / pi) exp(-g^2 / 2 s^2) + g erf(g / (s sqrt(2)))

    with the gap g_b and a standard normal Z. The difference between this expectation and the ECE is the estimate of the
    bias of the ECE. For a calibrated model it is about a third of the bias in small samples, and sqrt(2) - 1 = 0.41 of
    it in large ones. (The library averages over a thousand draws of Z; this is the exact expectation.) The result may
    be negative. NaN without predictions.
    """
    number, gap = table[..., COUNT, :], gaps(table)
    deviation = _accuracy_variance(table, number).sqrt()
    ratio = gap / deviation.clamp(min=1e-150)  # the deviation is 0 if all predictions are right, or none
    noisy = deviation * math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2) + gap * torch.erf(ratio / math.sqrt(2))
    return 2 * ece(table) - (number * noisy).sum(-1) / count(table)


def _accuracy_variance(table: Tensor, degrees: Tensor) -> Tensor:
    """Return acc (1 - acc) / degrees of each bin, (..., bins); 0 in empty bins."""
    share = table[..., CORRECT, :] / table[..., COUNT, :].clamp(min=1)
    return (share * (1 - share)).clamp(min=0) / degrees.clamp(min=1)


def overconfidence(table: Tensor) -> Tensor:
    """Return the part of the ECE from bins with more confidence than accuracy; the rest is :func:`underconfidence`."""
    return surplus(table).clamp(min=0).sum(-1) / count(table)


def underconfidence(table: Tensor) -> Tensor:
    """Return the part of the ECE from bins with less confidence than accuracy."""
    return (-surplus(table)).clamp(min=0).sum(-1) / count(table)


def accuracy(table: Tensor) -> Tensor:
    """Return the fraction of correct predictions. NaN without predictions."""
    return table[..., CORRECT, :].sum(-1) / count(table)


def mean_confidence(table: Tensor) -> Tensor:
    """Return the mean confidence of all predictions. NaN without predictions."""
    return table[..., CONFIDENCE, :].sum(-1) / count(table)


def check(confidence: Tensor, correct: Tensor) -> None:
    """Validate predictions: `confidence` (N,) in [0, 1] and `correct` (N,).

    Raises:
        ValueError: the tensors are not 1-d or differ in length, or a confidence is NaN or outside [0, 1]. Values are
            checked on the CPU only: on a GPU the check would synchronise with the device; there NaN makes the scores
            NaN.
    """
    if confidence.shape != correct.shape or confidence.dim() != 1:
        raise ValueError(
            f"confidence {tuple(confidence.shape)} and correct {tuple(correct.shape)} must be of one length, 1-d"
        )
    if confidence.device.type == "cpu" and not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("a confidence is NaN or outside [0, 1]; probabilities are expected, not logarithms")


class CalibrationHistogram:
    """Counts, summed confidence and summed correctness in equal-width bins of confidence.

    Bin b holds confidences in (b / bins, (b + 1) / bins]; the first bin includes 0. Tables with the same number of bins
    can be summed over batches, workers and files.

    Args:
        bins: number of bins; the default is that of Wang et al. 2020 (ACL, "On the Inference Calibration of NMT").
        sums: (3, bins) initial table, whose number of bins replaces `bins`; None: an empty one.

    Raises:
        ValueError: `bins` is less than 1.
    """

    def __init__(self, bins: int = 20, sums=None):
        if bins < 1:
            raise ValueError(f"bins is {bins}; it must be at least 1")
        self.sums = torch.zeros(3, bins, dtype=torch.float64) if sums is None else torch.as_tensor(sums)

    @property
    def bins(self) -> int:
        return self.sums.size(1)

    def __repr__(self):
        return f"CalibrationHistogram(bins={self.bins}, count={int(self.sums[COUNT].sum())})"

    def update(self, confidence, correct) -> None:
        """Add N predictions, as tensors or arrays.

        Args:
            confidence: (N,) in [0, 1].
            correct: (N,) booleans or numbers in [0, 1].

        Raises:
            ValueError: the arrays are not 1-d or differ in length, or a confidence is NaN or outside [0, 1]. Values are
                checked on the CPU only: on a GPU the check would synchronise with the device; there NaN makes the
                scores NaN.
        """
        confidence, correct = torch.as_tensor(confidence), torch.as_tensor(correct)
        check(confidence, correct)
        self.sums = self.sums.to(confidence.device) + tabulate(confidence, correct, self.bins)[0]

    def merge(self, other: CalibrationHistogram) -> None:
        """Add another table.

        Raises:
            ValueError: the numbers of bins differ.
        """
        if other.bins != self.bins:
            raise ValueError(f"cannot merge tables of {self.bins} and {other.bins} bins")
        self.sums = self.sums + other.sums.to(self.sums.device)

    def gaps(self) -> Tensor:
        """Return mean confidence minus accuracy of each bin, (bins,); positive if overconfident, 0 in empty bins."""
        return gaps(self.sums)

    def ece(self) -> float:
        """Return the expected calibration error, a fraction: sum_b |sum confidence - sum correct| / N.

        NaN without predictions.
        """
        return float(ece(self.sums))

    def mce(self, min_count: int = 1) -> float:
        """Return the maximum calibration error, a fraction: the largest gap of the bins with at least `min_count`
        predictions.

        NaN if there is no such bin. With min_count=1 it is never below the ECE.
        """
        return float(mce(self.sums, min_count))

    def rms(self) -> float:
        """Return the root mean square calibration error, a fraction; it is between the ECE and the MCE."""
        return float(rms(self.sums))

    def overconfidence(self) -> float:
        """Return the part of the ECE, a fraction, from bins with more confidence than accuracy."""
        return float(overconfidence(self.sums))

    def underconfidence(self) -> float:
        """Return the part of the ECE, a fraction, from bins with less confidence than accuracy."""
        return float(underconfidence(self.sums))

    def accuracy(self) -> float:
        """Return the fraction of correct predictions. NaN without predictions."""
        return float(accuracy(self.sums))
