"""Scores of sentences by a metric that has an environment of its own (COMET, MetricX): a number a line, in the order of
the subset; and what differs between systems by more than chance."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError

RESAMPLES = 1000  # of sacreBLEU's paired bootstrap
SEED = "12345"  # likewise, where SACREBLEU_SEED gives no other
OPTION = "--segment-scores"
ONE_TAIL = "sacreBLEU's paired bootstrap counts one tail: its p is about half of a two-sided one"


class Named(Protocol):
    """A value of the option: the name of a file, and of the metric."""

    metric: str

    def __str__(self) -> str: ...


def read(file: str, sentences: int, of: str) -> np.ndarray:
    """(N,) the scores in a file.

    Args:
        file: text, a number a line.
        sentences: N.
        of: what has as many sentences, for the message.

    Raises:
        UserError: the file cannot be read, a line is no finite number, or there are not N.
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
    """The files of each metric, one for each system.

    Raises:
        UserError: a metric has not as many files as there are systems.
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
    """The mean score of a system."""

    mean: float
    interval: float  # half of the 95 % interval
    p: float | None  # of its difference from the first system, of one tail; None for that one


def paired_bootstrap(scores: Sequence[np.ndarray]) -> list[Tested]:
    """Of each system, whose scores are (N,): what sacreBLEU says of BLEU, under the same resamples.

    These are N draws with replacement each, from numpy's default generator with sacreBLEU's seed; the interval is that
    of the resampled means; p is how often the size of a resampled difference, less the mean size, is above that of the
    sample, the sample itself counted as one (Koehn 2004, as Moses' script and sacrebleu.significance have it). In
    effect that counts one tail: about half of a two-sided p, such as :func:`bootstrap.paired` gives. Of systems that
    differ in no resample p is 1, where sacreBLEU has its least one.
    """
    seed = os.environ.get("SACREBLEU_SEED", SEED)
    generator = np.random.default_rng(None if seed.lower() == "none" else int(seed))
    count = len(scores[0])
    drawn = generator.choice(count, size=(RESAMPLES, count), replace=True)
    means = [values[drawn].mean(1) for values in scores]  # (R,) each
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
    """How it was computed, in sacreBLEU's manner."""
    return f"mean|bs:{RESAMPLES}|seed:{os.environ.get('SACREBLEU_SEED', SEED).lower()}"
