"""Tables of a report: scores with intervals, and differences from the first run with significance tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest, Result

from hgkd_fairseq.arguments import TOKENIZERS
from hgkd_fairseq.calibration.bootstrap import Difference, paired
from hgkd_fairseq.errors import UserError, printable
from hgkd_fairseq.evaluation import segments
from hgkd_fairseq.report.runs import FILES, GENERATED, Run

METRICS: dict[str, Callable] = {"BLEU": BLEU, "chrF": CHRF, "TER": TER}
SIGNIFICANT = 0.05  # p below which a difference is significant


@dataclass(frozen=True)
class Entry:
    """Cell of a table: formatted value, interval and p-value; empty if there is no value.

    Its string is markdown, with the value in bold if the difference is significant.
    """

    text: str = ""
    interval: str = ""
    p: str = ""
    significant: bool = False

    def __str__(self) -> str:
        text = f"**{self.text}**" if self.significant else self.text
        return " ".join(part for part in (text, self.interval, self.p) if part)


EMPTY = Entry()


@dataclass
class Table:
    title: str
    header: list[str]
    rows: list[list[Entry]]  # the first cell of each row is the name of the run
    notes: list[str] = field(default_factory=list)  # paragraphs below the table, in markdown

    def markdown(self) -> str:
        lines: list[list] = [self.header, ["---"] * len(self.header), *self.rows]
        table = "\n".join("| " + " | ".join(printable(str(cell)) for cell in line) + " |" for line in lines)
        return "\n\n".join([table, *map(printable, self.notes)])


@dataclass(frozen=True)
class Kind:
    """Description of an ECE: title of its column, file of scores, and whether the end of sentence is included."""

    title: str
    file: str  # field of Run
    which: str = "eos:yes"  # or "eos:no"

    @property
    def key(self) -> str:
        return "ece" if self.which == "eos:yes" else "ece_without_eos"


KINDS = (
    Kind("forced", "forced"),
    Kind("forced, no EOS", "forced", "eos:no"),
    Kind("forced at T", "scaled"),
    Kind("forced at T, no EOS", "scaled", "eos:no"),
    Kind("inference", "inference"),
    Kind("inference, no EOS", "inference", "eos:no"),
    Kind("inference at T", "inference_scaled"),
    Kind("inference at T, no EOS", "inference_scaled", "eos:no"),
)


@dataclass
class Report:
    """Tables of some runs, the first of which the others are compared with."""

    runs: list[Run]
    quality: Table
    calibration: Table
    differences: list[Table]  # of translation and calibration; tables without any difference are omitted
    further: list[Table] = field(default_factory=list)  # tables of :mod:`further`

    def tables(self) -> list[Table]:
        return [self.quality, self.calibration, *self.differences, *self.further]

    def markdown(self) -> str:
        return "\n\n".join(table.markdown() for table in self.tables())


def measure(runs: Sequence[Run]) -> Report:
    """Make the tables of a report, and score translations with sacreBLEU, whose paired bootstrap takes seconds.

    Args:
        runs: runs with distinct names, as :func:`read_all` returns them; at least one.

    Raises:
        UserError: the calibration of two runs was measured in different ways, so that it cannot be compared.
    """
    for kind in KINDS:
        check_alike(runs, kind)
    signatures, results = text_scores(runs)
    quality = Table(
        "Translation",
        ["model", *METRICS, "NLL, bits", "parameters", "updates (best)", "minutes"],
        [quality_row(run, results.get(run.name, {})) for run in runs],
        quality_notes(runs, signatures),
    )
    calibration = Table(
        "Calibration",
        ["ECE, %", "T", *(kind.title for kind in KINDS)],
        [calibration_row(run) for run in runs],
        calibration_notes(runs),
    )
    first, others = runs[0], runs[1:]
    differences = [
        difference_table(
            first, others, "translation", list(METRICS), lambda run: text_differences(first, run, results)
        ),
        difference_table(
            first, others, "calibration", [kind.title for kind in KINDS], lambda run: ece_differences(first, run)
        ),
    ]
    return Report(list(runs), quality, calibration, [table for table in differences if table])


def difference_table(
    first: Run, others: Sequence[Run], of: str, columns: list[str], cells: Callable[[Run], list[Entry]]
) -> Table | None:
    """Make a table of the differences of other runs from the first one.

    Args:
        first: run that the others are compared with.
        others: other runs, one row each.
        of: "translation" or "calibration".
        columns: titles of the columns.
        cells: function that returns the cells of a run, one per column.

    Returns:
        The table of the columns that are not empty; None if all are.
    """
    rows = {run.name: cells(run) for run in others}
    filled = [place for place in range(len(columns)) if any(row[place].text for row in rows.values())]
    if not filled:
        return None
    two_sided = "A paired bootstrap over the sentences gives the two-sided p."
    what = {
        "translation": f"BLEU, chrF and TER. {segments.ONE_TAIL}.",
        "calibration": f"ECE, in percentage points with a 95 % interval. {two_sided}",
    }
    return Table(
        f"Differences from {first.name}: {of}",
        [f"model − {first.name}", *(columns[place] for place in filled)],
        [[Entry(name), *(row[place] for place in filled)] for name, row in rows.items()],
        [f"Of {what[of]} Bold: p below 0.05, for each number by itself."],
    )


def check_alike(runs: Sequence[Run], kind: Kind) -> None:
    first = None
    for run in runs:
        found = getattr(run, kind.file)
        if found is None:
            continue
        how = score(found, kind.key)["signature"].split("|")
        if kind.file == "scaled":  # runs have different temperatures
            how = [part for part in how if not part.startswith("temp:")]
        how += [f"subset:{found['subset']}"] if "subset" in found else []
        first = first or (run, how)
        if how != first[1]:
            raise UserError(
                f"{run.folder / kind.file}.json holds {'|'.join(how)} and {first[0].folder / kind.file}.json "
                f"{'|'.join(first[1])}; measure both in one way"
            )


def score(found: dict[str, Any], key: str) -> dict[str, Any]:
    """Return the score with a key from the content of a file of `hgkd calibration`."""
    return next(row for row in found["scores"] if row["key"] == key)


def text_scores(runs: Sequence[Run]) -> tuple[dict[str, str], dict[str, dict[str, Result]]]:
    """Score the runs that have translations and references with sacreBLEU and its paired bootstrap.

    Returns:
        Signatures by metric, and results by name of the run and metric. The p of a result is one-tailed, about half of
        a two-sided one; None for the first run, and for all runs if the first run has not been scored.
    """
    scored = [run for run in runs if run.translations is not None and run.references is not None]
    if not scored:
        return {}, {}
    # Metrics that get the references when they are made cache what they extract from them.
    tokenize = next((run.tokenize for run in scored if run.tokenize), TOKENIZERS[0])
    options = {"BLEU": {"tokenize": tokenize, "force": True}}  # force: no warning that texts are tokenised
    references = [scored[0].references]
    metrics = {name: make(references=references, **options.get(name, {})) for name, make in METRICS.items()}
    systems: list[tuple[str, Sequence[str]]] = [(run.name, run.translations or []) for run in scored]
    signatures, found = PairedTest(systems, metrics, references=None, test_type="bs")()
    del found["System"]
    results: dict[str, dict[str, Result]] = {run.name: {} for run in scored}
    for name, column in zip(METRICS, found.values(), strict=True):  # sacreBLEU calls chrF chrF2
        for run, result in zip(scored, column, strict=True):
            assert isinstance(result, Result)
            results[run.name][name] = result
            # If all resampled differences are 0, sacreBLEU counts none above the difference and returns its least p.
            if result.score == results[scored[0].name][name].score and result.p_value == 1 / (segments.RESAMPLES + 1):
                result.p_value = 1.0
            if scored[0] is not runs[0]:  # sacreBLEU's baseline is not the first run
                result.p_value = None
    return {name: each.format() for name, each in zip(METRICS, signatures.values(), strict=True)}, results


def quality_row(run: Run, results: dict[str, Result]) -> list[Entry]:
    cells = [Entry(run.name)]
    for name in METRICS:
        found = results.get(name)
        cells.append(Entry(f"{found.score:.1f}", f"± {found.ci:.1f}") if found else EMPTY)
    cells.append(number(run.forced, "nll", 1, 3))
    cells.append(Entry(f"{run.forced['parameters']:,}") if run.forced else EMPTY)
    updates = [f"{run.last_update:,}" if run.last_update is not None else ""]
    updates += [f"({run.best_update:,})"] if run.best_update is not None else []
    cells.append(Entry(" ".join(updates).strip()))
    cells.append(Entry(f"{run.minutes:.1f}") if run.minutes is not None else EMPTY)
    return cells


def number(found: dict[str, Any] | None, key: str, scale: float, digits: int) -> Entry:
    """Return the cell of a score with its interval, from the content of a file of `hgkd calibration`.

    Args:
        found: content of the file; None, or a score that is null, results in an empty cell.
        key: key of the score, which the file must have.
        scale: factor of value and interval.
        digits: number of decimals.
    """
    if found is None or score(found, key)["value"] is None:
        return EMPTY
    row = score(found, key)
    interval = ""
    if row["low"] is not None and row["high"] is not None:
        interval = f"[{scale * row['low']:.{digits}f}, {scale * row['high']:.{digits}f}]"
    return Entry(f"{scale * row['value']:.{digits}f}", interval)


def calibration_row(run: Run) -> list[Entry]:
    cells = [number(getattr(run, kind.file), kind.key, 100, 2) for kind in KINDS]
    degree = (run.scaled or run.temperature or {}).get("temperature")
    return [Entry(run.name), Entry(f"{degree:.3f}") if degree else EMPTY, *cells]


def text_differences(first: Run, run: Run, results: dict[str, dict[str, Result]]) -> list[Entry]:
    cells = []
    for name in METRICS:
        ours, theirs = results.get(run.name, {}).get(name), results.get(first.name, {}).get(name)
        if ours is None or theirs is None or ours.p_value is None:
            cells.append(EMPTY)
        else:
            value = ours.score - theirs.score
            cells.append(compared(signed(value, 1), "", ours.p_value))
    return cells


def ece_differences(first: Run, run: Run) -> list[Entry]:
    cells = []
    for kind in KINDS:
        found = difference(getattr(first, kind.file), getattr(run, kind.file), kind)
        if found is None:
            cells.append(EMPTY)
        else:
            ends = f"[{signed(100 * found.low, 2)}, {signed(100 * found.high, 2)}]"
            cells.append(compared(signed(100 * found.value, 2), ends, found.p))
    return cells


def compared(text: str, interval: str, p: float) -> Entry:
    return Entry(text, interval, f"p = {p:.3f}", p < SIGNIFICANT)


def difference(first: dict[str, Any] | None, second: dict[str, Any] | None, kind: Kind) -> Difference | None:
    """Return the difference of the ECE between two runs, second minus first, by paired bootstrap.

    None if one of the two is missing or without tokens, or if they were not resampled alike.
    """
    if first is None or second is None or not resampled_alike(first, second):
        return None
    one, other = (resamples(found, kind.which) for found in (first, second))
    if None in (first[kind.key], second[kind.key]) or (one + other).isnan().all():  # no tokens
        return None
    return paired(one, other, second[kind.key] - first[kind.key])


def resamples(found: dict[str, Any], which: str) -> torch.Tensor:
    values = found["resampled_ece"][which]
    return torch.tensor([torch.nan if value is None else value for value in values], dtype=torch.float64)


def resampled_alike(first: dict[str, Any], second: dict[str, Any]) -> bool:
    return all(found.get("resampled_ece", {}).get("eos:yes") for found in (first, second)) and all(
        first[key] == second[key] for key in ("seed", "replicates", "sentences")
    )


def signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text.replace("-", "−") if float(text) else text[1:]


def quality_notes(runs: Sequence[Run], signatures: dict[str, str]) -> list[str]:
    notes = [f"{name}: `{signature}`" for name, signature in signatures.items()]
    forced = next((run.forced for run in runs if run.forced), None)
    notes += [f"NLL: `{score(forced, 'nll')['signature']}`"] if forced else []
    if runs[0].translated:
        other = f"RUN/{runs[0].translated}"
        notes.append(
            f"BLEU, chrF, TER: of the translations in {other}; all else of RUN, which may be another checkpoint."
        )
    without = [run.name for run in runs if run.translations is not None and run.references is None]
    if without:
        notes.append(f"No references in the translations of {', '.join(without)}: give them with `--reference FILE`.")
    for run in runs:
        if run.log.diverged is not None:
            notes.append(
                f"{run.name} diverged: its NLL on validation is no number from update {run.log.diverged:,} on."
            )
        if "train.log" not in run.missing and run.log.empty:
            notes.append(f"Nothing of fairseq-train's in train.log of {run.name}: `{FILES['train.log']}`.")
    return notes + missing(runs, ("checkpoint_best.pt", "checkpoint_last.pt", GENERATED, "forced.json"))


def calibration_notes(runs: Sequence[Run]) -> list[str]:
    about = []
    for key in ("forced", "inference"):
        found = next((found for found in (getattr(run, key) for run in runs) if found), None)
        about += [f"{key.capitalize()}: `{found['signature']}`"] if found else []
    if any(run.temperature for run in runs):
        about.append("T: the temperature that gives the validation set the least NLL; it divides the logits.")
    for kind in KINDS:
        files = [(run, getattr(run, kind.file)) for run in runs[1:]]
        first = getattr(runs[0], kind.file)
        unlike = [run.name for run, found in files if found and first and not resampled_alike(first, found)]
        if unlike and kind.which == "eos:yes":
            about.append(
                f"No difference in {kind.title} between {runs[0].name} and {', '.join(unlike)}: {kind.file}.json was "
                "not resampled alike; measure both again with one `--seed` and `--replicates`, on one subset."
            )
    return about + missing(
        runs, ("forced.json", "inference.json", "temperature.json", "scaled.json", "inference_scaled.json")
    )


def missing(runs: Sequence[Run], files: Sequence[str]) -> list[str]:
    """Return a note for each file that some runs lack, with the command that makes it."""
    lines = []
    for file in files:
        lacking = [run.name for run in runs if file in run.missing]
        if lacking:
            lines.append(f"No {file} of {', '.join(lacking)}: `{FILES[file]}`.")
    return lines
