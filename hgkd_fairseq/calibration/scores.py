"""Scores with their signatures and intervals, and the accumulators that compute them from predictions."""

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

MOST_RESAMPLED = 20_000_000  # bins x replicates; a Predictions then has 0.5 GB of sums, and about three exist at a time


@dataclass(frozen=True)
class Score:
    """A score with its signature and its interval.

    Value and interval are fractions if the unit is "%" (they are multiplied by 100 for display only), and in the given
    unit otherwise.
    """

    key: str  # such as "ece" or "ece_without_eos"
    signature: str  # such as ECE|bins:20|mode:forced|eos:yes|tok:bpe|version:0.1.0
    value: float
    low: float | None = None  # lower and upper end of the interval; None if there is no interval
    high: float | None = None
    unit: str = "%"

    def __str__(self) -> str:
        scale, digits = (100, 2) if self.unit == "%" else (1, 3)
        text = f"{self.signature} = {scale * self.value:.{digits}f}" + (f" {self.unit}" if self.unit else "")
        if self.low is None or self.high is None:
            return text
        return f"{text} [{scale * self.low:.{digits}f}, {scale * self.high:.{digits}f}]"


def signature(name: str, **parts: Any) -> str:
    """Return a signature in the style of sacreBLEU, which says how a score is computed.

    For example, signature("ECE", bins=20) is "ECE|bins:20|version:0.1.0".
    """
    return "|".join([name, *(f"{key}:{value}" for key, value in parts.items()), f"version:{hgkd_fairseq.__version__}"])


@dataclass(frozen=True)
class Settings:
    """Settings for the computation of scores.

    Raises:
        UserError: `bins` x `replicates` is more than MOST_RESAMPLED.
    """

    bins: int = 20
    min_count: int = 1  # least number of predictions in a bin that is considered for the MCE
    replicates: int = 1000  # number of bootstrap resamples; 0: no intervals
    seed: int = 1  # random seed of the bootstrap

    def __post_init__(self):
        if self.bins * self.replicates > MOST_RESAMPLED:
            raise UserError(f"--bins {self.bins} x --replicates {self.replicates} are too many; lower one of them")


class Mean(NamedTuple):
    """Description of a score that is the mean of one number per prediction: key, name in signatures, and unit."""

    key: str
    name: str
    unit: str = ""


BRIER_TOP1 = Mean("brier_top1", "BrierTop1")
NLL_TOP1 = Mean("nll_top1", "NLLTop1", "bits")  # NLL of the event that the top-1 prediction is right


