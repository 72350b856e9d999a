"""Intervals over sentences: their width, what they depend on, and what they do not."""

import math
import tracemalloc

import numpy as np
import pytest
import torch

from hgkd_fairseq.calibration import SentenceBootstrap
from hgkd_fairseq.calibration import bootstrap as module
from hgkd_fairseq.calibration.bootstrap import paired, poisson_draws
from hgkd_fairseq.calibration.correlation import spearman, spearman_interval
from hgkd_fairseq.calibration.histogram import accuracy, ece, tabulate
from hgkd_fairseq.calibration.scores import Mean, Predictions, Results, Score, Settings, signature


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


def test_many_sentences_at_once_take_little_memory(monkeypatch: pytest.MonkeyPatch):
    """A byte a draw, and of sums the draws of some sentences only: 8 bytes each were 16 kB a sentence."""
    count, replicates, sums = 800, 250, statistics(800)
    monkeypatch.setattr(module, "SENTENCES", 64)
    several = SentenceBootstrap(2, replicates)
    tracemalloc.start()
    several.update(range(count), sums)
    alive = [tracemalloc.get_traced_memory()[1]]
    tracemalloc.reset_peak()
    interval = spearman_interval(sums[:, 0], sums[:, 1], list(range(count)), replicates, 1)
    alive.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    assert alive[0] < count * replicates
    assert alive[1] < 2 * count * replicates
    draws = torch.from_numpy(poisson_draws(range(count), replicates, 1)).double().T
    torch.testing.assert_close(several.sums, draws @ sums)
    found = spearman(sums[:, 0], sums[:, 1], draws)
    assert interval == pytest.approx(found.quantile(found.new_tensor([0.025, 0.975])).tolist(), abs=1e-12)


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
        found.add_distributions(
            tabulate(confidence[part].flatten(), correct[part].flatten(), settings.bins).expand(2, -1, -1)
        )
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


# Of each score the key, and how its signature begins.
SCORES = {
    "ece": "ECE|bins:5", "mce": "MCE|bins:5|min:3", "rms": "RMSCE|bins:5", "overconfidence": "Over|bins:5",
    "underconfidence": "Under|bins:5", "debiased_ece": "DebiasedECE|bins:5", "debiased_rms": "DebiasedRMSCE|bins:5",
    "adaptive_ece": "AdaECE|bins:5", "smooth_ece": "smECE", "weighted_ece": "wECE|bins:5", "full_ece": "FullECE|bins:5",
    "accuracy": "Accuracy", "confidence": "Confidence", "nll": "NLL", "brier_top1": "BrierTop1", "nll_top1": "NLLTop1",
    "brier_top1_miscalibration": "MCB|of:BrierTop1", "brier_top1_discrimination": "DSC|of:BrierTop1",
    "brier_top1_uncertainty": "UNC|of:BrierTop1", "nll_top1_miscalibration": "MCB|of:NLLTop1",
    "nll_top1_discrimination": "DSC|of:NLLTop1", "nll_top1_uncertainty": "UNC|of:NLLTop1",
}  # fmt: skip


def test_keys_and_signatures():
    """What users cite, and other programs read."""
    found = predictions(slice(0, 30), Settings(bins=5, min_count=3, replicates=7)).scores()
    assert {score.key: score.signature for score in found} == {
        key: f"{begin}|mode:forced|version:0.1.0" for key, begin in SCORES.items()
    }


def test_ends_of_the_interval():
    bootstrap = SentenceBootstrap(2, replicates=400)
    bootstrap.update(range(30), statistics(30))
    values = bootstrap.sums[:, 0] / bootstrap.sums[:, 1]
    for level in (0.95, 0.5):
        ends = [float(end) for end in bootstrap.interval(lambda sums: sums[:, 0] / sums[:, 1], level)]
        assert ends == pytest.approx(np.quantile(values.numpy(), [(1 - level) / 2, (1 + level) / 2]).tolist())


