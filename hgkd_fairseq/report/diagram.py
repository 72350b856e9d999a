"""Reliability diagram and confidence histogram of one or several models, from JSON files of scores; needs matplotlib.

Models differ in marker, line style and hatch as well as in colour, so that figures are readable in black and white.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hgkd_fairseq import drawing
from hgkd_fairseq import files as file_access
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation.results import DRAWN, WHAT, check_bars
from hgkd_fairseq.report.names import short_names

# Wong's palette (Nature Methods 2011), from dark to light, which colour-blind readers can distinguish, also in grey.
STYLES: tuple[dict[str, Any], ...] = (
    {"color": "#000000", "marker": "o", "linestyle": "-", "hatch": ""},
    {"color": "#D55E00", "marker": "s", "linestyle": "--", "hatch": "////"},
    {"color": "#0072B2", "marker": "^", "linestyle": "-.", "hatch": "...."},
    {"color": "#009E73", "marker": "D", "linestyle": ":", "hatch": "\\\\\\\\"},
    {"color": "#CC79A7", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1)), "hatch": "xxxx"},
    {"color": "#E69F00", "marker": "P", "linestyle": (0, (1, 3)), "hatch": "||||"},
)
MOST = len(STYLES)
FEW = 10  # bins with fewer predictions, whose accuracy is unreliable, have hollow markers


def draw(files: Sequence[str], output: str, labels: Sequence[str] | None = None, which: str = "eos:yes") -> None:
    """Draw the reliability diagram of one or several files of scores and write it to a file.

    Args:
        files: files that `hgkd calibration forced --json` or `hgkd calibration inference --json` has written.
        output: file to write, whose suffix, .png or .svg, determines the format.
        labels: names of the models, one per file; by default short names of the files.
        which: "eos:yes" or "eos:no", whether the end of sentence is included.

    Raises:
        UserError: matplotlib is missing, there are more files than styles, a file is not valid, the number of labels is
            not that of the files, the files have different numbers of bins, or `output` cannot be written.
    """
    Figure = drawing.figure_class()
    from matplotlib.legend_handler import HandlerTuple

    file_access.figure_format("--output", output)
    if len(files) > MOST:
        raise UserError(f"{len(files)} files are too many for one diagram; give at most {MOST}")
    if labels and len(labels) != len(files):
        raise UserError(f"{len(labels)} times --label for {len(files)} files; give one for each, in their order")
    results = [file_access.read_json(file, DRAWN, WHAT) for file in files]
    bins = {result["bins"] for result in results}
    if len(bins) > 1:
        raise UserError(f"the files have {' and '.join(map(str, sorted(bins)))} bins; score them with one --bins")
    for file, result in zip(files, results, strict=True):
        check_bars(file, result)
    names = labels or short_names([Path(file) for file in files])

    figure = Figure(figsize=(6.0, 7.8), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.15))
    lines = reliability(top, results, names, which)
    bars = confidences(bottom, results, which)
    handles: list[Any] = list(zip(lines, bars, strict=True))
    drawing.legend(  # outside, as no corner of the axes is free of points for all models
        figure, handles, [line.get_label() for line in lines], loc="outside lower center", fontsize=9, frameon=False,
        handler_map={tuple: HandlerTuple(ndivide=None)}, handlelength=6,
    )  # fmt: skip
    file_access.write_figure(figure, output)


def reliability(axes, results: Sequence[dict], names: Sequence[str], which: str, styles=STYLES) -> list[Any]:
    """Draw accuracy against mean confidence of each non-empty bin, with intervals of the accuracies if there are any.

    Args:
        axes: axes of matplotlib.
        results: contents of files of scores, one per model, or dicts with the same "mode", "histograms" and ECE.
        names: names of the models.
        which: "eos:yes" or "eos:no".
        styles: colour, marker and line style of each model.

    Returns:
        The line of each model, with its label.
    """
    axes.plot([0, 1], [0, 1], color="0.55", linewidth=1, zorder=1)
    axes.annotate("overconfident", (0.97, 0.03), ha="right", va="bottom", color="0.4", style="italic")
    axes.annotate("underconfident", (0.03, 0.97), ha="left", va="top", color="0.4", style="italic")
    suffix = "" if which == "eos:yes" else "_without_eos"
    lines = []
    for result, name, style in zip(results, names, styles, strict=False):
        table = result["histograms"][which]
        filled = [bin for bin, count in enumerate(table["count"]) if count]
        count = [table["count"][bin] for bin in filled]
        x = [table["confidence"][bin] / n for bin, n in zip(filled, count, strict=True)]
        y = [table["correct"][bin] / n for bin, n in zip(filled, count, strict=True)]
        ece = result[f"ece{suffix}"]  # None if there are no tokens
        error = "no ECE" if ece is None else f"ECE {100 * ece:.2f} %"
        (line,) = axes.plot(
            x, y, color=style["color"], linestyle=style["linestyle"], linewidth=1.3, marker=style["marker"],
            markersize=5, zorder=3, label=f"{name}: {error}, {sum(count):,.0f} tokens",
        )  # fmt: skip
        lines.append(line)
        hollow = [index for index, n in enumerate(count) if n < FEW]
        axes.plot(
            [x[index] for index in hollow], [y[index] for index in hollow], linestyle="", marker=style["marker"],
            markersize=5, markerfacecolor="white", markeredgecolor=style["color"], zorder=4,
        )  # fmt: skip
        if "low" in table and "high" in table:
            # With few tokens the interval may not contain the accuracy; matplotlib allows no negative lengths.
            below = [max(value - table["low"][bin], 0) for bin, value in zip(filled, y, strict=True)]
            above = [max(table["high"][bin] - value, 0) for bin, value in zip(filled, y, strict=True)]
            axes.errorbar(
                x, y, yerr=[below, above], linestyle="", color=style["color"], elinewidth=0.8, capsize=2, zorder=2
            )
    axes.set(xlim=(0, 1), ylim=(0, 1), ylabel="accuracy")
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    mode = " and ".join(sorted({result["mode"] for result in results}))
    axes.set_title(f"Reliability ({mode}, {'with' if which == 'eos:yes' else 'without'} EOS)", fontsize=11)
    return lines


def confidences(axes, results: Sequence[dict], which: str, styles=STYLES) -> list[Any]:
    """Draw the number of tokens in each bin.

    Args:
        axes: axes of matplotlib.
        results: contents of files of scores, one per model, all with the same number of bins.
        which: "eos:yes" or "eos:no".
        styles: colour and hatch of each model.

    Returns:
        One bar of each model, for the legend.
    """
    bins = results[0]["bins"]
    width = 0.84 / bins / len(results)
    bars = []
    for place, (result, style) in enumerate(zip(results, styles, strict=False)):
        left = [(bin + 0.08) / bins + place * width for bin in range(bins)]
        single = len(results) == 1
        container = axes.bar(
            left, result["histograms"][which]["count"], width=width, align="edge", hatch=style["hatch"],
            facecolor="0.75" if single else "white", edgecolor=style["color"], linewidth=0.7,
        )  # fmt: skip
        bars.append(container.patches[0])
    axes.set(xlabel="confidence", ylabel="tokens")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    return bars
