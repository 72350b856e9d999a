"""Binned calibration, streaming: a fixed-size table of sums, whatever the number of predictions.

A table is (..., 3, bins): count, summed confidence and summed correctness of each bin. The functions take any leading
dimensions (sentences, replicates of a bootstrap) and return scores of those dimensions, fractions all.
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
    weight: Tensor | None = None,  # (N,) how much each prediction counts; 1 unless given
    group: Tensor | None = None,  # (N,) int64 in [0, groups)
    groups: int = 1,
) -> Tensor:
    """(groups, 3, bins) tables in fp64 of the predictions of each group, on their device.

    Bin b holds confidences in (b / bins, (b + 1) / bins]; 0 falls into the first, as NaN does (its sums become NaN).
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
    """(..., bins) summed confidence minus summed correctness, positive where overconfident."""
    return table[..., CONFIDENCE, :] - table[..., CORRECT, :]


def gaps(table: Tensor) -> Tensor:
    """(..., bins) mean confidence minus accuracy of each bin, positive where overconfident; 0 where it is empty."""
    count = table[..., COUNT, :]
    return surplus(table) / count.where(count > 0, torch.ones_like(count))


def count(table: Tensor) -> Tensor:
    """(...) number of predictions, or their weight."""
    return table[..., COUNT, :].sum(-1)


def ece(table: Tensor) -> Tensor:
    """Expected calibration error, sum_b |sum confidence - sum correct| / N (Guo et al. 2017, equation 3).

    NaN without predictions.
    """
    return surplus(table).abs().sum(-1) / count(table)


def mce(table: Tensor, min_count: int = 1) -> Tensor:
    """Maximum calibration error (Guo et al. 2017, equation 5): the worst gap among bins that hold at least
    `min_count` predictions.

    NaN where there is no such bin. With min_count=1 it is never below the ECE.
    """
    counted = table[..., COUNT, :] >= max(min_count, 1)
    worst = gaps(table).abs().where(counted, torch.full((), -1.0, dtype=table.dtype)).amax(-1)
    return worst.where(counted.any(-1), torch.full((), torch.nan, dtype=table.dtype))


def rms(table: Tensor) -> Tensor:
    """Root mean square calibration error, sqrt(sum_b n_b / N gap_b^2) (Nguyen and O'Connor 2015, section 3)."""
    return ((table[..., COUNT, :] * gaps(table).square()).sum(-1) / count(table)).sqrt()


def debiased_squares(table: Tensor) -> Tensor:
    """Debiased estimate of the squared calibration error of binned predictions (Kumar, Liang and Ma, NeurIPS 2019,
    arXiv:1909.10155, section 5),

        sum_b n_b / N ((conf_b - acc_b)^2 - acc_b (1 - acc_b) / (n_b - 1))

    where the second term is an unbiased estimate of the variance of acc_b, by which the plain estimate is too large.
    Below 0 where chance makes it so. A bin of one prediction, whose variance is unknown, adds nothing, as in the
    authors' library. Predictions are taken as independent; those of a sentence are not quite, so that some bias is
    left. NaN without predictions.
    """
    number = table[..., COUNT, :]
    errors = number * (gaps(table).square() - _accuracy_variance(table, number - 1))
    return errors.where(number > 1, torch.zeros_like(errors)).sum(-1) / count(table)


def debiased_rms(table: Tensor) -> Tensor:
    """The root of :func:`debiased_squares`, the debiased calibration error of the paper; 0 where that is below 0."""
    return debiased_squares(table).clamp(min=0).sqrt()


def debiased_ece(table: Tensor) -> Tensor:
    """The ECE less what chance adds to it, as the library of Kumar et al. 2019 estimates that for the L1 norm.

    Were acc_b drawn anew from a normal distribution of mean acc_b and variance s_b^2 = acc_b (1 - acc_b) / n_b, the ECE
    would be expected to be

        sum_b n_b / N E|g_b + s_b Z|,    E|g + s Z| = s sqrt(2 / pi) exp(-g^2 / 2 s^2) + g erf(g / (s sqrt(2)))

    with the gap g_b; how much that is above the ECE is taken for how much the ECE is above the truth, of which it is a
    third where the truth is 0. (The library draws Z a thousand times; this is the expectation itself.) It may be below
    0. NaN without predictions.
    """
    number, gap = table[..., COUNT, :], gaps(table)
    deviation = _accuracy_variance(table, number).sqrt()
    ratio = gap / deviation.clamp(min=1e-150)  # where all are right, or none, there is no noise
    noisy = deviation * math.sqrt(2 / math.pi) * torch.exp(-ratio.square() / 2) + gap * torch.erf(ratio / math.sqrt(2))
    return 2 * ece(table) - (number * noisy).sum(-1) / count(table)


