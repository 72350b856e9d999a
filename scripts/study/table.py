#!/usr/bin/env python3
"""Make tables and figures of a study from its folder: table.py DIR [--output FOLDER].

They contain all finished cells of DIR, and list the others. FOLDER (default: DIR) gets tables.md, which can be included
in a README, teacher_share.svg and validation_nll.svg. BLEU is compared with that of Base with the same seed by
sacreBLEU's paired bootstrap; gates are compared with their controls in BLEU and in NLL.
"""

from __future__ import annotations

import argparse
import logging
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from study import degree_text, diverged, read_about, read_scores

from hgkd_fairseq import drawing, files, methods
from hgkd_fairseq.errors import UserError, guarded, printable
from hgkd_fairseq.evaluation.generated import read_references

TEACHER = "teacher"  # the setting of the teachers' cells
ABSENT = ""
GATED = ("hkd-t", "hkd-s")  # gated methods, and prefixes of the names of others
GATED_BY_NAME = ("typical", "hkd-t-argmax", "hkd-s-argmax", "floor", "sentence-floor")
CONTROLS = ("ls-uniform", "always", "hkd-t-reversed", "hkd-s-reversed", "selective-batch")
CONTROLS_BY_NAME = ("word-kd", "random")  # prefixes of the names of others: constant weights and random gates


# Files of a cell's translations, by BLEU score: with the grid's search, and with the best length penalty of the cell.
TRANSLATIONS = {"bleu": "translations.txt", "lenpen_bleu": "translations-lenpen.txt"}
# If the grid scores several checkpoints, the scores of translations are those of the checkpoint with the highest
# validation BLEU, for all methods, and the other scores are those of the one with the lowest validation NLL.
BEST_BLEU, LAST = "best-bleu", "last"
OF_TRANSLATIONS = ("bleu", "brevity_penalty", "chrf", "lenpen", "lenpen_bleu", "lenpen_brevity_penalty")


class Scored:
    """Scores and translations of a finished cell, read from its folder.

    Raises:
        UserError: a file is missing, damaged or of an earlier version.
    """

    def __init__(self, folder: Path):
        self.about: dict[str, Any] = read_about(folder)
        if "lenpen" not in files.read_json(folder / "scores.json", {}):
            raise UserError(f"{folder} was scored by an earlier version; remove its scores.json and call run.py again")
        self.scores: dict[str, Any] = read_scores(folder)
        self.checkpoints = {"best": dict(self.scores)}
        for name in (BEST_BLEU, LAST):
            if (folder / name / "scores.json").exists():
                self.checkpoints[name] = read_scores(folder / name)
        place = folder
        if BEST_BLEU in self.checkpoints:
            place = folder / BEST_BLEU
            self.scores |= {key: self.checkpoints[BEST_BLEU][key] for key in OF_TRANSLATIONS}
        self.translations = {key: read_references(place / file) for key, file in TRANSLATIONS.items()}


