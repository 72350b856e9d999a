"""Sentence scores by external metrics (COMET, MetricX), read from files with one number per line in the order of the
subset, and significance tests of the differences between systems."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError

RESAMPLES = 1000  # as in sacreBLEU's paired bootstrap
SEED = "12345"  # likewise, unless SACREBLEU_SEED is set
OPTION = "--segment-scores"
ONE_TAIL = "sacreBLEU's paired bootstrap counts one tail: its p is about half of a two-sided one"


class Named(Protocol):
    """A value of the option: the name of a file, with the name of its metric."""

    metric: str

    def __str__(self) -> str: ...


def read(file: str, sentences: int, of: str) -> np.ndarray:
    """Read the sentence scores in a file.

    Args:
        file: text file with one number per line.
        sentences: number of sentences, N.
        of: name of the sentences' source, for the error message.

    Returns:
        (N,) float64 scores.

    Raises:
        UserError: the file cannot be read, a line is not a finite number, or the number of lines is not N.
    """
    found = []
    for place, line in enumerate(files.read_lines(file, f"name a file of {OPTION}, a score a line"), 1):
        try:
            score = float(line)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            shown = line[:40] if line.strip() else "an empty line"
            raise UserError(f"{file}: line {place} is no finite number ({shown}); give a score for each sentence")
        found.append(score)
    if len(found) != sentences:
        raise UserError(
            f"{file} ends after line {len(found)} and {of} has {sentences} sentences; give a score for each, one a "
            "line, in the order of the subset"
        )
    return np.array(found)


def by_metric(given: Sequence[Named], systems: Sequence[str]) -> dict[str, list[str]]:
    """Group files by metric.

    Args:
        given: values of the option.
        systems: names of the systems.

    Returns:
        By metric, the names of its files, one for each system, in the order of the systems.

    Raises:
        UserError: the number of files of a metric is not that of the systems.
    """
    found: dict[str, list[str]] = {}
    for one in given:
        found.setdefault(one.metric, []).append(str(one))
    for metric, named in found.items():
        if len(named) != len(systems):
            raise UserError(
                f"{OPTION} {metric}=... is given {len(named)} times for {len(systems)} ({', '.join(systems)}); give it "
                "once for each, in their order"
            )
    return found


@dataclass(frozen=True)
class Tested:
    """The mean score of a system, with the test of its difference from the first system."""

    mean: float
    interval: float  # half the width of the 95 % interval
    p: float | None  # p-value of the difference from the first system; None for the first system


def paired_bootstrap(scores: Sequence[np.ndarray]) -> list[Tested]:
    """Compare the mean scores of systems by sacreBLEU's paired bootstrap, with the resamples that it uses for BLEU.

    A resample consists of N draws with replacement, from numpy's default generator with sacreBLEU's seed. The interval
    is that of the resampled means. With the resampled differences d_r from the first system, and the difference d of
    the sample, p = (1 + #{r: |d_r| - mean |d_r| > |d|}) / (1 + RESAMPLES) (Koehn, EMNLP 2004, as implemented in Moses
    and sacrebleu.significance). In effect this counts one tail: p is about half of a two-sided one, such as that of
    :func:`bootstrap.paired`. If two systems are equal in all resamples, p is 1, whereas sacreBLEU gives the least
    possible value.

    Args:
        scores: sentence scores (N,) of each system.

    Returns:
        The result of each system, in order.

    Raises:
        UserError: the environment variable SACREBLEU_SEED is neither a whole number nor "none".
    """
    seed = os.environ.get("SACREBLEU_SEED", SEED)
    if seed.lower() != "none" and not seed.isdecimal():
        raise UserError(f"SACREBLEU_SEED={seed}: it is neither a whole number nor none; set it to one of them")
    generator = np.random.default_rng(None if seed.lower() == "none" else int(seed))
    count = len(scores[0])
    drawn = generator.choice(count, size=(RESAMPLES, count), replace=True)
    means = [values[drawn].mean(1) for values in scores]  # (RESAMPLES,) each
    found = []
    for place, (values, resampled) in enumerate(zip(scores, means, strict=True)):
        ordered = np.sort(resampled)
        left_out = RESAMPLES // 40
        interval = float(ordered[-left_out - 1] - ordered[left_out]) / 2
        p = None
        if place:
            sizes = np.abs(resampled - means[0])
            above = sizes - sizes.mean() > abs(values.mean() - scores[0].mean())
            p = (int(above.sum()) + 1) / (RESAMPLES + 1) if sizes.any() else 1.0
        found.append(Tested(float(values.mean()), interval, p))
    return found


def signature() -> str:
    """Return a signature of the means and their tests, in sacreBLEU's format."""
    return f"mean|bs:{RESAMPLES}|seed:{os.environ.get('SACREBLEU_SEED', SEED).lower()}"
