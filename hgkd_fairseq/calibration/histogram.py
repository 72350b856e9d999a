"""Binned calibration, streaming: a fixed-size table of sums, whatever the number of predictions.

A table is (..., 3, bins): count, summed confidence and summed correctness of each bin. The functions take any leading
dimensions (sentences, replicates of a bootstrap) and return scores of those dimensions, fractions all.
"""

from __future__ import annotations

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
