"""Scores with their signatures and intervals, and the accumulators that they are read from."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

import hgkd_fairseq
from hgkd_fairseq.calibration import corp, histogram
from hgkd_fairseq.calibration.bootstrap import LEVEL, SentenceBootstrap
from hgkd_fairseq.calibration.fine import FineHistogram
from hgkd_fairseq.errors import UserError

MOST_RESAMPLED = 20_000_000  # bins x replicates: 1.5 GB of sums


@dataclass(frozen=True)
class Score:
    """One number, how it was computed, and its interval. Fractions, but for what has another unit."""

    key: str  # "ece"; "ece_without_eos"
    signature: str  # ECE|bins:20|mode:forced|eos:yes|tok:bpe|version:0.1.0
    value: float
    low: float | None = None  # ends of the interval; None where none is computed
    high: float | None = None
    unit: str = "%"

    def __str__(self) -> str:
        scale, digits = (100, 2) if self.unit == "%" else (1, 3)
        text = f"{self.signature} = {scale * self.value:.{digits}f}" + (f" {self.unit}" if self.unit else "")
        if self.low is None or self.high is None:
            return text
        return f"{text} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


def signature(name: str, **parts: Any) -> str:
    """How a number was computed, in sacreBLEU's manner: signature("ECE", bins=20) is ECE|bins:20|version:0.1.0."""
    return "|".join([name, *(f"{key}:{value}" for key, value in parts.items()), f"version:{hgkd_fairseq.__version__}"])


@dataclass(frozen=True)
class Settings:
    """How scores are computed, whatever the predictions."""

    bins: int = 20
    min_count: int = 1  # predictions that a bin needs to count for the MCE
    replicates: int = 1000  # of the bootstrap; 0: no intervals
    seed: int = 1

    def __post_init__(self):
        if self.bins * self.replicates > MOST_RESAMPLED:
            raise UserError(f"--bins {self.bins} x --replicates {self.replicates} are too many; lower one of them")


class Mean(NamedTuple):
    """A score that is the mean of a number per prediction."""

    key: str
    name: str
    unit: str = ""


BRIER_TOP1 = Mean("brier_top1", "BrierTop1")
NLL_TOP1 = Mean("nll_top1", "NLLTop1", "bits")  # of the event that the top-1 prediction is right