class Study:
    """The cells of a study's folder: those that are finished, and the names of the others.

    Raises:
        UserError: no cell of the folder is finished, or translations do not fit the references.
    """

    def __init__(self, folder: Path):
        found = sorted(file.parent for file in folder.glob("*/*/seed-*/cell.json"))
        finished = [path for path in found if (path / "scores.json").exists()]
        if not finished:
            raise UserError(f"{folder} holds no finished cell of a study; run.py makes them")
        others = {str(path.relative_to(folder)): diverged(path) for path in found if path not in finished}
        self.diverged = {name: since for name, since in others.items() if since is not None}
        self.unfinished = [name for name in others if name not in self.diverged]
        self.cells = {str(path.relative_to(folder)): Scored(path) for path in finished}
        self.references = read_references(folder / "text/test.en")
        for name, cell in self.cells.items():
            for key, lines in cell.translations.items():
                if len(lines) != len(self.references):
                    raise UserError(
                        f"{folder / name / TRANSLATIONS[key]} has {len(lines)} lines and {folder / 'text/test.en'} "
                        f"{len(self.references)}; remove the cell's scores.json and run it again"
                    )
        order = list(methods.table())
        self.order = {name: place for place, name in enumerate(order)}

    def settings(self) -> list[str]:
        return sorted({cell.about["setting"] for cell in self.cells.values()} - {TEACHER})

    def rows(self, setting: str) -> list[tuple[tuple[str, float | None], list[Scored]]]:
        """Return ((method, temperature), cells ordered by seed) for a setting, in the order of `hgkd methods`."""
        groups: dict[tuple[str, float | None], list[Scored]] = {}
        for cell in self.cells.values():
            if cell.about["setting"] == setting:
                groups.setdefault((cell.about["method"], cell.about["temperature"]), []).append(cell)
        for cells in groups.values():
            cells.sort(key=lambda cell: cell.about["seed"])

        def place(row) -> tuple:
            (method, temperature), _ = row
            known = isinstance(temperature, int | float)
            return self.order.get(method, len(self.order)), method, not known, temperature if known else 0

        return sorted(groups.items(), key=place)

    def teacher(self, cells: Sequence[Scored]) -> Scored | None:
        """Return the teacher of the first of these cells that has one; None if it is an ensemble or not a cell."""
        names = [cell.about["teacher"] for cell in cells if cell.about["teacher"]]
        return self.cells.get(names[0]) if names else None

    def p_value(self, cell: Scored, base: Scored, key: str) -> float:
        if cell.translations[key] == base.translations[key]:
            return 1.0  # sacreBLEU counts the resamples above the observed difference and would give 0.001
        systems = [("base", base.translations[key]), ("other", cell.translations[key])]
        _, found = PairedTest(systems, {"BLEU": BLEU()}, [self.references], test_type="bs")()
        return found["BLEU"][1].p_value

    def bootstrap_signature(self, cell: Scored) -> str:
        systems = [("base", cell.translations["bleu"]), ("other", cell.translations["bleu"])]
        return str(PairedTest(systems, {"BLEU": BLEU()}, [self.references], test_type="bs")()[0]["BLEU"])


def spread(values: Sequence[float], digits: int, scale: float = 1) -> str:
    """Format the mean and the sample standard deviation as "25.2 ± 0.3", or a single value as it is."""
    values = [scale * value for value in values]
    text = f"{statistics.fmean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def column(key: str, digits: int, scale: float = 1) -> Callable[[Sequence[Scored]], str]:
    """Return a function that formats a score of several cells; the text is empty if one of them lacks the score."""

    def show(cells: Sequence[Scored]) -> str:
        values = [cell.scores[key] for cell in cells]
        return ABSENT if None in values else spread(values, digits, scale)

    return show


def seeds(cells: Sequence[Scored]) -> str:
    return str(len(cells))


SCORES: dict[str, Callable[[Sequence[Scored]], str]] = {
    "seeds": seeds,
    "BLEU": column("bleu", 1),
    "BLEU at its own length penalty": column("lenpen_bleu", 1),
    "chrF": column("chrf", 1),
    "ECE, %": column("ece", 2, 100),
    "ECE at its own temperature, %": column("scaled_ece", 2, 100),
    "ECE of its translations, %": column("inference_ece", 2, 100),
    "NLL, bits": column("nll", 3),
}
TRAINING: dict[str, Callable[[Sequence[Scored]], str]] = {
    "validation NLL, best": column("valid_nll_best", 3),
    "at update": column("best_updates", 0),
    "validation NLL, last": column("valid_nll_last", 3),
    "validation ECE, last, %": lambda cells: spread([cell.scores["curve"][-1]["valid_ece"] for cell in cells], 2, 100),
    "teacher share at the end": column("teacher_share", 2),
    "temperature fitted": column("temperature", 2),
    "parameters": lambda cells: f"{cells[0].scores['parameters']:,}",
    "minutes": column("minutes", 1),
}


