"""Figures of a report as inline SVG, with the fonts and colours of the page, which has a light and a dark mode."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Sequence
from typing import Any

from hgkd_fairseq import drawing
from hgkd_fairseq.errors import printable
from hgkd_fairseq.report import diagram
from hgkd_fairseq.report.runs import Run

STYLE: Any = {
    "font.size": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "svg.fonttype": "none",  # keep text as text, to use the font of the page
    "svg.hashsalt": "hgkd",  # make the output reproducible
}
WIDTH = 2.7  # inches, of a figure in a column of the page, which is 17 to 26 rem wide
CURVES = {  # titles, by keys of logs.Log.curves
    "nll_loss": "NLL on validation, bits",
    "ece": "ECE on validation, %",
    "bleu": "BLEU on validation",
    "teacher_share": "Teacher's share of training tokens, %",
}
SCALE = {"ece": 100, "teacher_share": 100}
HIGHEST = 1e12  # points with greater numbers, nan or inf are not drawn, as matplotlib fails on them


def svg(figure, name: str, label: str) -> str:
    """Return a figure as an <svg> element.

    Args:
        figure: figure of matplotlib.
        name: prefix of the ids in the figure, unique on the page.
        label: text alternative of the figure, for screen readers.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", buffer.getvalue(), flags=re.DOTALL)
    text = text[text.index("<svg") :]
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r' xmlns:xlink="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", text)
    text = re.sub(r"#[0-9a-f]{6}\b", lambda found: colour(found[0]), text)
    return text.replace("<svg", f'<svg role="img" aria-label="{html.escape(printable(label))}"', 1)


def colour(code: str) -> str:
    """Return the CSS colour of the page for a colour #rrggbb of matplotlib.

    Colours of runs become their CSS variables, black becomes the text colour, white the background, and greys mixtures
    of these two; other colours are unchanged.
    """
    for number, style in enumerate(diagram.STYLES):
        if number and code == style["color"].lower():
            return f"var(--run-{number})"
    level = code[1:3]
    if code != f"#{level * 3}":
        return code
    if level == "ff":
        return "var(--ground)"
    return f"color-mix(in srgb, currentColor {100 - round(int(level, 16) / 2.55)}%, var(--ground))"


def reliability(run: Run, found: dict[str, Any], number: int, name: str, which: str = "eos:yes") -> str:
    """Return the reliability diagram and confidence histogram of a run as SVG.

    Args:
        run: run, for its name.
        found: content of a file of scores of the run.
        number: index of the run, which determines its style.
        name: prefix of the ids in the figure, unique on the page.
        which: "eos:yes" or "eos:no".
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = drawing.figure_class()(figsize=(WIDTH, 2.9), layout="constrained")
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        styles = [{**diagram.STYLES[number], "hatch": ""}]  # a hatch makes the SVG large, and a single model needs none
        diagram.reliability(top, [found], [run.name], which, styles)
        diagram.confidences(bottom, [found], which, styles)
        top.set_title("")
        top.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))  # space for the markers
        label = f"Reliability diagram of {run.name}: accuracy against confidence in {found['bins']} bins"
        return svg(figure, name, label)


def curve(runs: Sequence[Run], key: str) -> str:
    """Return the curve of a logged number over the updates, for all runs that have it, as SVG; "" if none has."""
    import matplotlib

    drawn = {run.name: points(run, key) for run in runs}
    if not any(drawn.values()):
        return ""
    with matplotlib.rc_context(STYLE):
        figure = drawing.figure_class()(figsize=(WIDTH, 1.9), layout="constrained")
        axes = figure.subplots()
        for run, style in zip(runs, diagram.STYLES, strict=False):
            if drawn[run.name]:
                x, y = zip(*drawn[run.name], strict=True)
                plot(axes, x, y, style)
        axes.set(xlabel="updates")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.grid(color="0.9", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set_xlim(left=0, right=max(1.03 * axes.dataLim.x1, 1))  # space for the last marker
        if key != "nll_loss":
            axes.set_ylim(bottom=0)
        return svg(figure, f"curve-{key}", f"{CURVES[key]}, over the updates, of each run")


def points(run: Run, key: str) -> list[tuple[int, float]]:
    """Return the points (updates, value) of a curve that can be drawn."""
    scaled = ((at, SCALE.get(key, 1) * value) for at, value in zip(*run.log.curves.get(key, ([], [])), strict=True))
    return [(at, value) for at, value in scaled if at <= HIGHEST and abs(value) <= HIGHEST]


def plot(axes, x: Sequence[float], y: Sequence[float], style: dict[str, Any]) -> None:
    axes.plot(
        x, y, color=style["color"], linestyle=style["linestyle"], marker=style["marker"], linewidth=1.1, markersize=3.2,
        markevery=max(1, len(x) // 12),
    )  # fmt: skip


def swatch(number: int, place: str) -> str:
    """Return line and marker of the run with index `number` as SVG; `place` makes ids of several legends distinct."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = drawing.figure_class()(figsize=(0.42, 0.14))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(-1, 1))
        axes.axis("off")
        style = diagram.STYLES[number]
        axes.plot([0.02, 0.98], [0, 0], color=style["color"], linestyle=style["linestyle"], linewidth=1.3)
        axes.plot([0.5], [0], color=style["color"], marker=style["marker"], markersize=5)
        return svg(figure, f"{place}-{number}", "").replace(
            'role="img" aria-label=""', 'class="swatch" aria-hidden="true"'
        )