def test_what_has_no_value_is_null():
    """A score of nothing, a resample without a token: JSON has no nan."""
    settings = Settings(bins=5, replicates=3)
    nothing = Predictions(settings, parts={})
    found = Results({}, settings, nothing.scores(), {"eos:yes": nothing.bars()}, {"eos:yes": [math.nan, 0.123456789]})
    written = found.to_json()
    assert written["resampled_ece"] == {"eos:yes": [None, 0.1234568]}
    assert written["ece"] is None
    assert {row[key] for row in written["scores"] for key in ("value", "low", "high")} == {None}
    assert written["histograms"]["eos:yes"]["low"] == [0.0] * 5
    assert written["histograms"]["eos:yes"]["high"] == [1.0] * 5


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
    assert [bars[name] for name in ("count", "confidence", "correct")] == sums.tolist()
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


@pytest.mark.parametrize(
    ("first", "second", "value", "expected_p"),
    [
        ([0, 0, 0, 0], [1, 2, 3, 4], 2.5, 1 / 5),  # moved to mean 0: -1.5, -0.5, 0.5, 1.5
        ([1, 1, 2, 2], [2, 3, 5, 6], 1.0, 3 / 5),
        ([0, 0, 0, 0], [-1, -2, -3, -4], -1.5, 3 / 5),
        ([0, 0, 0, 0], [1, 1, 1, 1], 0.0, 1.0),
        ([0, 0, math.nan, 0], [1, 2, 3, 3], 2.0, 1 / 4),  # a resample in which a system has no score
    ],
)
def test_paired_by_hand(first, second, value: float, expected_p: float):
    found = paired(torch.tensor(first).double(), torch.tensor(second).double(), value)
    assert found.p == pytest.approx(expected_p)
    differences = np.array(second) - np.array(first)
    ends = np.nanquantile(differences, [0.025, 0.975])
    assert (found.value, found.low, found.high) == pytest.approx((value, *ends))


def test_paired_finds_what_the_intervals_alone_do_not():
    """Two models that share their mistakes: much the same sentences are hard for both."""
    rng = np.random.default_rng(3)
    hard = rng.random(400)[:, None] + np.zeros((400, 8))
    confidence = torch.tensor(rng.uniform(0.3, 0.95, size=(400, 8)))
    found = []
    for shift in (0.0, 0.03):
        correct = torch.tensor(hard < 0.5 - shift)
        predictions = Predictions(Settings(bins=5, replicates=500))
        sentence = torch.arange(400)[:, None].expand(400, 8)
        predictions.update(sentence.flatten(), confidence.flatten(), correct.flatten())
        found.append(predictions)
    one, other = (predictions.binned_scores()[0] for predictions in found)
    assert other.low < one.high  # the intervals overlap
    resampled = [torch.tensor(predictions.resampled_ece()) for predictions in found]
    difference = paired(*resampled, other.value - one.value)
    assert 0 < difference.low < difference.value < difference.high
    assert difference.p < 0.05


def test_paired_finds_nothing_where_nothing_is():
    """Models of one kind, whose mistakes are drawn apart: p below 0.05 about as often as it should be."""
    rng = np.random.default_rng(4)
    false_alarms = 0
    for trial in range(40):
        confidence = torch.tensor(rng.uniform(0.2, 1, size=(150, 6)))
        found = []
        for _ in range(2):
            correct = torch.tensor(rng.random((150, 6))) < confidence - 0.15
            predictions = Predictions(Settings(bins=10, replicates=200, seed=trial))
            sentence = torch.arange(150)[:, None].expand(150, 6)
            predictions.update(sentence.flatten(), confidence.flatten(), correct.flatten())
            found.append(predictions)
        resampled = [torch.tensor(predictions.resampled_ece()) for predictions in found]
        value = float(found[1].binned_scores()[0].value - found[0].binned_scores()[0].value)
        false_alarms += paired(*resampled, value).p < 0.05
    assert false_alarms <= 6