def _accuracy_variance(table: Tensor, degrees: Tensor) -> Tensor:
    """(..., bins) acc (1 - acc) / degrees; 0 where a bin is empty."""
    share = table[..., CORRECT, :] / table[..., COUNT, :].clamp(min=1)
    return (share * (1 - share)).clamp(min=0) / degrees.clamp(min=1)


def overconfidence(table: Tensor) -> Tensor:
    """The part of the ECE from bins whose confidence is above their accuracy; with underconfidence it is the ECE."""
    return surplus(table).clamp(min=0).sum(-1) / count(table)


def underconfidence(table: Tensor) -> Tensor:
    """The part of the ECE from bins whose confidence is below their accuracy."""
    return (-surplus(table)).clamp(min=0).sum(-1) / count(table)


def accuracy(table: Tensor) -> Tensor:
    """Share of correct predictions. NaN without predictions."""
    return table[..., CORRECT, :].sum(-1) / count(table)


def mean_confidence(table: Tensor) -> Tensor:
    """NaN without predictions."""
    return table[..., CONFIDENCE, :].sum(-1) / count(table)


def check(confidence: Tensor, correct: Tensor) -> None:
    """Raises ValueError: lengths differ, or a confidence is NaN or outside [0, 1] (the latter on the CPU only: on a GPU
    the check would wait for the device; there NaN makes the scores NaN)."""
    if confidence.shape != correct.shape or confidence.dim() != 1:
        raise ValueError(
            f"confidence {tuple(confidence.shape)} and correct {tuple(correct.shape)} must be of one length, 1-d"
        )
    if confidence.device.type == "cpu" and not bool(((confidence >= 0) & (confidence <= 1)).all()):
        raise ValueError("a confidence is NaN or outside [0, 1]; probabilities are expected, not logarithms")


class CalibrationHistogram:
    """Counts, summed confidence and summed correctness in equal-width bins of confidence over (0, 1].

    Bin b holds confidences in (b / bins, (b + 1) / bins]; 0 falls into the first. Tables of the same number of bins can
    be added up over batches, workers and files.

    Args:
        bins: number of bins; 20 as Wang et al. 2020 (ACL, "On the Inference Calibration of NMT") have it.
        sums: (3, bins) table to start from, instead of an empty one.
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
        """Add N predictions: `confidence` (N,) in [0, 1], `correct` (N,) booleans (or numbers in [0, 1]); tensors or
        arrays.

        Raises:
            ValueError: lengths differ, or a confidence is NaN or outside [0, 1] (checked on the CPU only: on a GPU the
                check would wait for the device; there NaN makes the scores NaN).
        """
        confidence, correct = torch.as_tensor(confidence), torch.as_tensor(correct)
        check(confidence, correct)
        self.sums = self.sums.to(confidence.device) + tabulate(confidence, correct, self.bins)[0]

    def merge(self, other: CalibrationHistogram) -> None:
        """Add another table. Raises ValueError where the numbers of bins differ."""
        if other.bins != self.bins:
            raise ValueError(f"cannot merge tables of {self.bins} and {other.bins} bins")
        self.sums = self.sums + other.sums.to(self.sums.device)

    def gaps(self) -> Tensor:
        """(bins,) mean confidence minus accuracy of each bin, positive where overconfident; 0 where it is empty."""
        return gaps(self.sums)

    def ece(self) -> float:
        """Expected calibration error, a fraction: sum_b |sum confidence - sum correct| / N. NaN without predictions."""
        return float(ece(self.sums))

    def mce(self, min_count: int = 1) -> float:
        """Maximum calibration error, a fraction: the worst gap among bins of at least `min_count` predictions.

        NaN where there is no such bin. With min_count=1 it is never below the ECE.
        """
        return float(mce(self.sums, min_count))

    def rms(self) -> float:
        """Root mean square calibration error, a fraction; between the ECE and the MCE."""
        return float(rms(self.sums))

    def overconfidence(self) -> float:
        """The part of the ECE, a fraction, from bins whose confidence is above their accuracy."""
        return float(overconfidence(self.sums))

    def underconfidence(self) -> float:
        """The part of the ECE, a fraction, from bins whose confidence is below their accuracy."""
        return float(underconfidence(self.sums))

    def accuracy(self) -> float:
        """Share of correct predictions."""
        return float(accuracy(self.sums))