class Predictions:
    """Accumulators of one kind of predictions (tokens with EOS, tokens without, sentences); constant memory.

    Args:
        settings: see there.
        suffix: of the scores' keys.
        parts: of the signatures, after the number of bins.
        means: further numbers per prediction, given to :meth:`update` by their key.
    """

    def __init__(self, settings: Settings, suffix: str = "", parts: dict[str, Any] | None = None, means=()):
        self.settings, self.suffix, self.parts = settings, suffix, parts or {}
        self.means: tuple[Mean, ...] = (*means, BRIER_TOP1, NLL_TOP1)
        self.fine = FineHistogram()
        self.sums = torch.zeros(3 * settings.bins + len(self.means), dtype=torch.float64)
        self.bootstrap = SentenceBootstrap(self.sums.numel(), settings.replicates, settings.seed)
        self.distributions: Tensor | None = None  # (2, 3, bins), where they are known: for weighted ECE and Full-ECE

    def update(self, sentence: Tensor, confidence: Tensor, correct: Tensor, **means: Tensor) -> None:
        """Add N predictions of whole sentences: each sentence's in one call.

        Args:
            sentence: (N,) int64, number of the sentence.
            confidence: (N,) in [0, 1].
            correct: (N,) booleans or numbers in [0, 1].
            means: (N,) each, by key.

        Raises:
            ValueError: a confidence is NaN or outside [0, 1].
        """
        sentence, confidence, correct = sentence.cpu(), confidence.cpu().double(), correct.cpu().double()
        self.fine.update(confidence, correct)  # checks them
        numbers, group = sentence.unique(return_inverse=True)
        if not numbers.numel():
            return
        tables = histogram.tabulate(confidence, correct, self.settings.bins, group=group, groups=numbers.numel())
        columns = torch.zeros(numbers.numel(), len(self.means), dtype=torch.float64)
        means[BRIER_TOP1.key] = (confidence - correct).square()
        means[NLL_TOP1.key] = corp.binary_nll(confidence, correct)
        columns.index_add_(0, group, torch.stack([means[mean.key].cpu().double() for mean in self.means], dim=1))
        statistics = torch.cat([tables.flatten(1), columns], dim=1)  # (S, K)
        self.sums += statistics.sum(0)
        if self.settings.replicates:
            self.bootstrap.update(numbers.tolist(), statistics)

    def merge(self, other: Predictions) -> None:
        """Add the predictions of other sentences, of another worker say."""
        self.fine.merge(other.fine)
        self.bootstrap.merge(other.bootstrap)
        self.sums = self.sums + other.sums
        if other.distributions is not None:
            self.add_distributions(other.distributions)

    def add_distributions(self, tables: Tensor) -> None:
        """Add the (2, 3, bins) tables of :func:`distribution.distribution_tables`, of one group."""
        tables = tables.cpu()
        self.distributions = tables if self.distributions is None else self.distributions + tables

    def table(self, sums: Tensor) -> Tensor:
        """(..., 3, bins) of sums (..., K)."""
        return sums[..., : 3 * self.settings.bins].unflatten(-1, (3, self.settings.bins))

    @property
    def histogram(self) -> histogram.CalibrationHistogram:
        return histogram.CalibrationHistogram(sums=self.table(self.sums))

    def scores(self) -> list[Score]:
        return [*self.binned_scores(), *self.fine_scores(), *self.mean_scores(), *self.corp_scores()]

    def score(self, key: str, name: str, function: Callable[[Tensor], Tensor], unit: str = "%", **first: Any) -> Score:
        """A score of sums (..., K), with its interval; `first` opens its signature."""
        low = high = None
        if self.settings.replicates:
            low, high = (float(end) for end in self.bootstrap.interval(function))
        text = signature(name, **first, **self.parts)
        return Score(key + self.suffix, text, float(function(self.sums)), low, high, unit)

    def binned_scores(self) -> list[Score]:
        """ECE, MCE, RMS, and the two parts of the ECE."""
        bins, least = self.settings.bins, self.settings.min_count

        def of_table(function):
            return lambda sums: function(self.table(sums))

        return [
            self.score("ece", "ECE", of_table(histogram.ece), bins=bins),
            self.score("mce", "MCE", of_table(lambda table: histogram.mce(table, least)), bins=bins, min=least),
            self.score("rms", "RMSCE", of_table(histogram.rms), bins=bins),
            self.score("overconfidence", "Over", of_table(histogram.overconfidence), bins=bins),
            self.score("underconfidence", "Under", of_table(histogram.underconfidence), bins=bins),
        ]

    def fine_scores(self) -> list[Score]:
        """Debiased, adaptive, smooth and, where whole distributions are known, weighted and full ECE; without
        intervals: a resample would bring back the bias that was taken out."""
        bins, table = self.settings.bins, self.table(self.sums)
        found = [
            ("debiased_ece", signature("DebiasedECE", bins=bins, **self.parts), float(histogram.debiased_ece(table))),
            ("debiased_rms", signature("DebiasedRMSCE", bins=bins, **self.parts), float(histogram.debiased_rms(table))),
            ("adaptive_ece", signature("AdaECE", bins=bins, **self.parts), self.fine.adaptive_ece(bins)),
            ("smooth_ece", signature("smECE", **self.parts), self.fine.smooth_ece()),
        ]
        if self.distributions is not None:
            for key, name, each in zip(
                ("weighted_ece", "full_ece"), ("wECE", "FullECE"), self.distributions, strict=True
            ):
                found.append((key, signature(name, bins=bins, **self.parts), float(histogram.ece(each))))
        return [Score(key + self.suffix, text, value) for key, text, value in found]

    def corp_scores(self) -> list[Score]:
        """Miscalibration, discrimination and uncertainty of the top-1 prediction's Brier score and NLL; without
        intervals."""
        brier, nll = (float(self.average(self.sums, mean)) for mean in (BRIER_TOP1, NLL_TOP1))
        splits = corp.split(self.fine.sums, brier, nll)
        return [
            Score(
                f"{mean.key}_{name}{self.suffix}", signature(short, of=mean.name, **self.parts), value, unit=mean.unit
            )
            for mean, parts in ((BRIER_TOP1, splits["brier"]), (NLL_TOP1, splits["nll"]))
            for (name, value), short in zip(parts._asdict().items(), ("MCB", "DSC", "UNC"), strict=True)
        ]

    def mean_scores(self) -> list[Score]:
        """Accuracy, mean confidence, and the means of what else was given."""
        found = [
            self.score("accuracy", "Accuracy", lambda sums: histogram.accuracy(self.table(sums))),
            self.score("confidence", "Confidence", lambda sums: histogram.mean_confidence(self.table(sums))),
        ]
        for mean in self.means:
            found.append(self.score(mean.key, mean.name, functools.partial(self.average, mean=mean), mean.unit))
        return found

    def average(self, sums: Tensor, mean: Mean) -> Tensor:
        """(...) of sums (..., K). NaN without predictions."""
        return sums[..., 3 * self.settings.bins + self.means.index(mean)] / histogram.count(self.table(sums))

    def bars(self) -> dict[str, list[float]]:
        """Per bin: count, summed confidence and correctness, and the ends of the accuracy's interval."""
        names = ("count", "confidence", "correct")
        result = {name: row.tolist() for name, row in zip(names, self.table(self.sums), strict=True)}
        if self.settings.replicates:

            def accuracies(sums):
                table = self.table(sums)
                return table[..., histogram.CORRECT, :] / table[..., histogram.COUNT, :]

            low, high = self.bootstrap.interval(accuracies)
            result |= {"low": low.nan_to_num().tolist(), "high": high.nan_to_num(nan=1.0).tolist()}
        return result

    def resampled_ece(self) -> list[float]:
        """The ECE of each resample. Two models scored on one test set with one seed are resampled alike: differences of
        these make a paired bootstrap (:func:`bootstrap.paired`)."""
        return histogram.ece(self.table(self.bootstrap.sums)).tolist()


