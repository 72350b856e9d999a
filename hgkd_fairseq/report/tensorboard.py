"""Reliability diagrams of the validation sets in TensorBoard, beside the numbers that fairseq writes there."""

from __future__ import annotations

from fairseq.logging import progress_bar

from hgkd_fairseq import drawing
from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.report import diagram

TAG = "reliability"


def write_reliability(logdir: str, subset: str, sums, step: int) -> None:
    """Draw a validation's diagram into fairseq's own log of that subset. Nothing where neither torch's writer nor
    tensorboardX can be imported (fairseq says so itself), nor where matplotlib cannot.

    Args:
        logdir: of --tensorboard-logdir.
        subset: the name of the validation set, which fairseq's logs go by.
        sums: (3, bins) table of a :class:`CalibrationHistogram`.
        step: updates so far.
    """
    if progress_bar.SummaryWriter is None:
        return
    try:
        figure = drawing.figure_class()(figsize=(5.0, 6.3), layout="constrained")
    except UserError:
        return
    histogram = CalibrationHistogram(sums=sums)
    bars = dict(zip(("count", "confidence", "correct"), histogram.sums.tolist(), strict=True))
    found = {"mode": "forced", "bins": histogram.bins, "ece": histogram.ece(), "histograms": {"eos:yes": bars}}
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.15))
    diagram.reliability(top, [found], [subset], "eos:yes")
    diagram.confidences(bottom, [found], "eos:yes")
    top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.02), frameon=False)
    # fairseq opens a writer for each log and keeps it; this is the one that the subset's numbers go to.
    writer = progress_bar.TensorboardProgressBarWrapper(None, logdir)._writer(subset)
    writer.add_figure(TAG, figure, step)
    writer.flush()