class Predictions:
    """Accumulator of one kind of predictions (tokens with EOS, tokens without EOS, or sentences), in constant memory.

    Args:
        settings: settings of the scores.
        suffix: suffix of the keys of all scores.
        parts: parts of all signatures, after the number of bins.
        means: further scores, the numbers for which are passed to :meth:`update` by their keys.

    Attributes:
        sums: (K,) fp64, K = 3 * bins + number of means: the flattened (3, bins) table, and the sum for each mean.
    """

    def __init__(self, settings: Settings, suffix: str = "", parts: dict[str, Any] | None = None, means=()):
        self.settings, self.suffix, self.parts = settings, suffix, parts or {}
        self.means: tuple[Mean, ...] = (*means, BRIER_TOP1, NLL_TOP1)
        self.fine = FineHistogram()
        self.sums = torch.zeros(3 * settings.bins + len(self.means), dtype=torch.float64)
        self.bootstrap = SentenceBootstrap(self.sums.numel(), settings.replicates, settings.seed)
        self.distributions: Tensor | None = None  # (2, 3, bins), for weighted ECE and Full-ECE; None if unknown

    def update(self, sentence: Tensor, confidence: Tensor, correct: Tensor, **means: Tensor) -> None:
        """Add N predictions.

        Args:
            sentence: (N,) int64, number of the sentence of each prediction, at least 0.
            confidence: (N,) in [0, 1].
            correct: (N,) booleans or numbers in [0, 1].
            means: (N,) numbers for each of the further means, by key.

        Raises:
            ValueError: `confidence` and `correct` are not 1-d or differ in length, or a confidence is NaN or outside
                [0, 1].
            KeyError: the numbers for one of the means are missing.
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
        """Add the predictions of another accumulator, for example of another worker.

        Raises:
            ValueError: seeds, numbers of replicates or numbers of statistics differ.
        """
        self.fine.merge(other.fine)
        self.bootstrap.merge(other.bootstrap)
        self.sums = self.sums + other.sums
        if other.distributions is not None:
            self.add_distributions(other.distributions)

    def add_distributions(self, tables: Tensor) -> None:
        """Add the tables (2, 3, bins) of one group, as :func:`distribution.distribution_tables` returns them."""
        tables = tables.cpu()
        self.distributions = tables if self.distributions is None else self.distributions + tables

    def table(self, sums: Tensor) -> Tensor:
        """Return the tables (..., 3, bins) in sums (..., K)."""
        return sums[..., : 3 * self.settings.bins].unflatten(-1, (3, self.settings.bins))

    @property
    def histogram(self) -> histogram.CalibrationHistogram:
        return histogram.CalibrationHistogram(sums=self.table(self.sums))

    def scores(self) -> list[Score]:
        return [*self.binned_scores(), *self.fine_scores(), *self.mean_scores(), *self.corp_scores()]

    def score(self, key: str, name: str, function: Callable[[Tensor], Tensor], unit: str = "%", **first: Any) -> Score:
        """Compute a score and its interval.

        Args:
            key: key, without the suffix.
            name: name in the signature.
            function: function from sums (..., K) to the score (...).
            unit: unit of the score.
            first: first parts of the signature, before those of all scores.
        """
        low = high = None
        if self.settings.replicates:
            low, high = (float(end) for end in self.bootstrap.interval(function))
        text = signature(name, **first, **self.parts)
        return Score(key + self.suffix, text, float(function(self.sums)), low, high, unit)

    def binned_scores(self) -> list[Score]:
        """Compute ECE, MCE, root mean square calibration error, and the two parts of the ECE, with intervals."""
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
        """Compute debiased, adaptive, smooth and, if whole distributions are known, weighted and full ECE.

        They have no intervals: resampling would add the bias that debiasing removes, and only the table of equal-width
        bins is resampled.
        """
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
        """Compute miscalibration, discrimination and uncertainty of the Brier score and the NLL of the top-1
        prediction, without intervals."""
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
        """Compute accuracy, mean confidence and all further means, with intervals."""
        found = [
            self.score("accuracy", "Accuracy", lambda sums: histogram.accuracy(self.table(sums))),
            self.score("confidence", "Confidence", lambda sums: histogram.mean_confidence(self.table(sums))),
        ]
        for mean in self.means:
            found.append(self.score(mean.key, mean.name, functools.partial(self.average, mean=mean), mean.unit))
        return found

    def average(self, sums: Tensor, mean: Mean) -> Tensor:
        """Return the mean of the numbers for `mean`, (...), from sums (..., K). NaN without predictions."""
        return sums[..., 3 * self.settings.bins + self.means.index(mean)] / histogram.count(self.table(sums))

    def bars(self) -> dict[str, list[float]]:
        """Return count, summed confidence and summed correctness of each bin, in lists of length bins.

        With replicates, "low" and "high" are the ends of the intervals of the accuracies; 0 and 1 in bins that are
        empty in all resamples.
        """
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
        """Return the ECE of each resample, a list of length replicates.

        Two models scored on the same test set with the same seed are resampled alike, so the differences of their ECEs
        form a paired bootstrap (:func:`bootstrap.paired`).
        """
        return histogram.ece(self.table(self.bootstrap.sums)).tolist()


@dataclass(frozen=True)
class Results:
    """Result of one evaluation command, with all scores and histograms."""

    about: dict[str, Any]  # mode, files and counts
    settings: Settings
    scores: list[Score]
    histograms: dict[str, dict[str, list[float]]]  # Predictions.bars() by "eos:yes" and "eos:no"
    resampled_ece: dict[str, list[float]]  # Predictions.resampled_ece() by the same keys

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
        """Return the content of the JSON file: the value of each score by its key at the top level, and all fields of
        the scores in the list "scores". NaN, which JSON does not support, becomes None."""
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
