"""Streaming calibration scores without fixed bins: adaptive and smooth ECE, from a fine table of confidences.

adaptive ECE   the ECE over bins of equal mass (Nguyen and O'Connor 2015, section 3), whose edges are quantiles of the
               confidence. As in netcal (`ECE(bins, equal_intervals=False)`), quantiles are interpolated linearly
               between order statistics, a bin includes its lower edge, and equal confidences share a bin.
smooth ECE     Blasiok and Nakkiran 2024 (ICLR; arXiv:2309.12236), definitions 4 and 5: with the Gaussian kernel
               K of bandwidth s, reflected at 0 and 1,
                   smECE_s = integral over t in [0, 1] of |1/N sum_i K_s(t, f_i) (f_i - y_i)|
               and smECE is the s for which smECE_s = s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hgkd_fairseq.calibration.histogram import CONFIDENCE, COUNT, check, count, ece, surplus

# Most top-1 confidences of a translation model are close to 1, so cells halve in width with every halving of 1 - p.
OCTAVES = 32
CELLS = 2048  # number of cells per octave; the widest is 1 / (2 * CELLS) = 0.00024
MESH = 4096  # number of points in [0, 1] for the integral of smooth ECE


def cell(confidence: Tensor) -> Tensor:
    """Return the index of the cell of each confidence, (N,) int64 in [0, OCTAVES * CELLS), increasing with it."""
    distance = (1 - confidence.double()).nan_to_num().clamp(2.0**-OCTAVES, 1)
    mantissa, exponent = torch.frexp(distance)  # distance = mantissa * 2^exponent, mantissa in [1/2, 1)
    position = 2 * (1 - mantissa) - exponent  # 0 at distance 1, 1 at 1/2, 2 at 1/4
    return (position * CELLS).long().clamp(0, OCTAVES * CELLS - 1)


def equal_mass_bins(counts: Tensor, bins: int) -> Tensor:
    """Return the equal-mass bin, (C,) int64 in [0, bins), of each of C cells (or distinct confidences) in ascending
    order: the number of quantiles 1/bins, 2/bins, ... of all predictions at or below the last prediction in the cell.

    Args:
        counts: (C,) number of predictions in each cell.
        bins: number of bins.
    """
    last = counts.cumsum(0) - 1  # rank, from 0, of the last prediction in each cell
    return (last * bins / (counts.sum() - 1).clamp(min=1)).floor().long().clamp(0, bins - 1)


def adaptive_ece(confidence, correct, bins: int = 20) -> float:
    """Return the exact adaptive ECE, a fraction, of N predictions in memory. NaN without predictions.

    Args:
        confidence: (N,) in [0, 1]; tensor or array.
        correct: (N,) booleans or numbers in [0, 1].
        bins: number of bins of equal mass.

    Raises:
        ValueError: the arrays are not 1-d or differ in length, or a confidence is NaN or outside [0, 1].
    """
    confidence, correct = torch.as_tensor(confidence), torch.as_tensor(correct)
    check(confidence, correct)
    values, index, counts = confidence.double().unique(return_inverse=True, return_counts=True)
    right = torch.zeros_like(values).index_add_(0, index, correct.double())
    table = torch.zeros(3, bins, dtype=torch.float64)
    table.index_add_(1, equal_mass_bins(counts, bins), torch.stack([counts.double(), values * counts, right]))
    return float(ece(table))


class FineHistogram:
    """Counts, summed confidence and summed correctness in 65,536 cells of confidence.

    It takes 1.5 MB whatever the number of predictions. Tables can be summed over batches and workers.

    Attributes:
        sums: (3, 65536) fp64, count, summed confidence and summed correctness of each cell.
    """

    def __init__(self) -> None:
        self.sums = torch.zeros(3, OCTAVES * CELLS, dtype=torch.float64)

    def update(self, confidence, correct) -> None:
        """Add N predictions: `confidence` (N,) in [0, 1], `correct` (N,) booleans or numbers in [0, 1].

        Raises:
            ValueError: for the reasons of :meth:`CalibrationHistogram.update`.
        """
        confidence, correct = torch.as_tensor(confidence), torch.as_tensor(correct)
        check(confidence, correct)
        confidence, correct = confidence.double(), correct.double()
        self.sums = self.sums.to(confidence.device)
        self.sums.index_add_(1, cell(confidence), torch.stack([torch.ones_like(confidence), confidence, correct]))

    def merge(self, other: FineHistogram) -> None:
        self.sums = self.sums + other.sums.to(self.sums.device)

    def adaptive_ece(self, bins: int = 20) -> float:
        """Return the adaptive ECE, a fraction. NaN without predictions.

        It differs from the exact :func:`adaptive_ece` by at most twice the fraction of predictions that share a cell
        with the edge of a bin.
        """
        table = torch.zeros(3, bins, dtype=torch.float64, device=self.sums.device)
        table.index_add_(1, equal_mass_bins(self.sums[COUNT], bins), self.sums)
        return float(ece(table))

    def smooth_ece(self) -> float:
        """Return the smooth ECE, a fraction, at the bandwidth that equals it. NaN without predictions.

        The value is within 1e-4 of the exact one where it is above 0.001; the mesh is too coarse for smaller
        bandwidths.
        """
        if not count(self.sums) > 0:
            return math.nan
        spectrum = self.spectrum()
        low, high = 0.0, 1.0
        if smoothed_error(spectrum, high) >= high:
            return high
        for _ in range(30):  # smECE_s decreases in s, so it crosses s once
            middle = (low + high) / 2
            low, high = (middle, high) if smoothed_error(spectrum, middle) > middle else (low, middle)
        return (low + high) / 2

    def spectrum(self) -> Tensor:
        """Return the (MESH + 1,) Fourier coefficients of the surplus of confidence, divided by the number of
        predictions, as a function on [0, 1] followed by its mirror image."""
        filled = self.sums[COUNT] > 0
        sums = self.sums[:, filled]
        # The surplus of a cell is divided between the two mesh points, (j + 1/2) / MESH, on either side of its mean.
        position = sums[CONFIDENCE] / sums[COUNT] * MESH - 0.5
        below = position.floor()
        share = position - below
        mass = surplus(sums) / sums[COUNT].sum()
        mesh = torch.zeros(MESH, dtype=torch.float64, device=sums.device)
        # The neighbour beyond the first or the last point is that point's own mirror image.
        mesh.index_add_(0, below.long().clamp(0, MESH - 1), mass * (1 - share))
        mesh.index_add_(0, (below.long() + 1).clamp(0, MESH - 1), mass * share)
        return torch.fft.rfft(torch.cat([mesh, mesh.flip(0)]))


def smoothed_error(spectrum: Tensor, bandwidth: float) -> float:
    """Return smECE_s at bandwidth s, from the coefficients of :meth:`FineHistogram.spectrum`.

    On the circle made of [0, 1] and its mirror image, convolution with a Gaussian includes its reflections, and
    multiplies the k-th component, cos(pi k t), by exp(-(pi k s)^2 / 2).
    """
    wave = torch.arange(spectrum.numel(), dtype=torch.float64, device=spectrum.device)
    smooth = torch.fft.irfft(spectrum * torch.exp(-0.5 * (math.pi * bandwidth * wave).square()), n=2 * MESH)
    return float(smooth[:MESH].abs().sum())
