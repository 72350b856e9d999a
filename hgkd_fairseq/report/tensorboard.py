"""Reliability diagrams of the validation sets in TensorBoard, in addition to the numbers that fairseq writes there."""

from __future__ import annotations

from fairseq.logging import progress_bar

from hgkd_fairseq import drawing
from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.report import diagram

TAG = "reliability"


def write_reliability(logdir: str, subset: str, sums, step: int) -> None:
    """Add the reliability diagram of a validation to fairseq's TensorBoard log of the subset.

    Nothing is written if matplotlib is not installed, or if neither torch's TensorBoard writer nor tensorboardX is (in
    the latter case fairseq logs a message).

    Args:
        logdir: value of --tensorboard-logdir.
        subset: name of the validation set, which is the name of fairseq's log.
        sums: (3, bins) table of a :class:`CalibrationHistogram`.
        step: number of updates.
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
    # fairseq keeps one writer per log; this is the one for the numbers of the subset.
    writer = progress_bar.TensorboardProgressBarWrapper(None, logdir)._writer(subset)
    writer.add_figure(TAG, figure, step)
    writer.flush()