LENGTHS: dict[str, Callable[[Sequence[Scored]], str]] = {
    "seeds": seeds,
    "brevity penalty": column("brevity_penalty", 3),
    "length penalties chosen": lambda cells: ", ".join(f"{cell.scores['lenpen']:g}" for cell in cells),
    "brevity penalty then": column("lenpen_brevity_penalty", 3),
    "BLEU then": SCORES["BLEU at its own length penalty"],
}


def by_checkpoint(named: Sequence[tuple[str, Sequence[Scored]]]) -> list[str]:
    """Return a table of each method's scores by the rule that chooses the checkpoint."""
    if not any(BEST_BLEU in cell.checkpoints for _, cells in named for cell in cells):
        return []
    rules = {"best": "least NLL", BEST_BLEU: "highest BLEU", LAST: "last"}
    kinds: dict[str, tuple[str, int, float]] = {"BLEU": ("bleu", 1, 1), "NLL": ("nll", 3, 1), "ECE, %": ("ece", 2, 100)}

    def shown(cells: Sequence[Scored], rule: str, key: str, digits: int, scale: float) -> str:
        values = [cell.checkpoints[rule][key] for cell in cells if rule in cell.checkpoints]
        return spread(values, digits, scale) if len(values) == len(cells) else ABSENT  # the same seeds in each column

    header = ["method, by checkpoint", *[f"{kind}, {text}" for kind in kinds for text in rules.values()]]
    rows = [[title, *[shown(cells, rule, *how) for how in kinds.values() for rule in rules]] for title, cells in named]
    return markdown(header, rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return [lines[0], "|---" * len(header) + "|", *lines[1:], ""]


def by_seed(cells: Sequence[Scored]) -> dict[int, Scored]:
    return {cell.about["seed"]: cell for cell in cells}


def over(study: Study, cells: Sequence[Scored], bases: dict[int, Scored], key: str) -> list[str]:
    """Return the mean difference in BLEU (`key` of TRANSLATIONS) from `bases` of the same seeds, and p by seed.

    The seeds are named if `bases` lacks some of those of the cells.
    """
    pairs, seeds = pairs_by_seed(cells, bases)
    if not pairs:
        return [ABSENT, ABSENT]
    difference = statistics.fmean(cell.scores[key] - base.scores[key] for cell, base in pairs)
    return [f"{difference:+.1f}{seeds}", ", ".join(f"{study.p_value(cell, base, key):.3f}" for cell, base in pairs)]


def pairs_by_seed(cells: Sequence[Scored], bases: dict[int, Scored]) -> tuple[list[tuple[Scored, Scored]], str]:
    """Return the cells with the bases of their seeds, and a text that names the seeds; "" if all cells have a base."""
    pairs = [(cell, bases[cell.about["seed"]]) for cell in cells if cell.about["seed"] in bases]
    names = ", ".join(str(cell.about["seed"]) for cell, _ in pairs)
    return pairs, f" (seed{'s' if len(pairs) > 1 else ''} {names})" if len(pairs) < len(cells) else ""


def default_temperatures(rows) -> dict[str, float | None]:
    """Return for each method the temperature with the most seeds, which the main table shows."""
    most: dict[str, tuple[int, float | None]] = {}
    for (method, temperature), cells in rows:
        if method not in most or len(cells) > most[method][0]:
            most[method] = (len(cells), temperature)
    return {method: temperature for method, (_, temperature) in most.items()}


def main_rows(study: Study, setting: str) -> list[list[Scored]]:
    rows = study.rows(setting)
    shown = default_temperatures(rows)
    return [cells for (method, temperature), cells in rows if shown[method] == temperature]


def titles(rows: Sequence[Sequence[Scored]]) -> list[str]:
    """Return the title of each row, with the teacher's temperature if the rows have different ones."""
    several = len({cells[0].about["temperature"] for cells in rows} - {None}) > 1

    def title(about: dict) -> str:
        temperature = about["temperature"]
        return f"{about['title']}; {degree_text(temperature)}" if several and temperature else about["title"]

    return [title(cells[0].about) for cells in rows]


def setting_tables(study: Study, setting: str) -> list[str]:
    """Return the tables of a setting: scores, checkpoints, training, BLEU with the best length penalty of each cell,
    comparisons of gates with their controls, and temperatures of the teacher. Empty tables are left out."""
    rows = main_rows(study, setting)
    every = [cell for cells in rows for cell in cells]
    bases = by_seed([cell for cell in every if cell.about["method"] == "base"])
    teacher = study.teacher(every)
    above = [("teacher", [teacher])] if teacher else []
    named = list(zip(titles(rows), rows, strict=True))

    def over_base(title: str, cells: Sequence[Scored], key: str) -> list[str]:
        compared = title != "teacher" and cells[0].about["method"] != "base"
        return over(study, cells, bases, key) if compared else [ABSENT, ABSENT]

    scores = []
    for title, cells in above + named:
        compared = over_base(title, cells, "bleu")
        scores.append([title, *[show(cells) for show in SCORES.values()], *compared])
        if cells[0].about["method"] == "base" and title != "teacher":
            # Base with a fitted temperature, the control of calibration claims, has its own row.
            only = {
                "seeds": seeds,
                "ECE, %": SCORES["ECE at its own temperature, %"],
                "NLL, bits": column("scaled_nll", 3),
            }
            control = [only[name](cells) if name in only else ABSENT for name in SCORES]
            scores.append([f"{title} + temperature", *control, ABSENT, ABSENT])
    training = [[title, *[show(cells) for show in TRAINING.values()]] for title, cells in above + named]
    lines = [f"### {setting}", "", f"All its cells: {signature(every)}.", ""]
    lines += markdown(["method", *SCORES, "BLEU over Base", "p, each seed"], scores)
    lines += by_checkpoint(above + named)
    lines += markdown(["method", *TRAINING], training)
    lengths = [
        [title, *[show(cells) for show in LENGTHS.values()], *over_base(title, cells, "lenpen_bleu")]
        for title, cells in above + named
    ]
    controls = Compared(study, rows)
    lines += controls.nll()
    lines += controls.bleu("BLEU over", "bleu")
    lines += markdown(["method", *LENGTHS, "BLEU over Base then", "p, each seed"], lengths)
    lines += controls.bleu("BLEU then, over", "lenpen_bleu")
    return lines + temperatures(study, setting)


class Compared:
    """The gates among the rows of a setting, and their controls.

    Args:
        study: study.
        rows: cells of each method, with one temperature of the teacher.
    """

    def __init__(self, study: Study, rows: Sequence[Sequence[Scored]]):
        self.study = study
        self.by_method = {cells[0].about["method"]: cells for cells in rows}
        self.titles = dict(zip(self.by_method, titles(rows), strict=True))
        self.gated = [name for name in self.by_method if name in GATED or name.startswith(GATED_BY_NAME)]
        self.controls = [name for name in self.by_method if name in CONTROLS or name.startswith(CONTROLS_BY_NAME)]

    def bleu(self, corner: str, key: str) -> list[str]:
        """Return a table of differences in BLEU (`key` of TRANSLATIONS), with p."""

        def compare(cells: Sequence[Scored], control: Sequence[Scored]) -> list[str]:
            return over(self.study, cells, by_seed(control), key)

        return self.table(corner, "p, each seed", compare)

    def nll(self) -> list[str]:
        """Return a table of differences in NLL, in bits, of each seed."""
        return self.table("NLL minus that of", "at own temperatures", nll_differences)

    def table(self, corner: str, second: str, compare: Callable[..., list[str]]) -> list[str]:
        """Return a table with two columns for each gate and a row for each control, filled by `compare` with the common
        seeds of two methods; empty where they have different temperatures of the teacher."""

        def compared(gate: str, control: str) -> list[str]:
            one, other = self.by_method[gate], self.by_method[control]
            degrees = {cells[0].about["temperature"] for cells in (one, other)} - {None}
            return [ABSENT, ABSENT] if len(degrees) > 1 else compare(one, other)

        if not self.gated or not self.controls:
            return []
        header = [corner, *[text for gate in self.gated for text in (self.titles[gate], second)]]
        rows = [
            [self.titles[control], *[text for gate in self.gated for text in compared(gate, control)]]
            for control in self.controls
        ]
        return markdown(header, rows)


def nll_differences(cells: Sequence[Scored], control: Sequence[Scored]) -> list[str]:
    """Return the NLL of cells minus that of their control of the same seed: as scored, and at fitted temperatures."""
    pairs, seeds = pairs_by_seed(cells, by_seed(control))
    if not pairs:
        return [ABSENT, ABSENT]
    found = []
    for key in ("nll", "scaled_nll"):
        values = [(cell.scores[key], other.scores[key]) for cell, other in pairs]
        known = all(None not in pair for pair in values)
        found.append(", ".join(f"{one - other:+.3f}" for one, other in values) + seeds if known else ABSENT)
    return found


def temperatures(study: Study, setting: str) -> list[str]:
    """Return a table of methods that were trained with several temperatures of the teacher, for their common seeds."""
    methods: dict[str, dict[float | str, list[Scored]]] = {}
    for (method, temperature), cells in study.rows(setting):
        if temperature is not None:
            methods.setdefault(method, {})[temperature] = cells
    scores = ("seeds", "BLEU", "BLEU at its own length penalty", "chrF", "ECE, %", "NLL, bits")
    rows = []
    for by_temperature in methods.values():
        common = set.intersection(*[{cell.about["seed"] for cell in cells} for cells in by_temperature.values()])
        if len(by_temperature) < 2 or not common:
            continue
        for temperature, cells in by_temperature.items():
            cells = [cell for cell in cells if cell.about["seed"] in common]
            shown = [SCORES[name](cells) for name in scores]
            rows.append(
                [cells[0].about["title"], degree_text(temperature), *shown, TRAINING["teacher share at the end"](cells)]
            )
    header = ["method", "teacher's temperature", *scores, "teacher share"]
    return markdown(header, rows) if rows else []


def signature(cells: Sequence[Scored]) -> str:
    """Return the parts that the signatures of all these cells have in common."""
    parts = [cell.about["signature"].split("|") for cell in cells]
    return f"`{'|'.join(part for part in parts[0] if all(part in other for other in parts))}`"


def how(study: Study) -> list[str]:
    """Return the notes below the tables: how scores were computed, signatures, and unfinished and diverged cells."""
    cells = list(study.cells.values())
    names = {"bleu": "BLEU", "chrf": "chrF", "ece": "ECE", "inference_ece": "ECE of its translations"}
    text = []
    for key, name in names.items():
        text += [f"{name} `{one}`" for one in sorted({cell.scores["signatures"][key] for cell in cells})]
    signed = study.bootstrap_signature(cells[0])
    text.append(
        f"p: sacreBLEU's paired bootstrap between cells of one seed, `{signed}`; one tail of it, and up to 0.1 less "
        "than that where the difference is small (p above 0.05)"
    )
    chosen = "checkpoints chosen by validation NLL"
    if any(BEST_BLEU in cell.checkpoints for cell in cells):
        chosen = (
            "BLEU and chrF of the checkpoint with the highest validation BLEU, the rest, with the ECE of translations, "
            "of that with the least NLL"
        )
    lines = [
        f"Mean ± standard deviation over seeds; {chosen}; scores on the test set. "
        "A teacher is scored at its checkpoint with the least NLL. Length penalties chosen: of each seed, fairseq's "
        "--lenpen that has the highest BLEU on the validation set. "
        + "; ".join(text)
        + f". All cells, and those teachers that are cells: {signature(cells)}.",
    ]
    if study.unfinished:
        lines += ["", f"Not finished, and not in the tables: {', '.join(study.unfinished)}."]
    for name, since in study.diverged.items():
        lines += [
            "",
            f"Diverged, and not in the tables: {name}, whose NLL on validation is no number from update {since} on.",
        ]
    return lines


def draw(study: Study, key: str, label: str, file: Path) -> None:
    """Draw training curves, with a panel for each setting: the mean over seeds, and the range if there are several.

    Args:
        study: finished cells.
        key: quantity to draw, a key of the points in "curve" of SCORES.
        label: label of the vertical axis.
        file: file to write.
    """
    figure_class = drawing.figure_class()
    import matplotlib

    settings = study.settings()
    figure = figure_class(figsize=(5.2 * len(settings) + 1.8, 4.2), layout="constrained")
    panels = figure.subplots(1, len(settings), sharey=True, squeeze=False)[0]
    lines: dict[str, Any] = {}
    lowest, last = math.inf, 0.0
    for panel, setting in zip(panels, settings, strict=True):
        for cells in main_rows(study, setting):
            curves = [{point["updates"]: point.get(key) for point in cell.scores["curve"]} for cell in cells]
            updates = sorted(set.intersection(*[{at for at, y in curve.items() if y is not None} for curve in curves]))
            values = [[curve[at] for curve in curves] for at in updates]
            # Without the first point, at which PS-KD has no teacher.
            later = {round(value, 2) for point in values[1:] or values for value in point}
            if key == "teacher_share" and later in ({0.0}, {1.0}):
                continue  # the share is constant: no token or every token learns from the teacher
            lowest, last = min([lowest, *map(min, values)]), max([last, *map(max, values[-1:])])
            title = cells[0].about["title"]
            place = study.order.get(cells[0].about["method"], len(study.order))
            style = {"color": f"C{place % 10}", "linestyle": ("-", "--", ":")[place // 10 % 3]}
            (lines[title],) = panel.plot(updates, [statistics.fmean(point) for point in values], linewidth=1.5, **style)
            if len(cells) > 1:
                low, high = ([end(point) for point in values] for end in (min, max))
                panel.fill_between(updates, low, high, color=style["color"], alpha=0.15, linewidth=0)
        panel.set_title(printable(setting), parse_math=False)
        panel.set(xlabel="updates")
        panel.grid(color="0.9", linewidth=0.6)
    if key == "valid_nll" and lines:
        panels[0].set_ylim(top=max(1.2 * lowest, 1.02 * last))  # the initial decrease would hide all other differences
    panels[0].set_ylabel(label)
    figure.set_figheight(max(4.2, 0.2 * len(lines) + 0.4))  # the height of the legend
    drawing.legend(figure, lines.values(), list(lines), loc="outside right center", fontsize=9, frameon=False)
    with matplotlib.rc_context({"svg.hashsalt": "study"}):
        files.write_figure(figure, file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dir", type=Path, metavar="DIR", help="the study's folder")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where tables.md and figures go (default: DIR)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq enables the messages of all libraries
    return guarded("table.py: error", lambda: write(args.dir, args.output or args.dir), args.debug)


def write(folder: Path, output: Path) -> int:
    study = Study(folder)
    lines = [line for setting in study.settings() for line in setting_tables(study, setting)] + how(study)
    if not study.settings():
        lines = ["Only teachers are finished yet.", "", *lines]
    lines = [printable(line) for line in lines]  # titles and signatures come from files
    output.mkdir(parents=True, exist_ok=True)
    files.write_text(output / "tables.md", "\n".join(lines) + "\n")
    if study.settings():
        draw(study, "teacher_share", "share of tokens that the teacher teaches", output / "teacher_share.svg")
        draw(study, "valid_nll", "validation NLL, bits a token", output / "validation_nll.svg")
    print("\n".join(lines), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
