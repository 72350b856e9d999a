"""Binned calibration of top-1 predictions, streaming: a fixed-size table of sums, whatever the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

COUNT, CONFIDENCE, CORRECT = range(3)


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
        """Add N predictions: `confidence` (N,) in [0, 1], `correct` (N,) booleans (or 0 and 1); tensors or arrays.

        Raises:
            ValueError: lengths differ, or a confidence is NaN or outside [0, 1] (checked on the CPU only: on a GPU the
                check would wait for the device; there NaN makes the scores NaN).
        """
        confidence, correct = torch.as_tensor(confidence), torch.as_tensor(correct)
        if confidence.shape != correct.shape or confidence.dim() != 1:
            raise ValueError(
                f"confidence {tuple(confidence.shape)} and correct {tuple(correct.shape)} must be of one length, 1-d"
            )
        if confidence.device.type == "cpu" and not bool(((confidence >= 0) & (confidence <= 1)).all()):
            raise ValueError("a confidence is NaN or outside [0, 1]; probabilities are expected, not logarithms")
        # fp64 counts are exact to 2^53 tokens; fp32 would stop counting at 2^24.
        confidence, correct = confidence.double(), correct.double()
        index = (confidence * self.bins).ceil().nan_to_num().long().clamp(1, self.bins) - 1
        self.sums = self.sums.to(confidence.device)
        self.sums.index_add_(1, index, torch.stack([torch.ones_like(confidence), confidence, correct]))

    def merge(self, other: CalibrationHistogram) -> None:
        """Add another table. Raises ValueError where the numbers of bins differ."""
        if other.bins != self.bins:
            raise ValueError(f"cannot merge tables of {self.bins} and {other.bins} bins")
        self.sums = self.sums + other.sums.to(self.sums.device)

    def gaps(self) -> Tensor:
        """(bins,) mean confidence minus accuracy of each bin, positive where overconfident; 0 where it is empty."""
        return (self.sums[CONFIDENCE] - self.sums[CORRECT]) / self.sums[COUNT].clamp(min=1)

    def ece(self) -> float:
        """Expected calibration error, a fraction: sum_b |sum confidence - sum correct| / N. NaN without predictions."""
        return float((self.sums[CONFIDENCE] - self.sums[CORRECT]).abs().sum() / self.sums[COUNT].sum())

    def mce(self, min_count: int = 1) -> float:
        """Maximum calibration error, a fraction: the worst gap among bins of at least `min_count` predictions.

        NaN where there is no such bin. With min_count=1 it is never below the ECE.
        """
        gaps = self.gaps().abs()[self.sums[COUNT] >= max(min_count, 1)]
        return float(gaps.max()) if gaps.numel() else float("nan")