@dataclass(frozen=True)
class Results:
    """What one command measured."""

    about: dict[str, Any]  # mode, files, counts
    settings: Settings
    scores: list[Score]
    histograms: dict[str, dict[str, list[float]]]  # by "eos:yes", "eos:no": Predictions.bars()
    resampled_ece: dict[str, list[float]]  # likewise: Predictions.resampled_ece()

    def __getitem__(self, key: str) -> Score:
        return next(score for score in self.scores if score.key == key)

    def __str__(self) -> str:
        lines = [str(score) for score in self.scores]
        if self.settings.replicates:
            lines.append(
                f"[{LEVEL:.0%} intervals: bootstrap over sentences, {self.settings.replicates} replicates, "
                f"seed {self.settings.seed}]"
            )
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Values by key at the top, for reading by eye and by scripts; the scores with all they have below. NaN, which
        JSON does not have, is null."""
        rows = [asdict(score) for score in self.scores]
        for row in rows:
            row |= {key: None for key in ("value", "low", "high") if row[key] is not None and math.isnan(row[key])}
        return {
            **self.about,
            **{row["key"]: row["value"] for row in rows},
            "signature": self["ece"].signature,
            **asdict(self.settings),
            "scores": rows,
            "histograms": self.histograms,
            "resampled_ece": {
                which: [None if math.isnan(value) else round(value, 7) for value in row]
                for which, row in self.resampled_ece.items()
            },
        }
