"""Intervals over sentences: their width, what they depend on, and what they do not."""

import math

import numpy as np
import pytest
import torch

from hgkd_fairseq.calibration import SentenceBootstrap
from hgkd_fairseq.calibration.histogram import accuracy, ece, tabulate
from hgkd_fairseq.calibration.scores import Mean, Predictions, Score, Settings, signature


def mean(sums):
    return sums[:, 1] / sums[:, 0]


def statistics(sentences: int, seed: int = 0) -> torch.Tensor:
    """(S, 2): tokens, and how many of them are right. All tokens of a sentence are right or none."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 15, size=sentences)
    return torch.tensor(np.stack([tokens, tokens * (rng.random(sentences) < 0.7)], axis=1)).double()


def test_width_is_that_of_drawing_with_replacement():
    """And not of independent tokens, which would be a third of it."""
    sums = statistics(500)
    bootstrap = SentenceBootstrap(2, replicates=2000)
    bootstrap.update(range(500), sums)
    low, high = bootstrap.interval(mean)
    rng = np.random.default_rng(5)
    drawn = sums[torch.tensor(rng.integers(0, 500, size=(2000, 500)))].sum(1)  # (R, 2)
    expected = np.quantile(mean(drawn), [0.025, 0.975])
    assert [float(low), float(high)] == pytest.approx(expected, abs=0.006)
    independent = 2 * 1.96 * math.sqrt(0.21 / float(sums[:, 0].sum()))
    assert float(high - low) > 2.5 * independent


def test_depends_on_the_seed_and_the_sentences_only():
    sums = statistics(40)
    once, parts, other = SentenceBootstrap(2, 50), SentenceBootstrap(2, 50), SentenceBootstrap(2, 50, seed=2)
    once.update(range(40), sums)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    parts.update(order[:10].tolist(), sums[order[:10]])
    worker = SentenceBootstrap(2, 50)
    worker.update(order[10:].tolist(), sums[order[10:]])
    parts.merge(worker)
    other.update(range(40), sums)
    assert torch.equal(once.sums, parts.sums)
    assert not torch.equal(once.sums, other.sums)
    with pytest.raises(ValueError, match="different seeds"):
        once.merge(other)


def test_replicates_without_a_score_are_left_out():
    bootstrap = SentenceBootstrap(2, replicates=200)
    bootstrap.update([0], torch.tensor([[4.0, 1.0]]))  # one sentence: left out of every third replicate
    assert [float(end) for end in bootstrap.interval(mean)] == [0.25, 0.25]
    assert all(math.isnan(end) for end in SentenceBootstrap(2, replicates=0).interval(mean))


def predictions(rows: slice, settings: Settings) -> Predictions:
    """Of 30 sentences of 8 tokens those in `rows`."""
    rng = np.random.default_rng(4)
    confidence = torch.tensor(rng.random((30, 8)))
    correct = torch.tensor(rng.random((30, 8)) < 0.5)
    sentence = torch.arange(30)[:, None].expand(30, 8)
    found = Predictions(settings, parts={"mode": "forced"}, means=[Mean("nll", "NLL", "bits")])
    for batch in range(rows.start, rows.stop, 3):
        part = slice(batch, min(batch + 3, rows.stop))
        found.update(
            sentence[part].flatten(),
            confidence[part].flatten(),
            correct[part].flatten(),
            nll=confidence[part].flatten(),
        )
        found.add_weighted(tabulate(confidence[part].flatten(), correct[part].flatten(), settings.bins)[0])
    return found


def test_predictions_merge():
    settings = Settings(bins=5, replicates=20)
    once, merged = predictions(slice(0, 30), settings), predictions(slice(0, 14), settings)
    merged.merge(predictions(slice(14, 30), settings))
    assert "weighted_ece" in [score.key for score in once.scores()]
    for one, other in zip(once.scores(), merged.scores(), strict=True):
        assert one.signature == other.signature
        assert [one.value, one.low, one.high] == pytest.approx([other.value, other.low, other.high], nan_ok=True)
    assert once.histogram.sums[0].sum() == 240


def test_scores_of_predictions():
    found = predictions(slice(0, 30), Settings(bins=5, min_count=3))
    scores = {score.key: score for score in found.scores()}
    sums = found.histogram.sums
    assert scores["ece"].value == float(ece(sums))
    assert scores["accuracy"].value == float(accuracy(sums))
    assert scores["nll"].value == pytest.approx(scores["confidence"].value)
    assert scores["mce"].signature == "MCE|bins:5|min:3|mode:forced|version:0.1.0"
    assert all(score.low <= score.value <= score.high for score in scores.values() if score.key in ("accuracy", "nll"))
    assert scores["smooth_ece"].low is None
    bars = found.bars()
    assert bars["count"] == sums[0].tolist()
    assert all(0 <= low <= high <= 1 for low, high in zip(bars["low"], bars["high"], strict=True))
    without = predictions(slice(0, 30), Settings(bins=5, replicates=0))
    assert without.scores()[0].low is None
    assert "low" not in without.bars()


def test_how_a_score_is_shown():
    text = signature("ECE", bins=20, mode="forced")
    assert text == "ECE|bins:20|mode:forced|version:0.1.0"
    assert str(Score("ece", text, 0.01234)) == f"{text} = 1.23 %"
    assert str(Score("ece", text, 0.01234, 0.01, 0.02)) == f"{text} = 1.23 % [1.00, 2.00]"
    assert str(Score("nll", "NLL|x", 1.5, 1, 2, "bits")) == "NLL|x = 1.500 bits [1.000, 2.000]"
    assert str(Score("brier", "B|x", 0.5, unit="")) == "B|x = 0.500"
