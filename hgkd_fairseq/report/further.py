"""Further tables of a report: other calibration measures than ECE, and scores of translations by external metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import segments
from hgkd_fairseq.report.runs import FILES, GENERATED, Run
from hgkd_fairseq.report.tables import EMPTY, Entry, Table, compared, number, signed


@dataclass(frozen=True)
class Measure:
    """Description of a column: a score in a file of `hgkd calibration`, and its format."""

    title: str
    file: str  # field of Run
    key: str
    scale: float = 1
    digits: int = 4
    signature: bool = True  # whether its signature is shown below the table

    def row(self, run: Run) -> dict[str, Any] | None:
        scores = (getattr(run, self.file) or {}).get("scores", [])
        return next((row for row in scores if row["key"] == self.key), None)

    def cell(self, run: Run) -> Entry:
        """Return the cell of a run; empty if the run lacks the file, or an older version wrote it without the score."""
        return EMPTY if self.row(run) is None else number(getattr(run, self.file), self.key, self.scale, self.digits)


SPEARMAN = "spearman_mean_"
MEASURES = (
    Measure("Full-ECE, %", "forced", "full_ece", 100, 2),
    Measure("debiased ECE, %", "forced", "debiased_ece", 100, 2),
    Measure("smooth ECE, %", "forced", "smooth_ece", 100, 2),
    *(
        Measure(f"{title}: {short}{unit}", "forced", f"{key}_{part}", signature=short == "MCB")
        for title, key, unit in (("Brier", "brier_top1", ""), ("NLL", "nll_top1", ", bits"))
        for short, part in (("MCB", "miscalibration"), ("DSC", "discrimination"), ("UNC", "uncertainty"))
    ),
)
ABOUT = (
    "Teacher-forced, with EOS. Full-ECE: over all probabilities of the vocabulary. MCB, DSC, UNC: CORP's "
    "miscalibration, discrimination and uncertainty of the Brier score and the NLL of the event that the top-1 token "
    "is right; the score is MCB − DSC + UNC."
)
RANKED = "Spearman: rank correlation of a translation's mean log-probability per token with its quality, by sentence."


def tables(runs: Sequence[Run], segment_scores: Sequence[segments.Named] = ()) -> list[Table]:
    """Make the further tables, without those that are empty.

    Args:
        runs: runs with distinct names, the first of which the others are compared with.
        segment_scores: files with scores of the translations by other metrics, for each metric one file per run, in the
            order of the runs.

    Raises:
        UserError: a file of scores cannot be used or does not match the runs, or runs were measured in different ways.
    """
    return [table for table in (other_metrics(runs, segment_scores), other_measures(runs)) if table]


def other_measures(runs: Sequence[Run]) -> Table | None:
    ranked = dict.fromkeys(
        row["key"] for run in runs for row in (run.inference or {}).get("scores", []) if row["key"].startswith(SPEARMAN)
    )
    names = {"bleu": "BLEU", "chrf": "chrF"}
    correlations = [
        Measure(
            f"Spearman, {names.get(key.removeprefix(SPEARMAN), key.removeprefix(SPEARMAN))}", "inference", key, 1, 3
        )
        for key in ranked
    ]
    for one in correlations:
        check_one_way(runs, one)
    shown = [one for one in (*MEASURES, *correlations) if any(one.cell(run).text for run in runs)]
    if not shown:
        return None
    signatures = [next(filter(None, map(one.row, runs)))["signature"] for one in shown if one.signature]
    notes = [ABOUT] if any(one.file == "forced" for one in shown) else []
    notes += [RANKED] if any(one.file == "inference" for one in shown) else []
    return Table(
        "Calibration by other measures",
        ["model", *(one.title for one in shown)],
        [[Entry(run.name), *(one.cell(run) for one in shown)] for run in runs],
        [*notes, ", ".join(f"`{one}`" for one in signatures)],
    )


def check_one_way(runs: Sequence[Run], measure: Measure) -> None:
    """Check that all runs have a score with the same signature.

    Raises:
        UserError: signatures differ, for example in the tokenizer.
    """
    files = [(f"{run.folder / measure.file}.json", row["signature"]) for run in runs if (row := measure.row(run))]
    for file, signature in files[1:]:
        if signature != files[0][1]:
            raise UserError(f"{file} holds {signature} and {files[0][0]} {files[0][1]}; measure both in one way")


def other_metrics(runs: Sequence[Run], given: Sequence[segments.Named]) -> Table | None:
    """Make the table of the mean scores by other metrics, and of their differences from the first run."""
    named = segments.by_metric(given, [run.name for run in runs])
    if not named:
        return None
    counts = {run.name: len(run.translations) for run in runs if run.translations is not None}
    if not counts:
        raise UserError(f"{segments.OPTION}: no run has a {GENERATED}; write it: {FILES[GENERATED]}")
    known, sentences = next(iter(counts.items()))
    rows = [[Entry(run.name)] for run in runs]
    header = ["model"]
    for metric, files in named.items():
        header += [metric, f"{metric} − {runs[0].name}"] if len(runs) > 1 else [metric]
        scores = [segments.read(file, sentences, f"{GENERATED} of {known}") for file in files]
        for place, found in enumerate(segments.paired_bootstrap(scores)):
            rows[place].append(Entry(f"{found.mean:.4f}", f"± {found.interval:.4f}"))
            if len(runs) > 1:
                difference = found.mean - float(scores[0].mean())
                rows[place].append(EMPTY if found.p is None else compared(signed(difference, 4), "", found.p))
    about = (
        f"Means over the sentences, of files that {segments.OPTION} names: `{segments.signature()}`, with BLEU's "
        f"resamples. {segments.ONE_TAIL}. Bold: p below 0.05."
    )
    return Table("Scores of other metrics", header, rows, [about])
