"""Full-ECE, debiased ECE, CORP's split and rank correlation, each against another computation of it."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.isotonic import IsotonicRegression
from sklearn.metrics import brier_score_loss, log_loss

from hgkd_fairseq.calibration import CalibrationHistogram, FineHistogram, corp
from hgkd_fairseq.calibration.correlation import spearman, spearman_interval
from hgkd_fairseq.calibration.distribution import distribution_tables
from hgkd_fairseq.calibration.histogram import debiased_ece, debiased_rms, debiased_squares, ece, rms
from hgkd_fairseq.calibration.scores import Predictions, Settings


def sample(count: int, seed: int, tempered: float = 1.7) -> tuple[torch.Tensor, torch.Tensor]:
    """Confidences, some of them equal, and 0 or 1 of an overconfident model."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2.0, 0.7, size=count).round(3).clip(1e-3, 1 - 1e-3)
    return torch.tensor(confidence), torch.tensor(rng.random(count) < confidence**tempered).double()


def binned(confidence: torch.Tensor, correct: torch.Tensor, bins: int = 20) -> torch.Tensor:
    histogram = CalibrationHistogram(bins)
    histogram.update(confidence, correct)
    return histogram.sums


@pytest.mark.parametrize("bins", [1, 4, 20])
def test_full_ece_is_its_definition(bins: int):
    """Bin by bin from all N V probabilities, with |B|, acc and conf as Liu et al. write them."""
    torch.manual_seed(bins)
    probability, gold = (3 * torch.randn(150, 60)).softmax(1), torch.randint(60, (150,))
    group = torch.arange(150) % 2
    tables = distribution_tables(probability, gold, bins, group, groups=2)[:, 1]
    parts = [
        distribution_tables(probability[i : i + 7], gold[i : i + 7], bins, group[i : i + 7], 2)
        for i in range(0, 150, 7)
    ]
    torch.testing.assert_close(sum(parts)[:, 1], tables, rtol=0, atol=1e-9)  # streamed
    for part, table in enumerate(tables):
        rows = probability[group == part].double().numpy()
        is_gold = np.eye(60)[gold[group == part].numpy()]
        place = np.maximum(np.ceil(rows * bins), 1) - 1
        expected = 0.0
        for one in range(bins):
            inside = place == one
            if inside.any():
                expected += inside.sum() / 75 * abs(is_gold[inside].mean() - rows[inside].mean())
        assert float(ece(table)) == pytest.approx(expected, abs=1e-6)
        assert expected > 0.01 or bins == 1  # in one bin all probabilities sum to N, as the gold ones do


def test_debiased_scores_by_definition():
    """The squares as the paper has them, from the predictions of each bin; the bias of the ECE by drawing."""
    confidence, correct = sample(300, seed=2)
    table = binned(confidence, correct)
    rng = np.random.default_rng(3)
    squares = drawn = 0.0
    for one in range(20):
        inside = (np.ceil(confidence.numpy() * 20) - 1) == one
        p, y = confidence.numpy()[inside], correct.numpy()[inside]
        if len(y) > 1:
            squares += len(y) / 300 * ((p.mean() - y.mean()) ** 2 - y.var(ddof=1) / len(y))
        if len(y):
            noise = rng.normal(y.mean(), np.sqrt(y.mean() * (1 - y.mean()) / len(y)), size=200_000)
            drawn += len(y) / 300 * np.abs(p.mean() - noise).mean()
    assert float(debiased_squares(table)) == pytest.approx(squares, abs=1e-12)
    assert float(debiased_rms(table)) == pytest.approx(math.sqrt(squares))
    assert float(debiased_ece(table)) == pytest.approx(2 * float(ece(table)) - drawn, abs=2e-4)
    assert float(debiased_ece(table)) < float(ece(table)) - 0.01
    assert math.isnan(debiased_ece(torch.zeros(3, 20).double()))
    assert math.isnan(debiased_rms(torch.zeros(3, 20).double()))


def test_debiased_scores_are_less_biased():
    """Over 400 small samples of a calibrated model the squares have mean 0, within three standard errors, where the
    plain ones have not; the debiased ECE is a third smaller than the plain one, and not 0."""
    calibrated = torch.stack([binned(*sample(200, seed, tempered=1.0)) for seed in range(400)])
    found = debiased_squares(calibrated)
    assert abs(found.mean()) < 3 * found.std() / 20
    assert rms(calibrated).square().mean() > 10 * found.std() / 20
    assert 0.6 < debiased_ece(calibrated).mean() / ece(calibrated).mean() < 0.7


def test_no_noise_no_bias():
    """Where all are right, or none, nothing is taken off."""
    table = binned(torch.tensor([0.91, 0.92, 0.31, 0.32]).double(), torch.tensor([1.0, 1, 0, 0]).double())
    assert float(debiased_ece(table)) == pytest.approx(float(ece(table)), abs=1e-15)
    assert float(debiased_rms(table)) == pytest.approx(float(rms(table)), abs=1e-15)


@pytest.mark.parametrize("seed", range(3))
def test_corp_is_isotonic_regression(seed: int):
    """Of the predictions themselves, by scikit-learn, with its scores; streamed, within 1e-3."""
    confidence, correct = sample(2000, seed)
    f, y = confidence.numpy(), correct.numpy()
    recalibrated = IsotonicRegression(y_min=0, y_max=1).fit_transform(f, y)
    means = np.full_like(f, y.mean())
    scores = {
        "brier": lambda p: brier_score_loss(y, p, scale_by_half=True),
        "nll": lambda p: log_loss(y, np.stack([1 - p, p], axis=1)) / math.log(2),
    }
    found = corp.exact(confidence, correct)
    predictions = Predictions(Settings(replicates=0))
    predictions.update(torch.arange(2000), confidence, correct)
    streamed = {score.key: score for score in predictions.scores()}
    for name, score in scores.items():
        forecast, best, same = (score(p) for p in (f, recalibrated, means))
        assert found[name] == pytest.approx((forecast - best, same - best, same), abs=1e-9)
        assert found[name].miscalibration > 0.001
        parts = [streamed[f"{name}_top1_{part}"] for part in found[name]._fields]
        assert [part.value for part in parts] == pytest.approx(list(found[name]), abs=1e-3)
        miscalibration, discrimination, uncertainty = (part.value for part in parts)
        assert miscalibration - discrimination + uncertainty == pytest.approx(streamed[f"{name}_top1"].value, abs=1e-12)
    assert streamed["nll_top1_miscalibration"].signature.startswith("MCB|of:NLLTop1|version:")
    assert streamed["nll_top1_miscalibration"].unit == "bits"


def test_corp_of_other_scales():
    """A monotone change of the confidences changes the miscalibration alone; one confidence for all discriminates
    nothing; certain and wrong is finite; without predictions there is no split."""
    confidence, correct = sample(500, seed=7)
    for one, other in zip(
        corp.exact(confidence, correct).values(), corp.exact(confidence**3, correct).values(), strict=True
    ):
        assert other[1:] == pytest.approx(one[1:], abs=1e-12)
        assert other.miscalibration != pytest.approx(one.miscalibration, abs=1e-3)
    constant = corp.exact(torch.full((4,), 0.75).double(), torch.tensor([1.0, 1, 1, 0]))
    assert constant["brier"] == pytest.approx((0, 0, 0.1875))
    assert constant["nll"] == pytest.approx((0, 0, 2 - 0.75 * math.log2(3)))
    assert corp.exact(torch.ones(1).double(), torch.zeros(1))["nll"].miscalibration == pytest.approx(24, abs=1e-4)
    assert all(math.isnan(value) for value in corp.split(FineHistogram().sums, math.nan, math.nan)["nll"])


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties: bool):
    rng = np.random.default_rng(5)
    first = rng.normal(size=60)
    second = first + rng.normal(size=60)
    if ties:
        first, second = first.round(), second.round()
    x, y = torch.tensor(first), torch.tensor(second)
    assert spearman(x, y).tolist() == pytest.approx([spearmanr(first, second).statistic])
    weight = rng.poisson(1.0, size=(5, 60))
    expected = [spearmanr(np.repeat(first, row), np.repeat(second, row)).statistic for row in weight]
    assert spearman(x, y, torch.tensor(weight)).tolist() == pytest.approx(expected)


def test_interval_of_spearman_is_that_of_drawing_with_replacement():
    rng = np.random.default_rng(6)
    first = rng.normal(size=200)
    second = first + rng.normal(size=200)
    found = spearman_interval(torch.tensor(first), torch.tensor(second), list(range(200)), 1000, seed=1)
    drawn = rng.integers(0, 200, size=(1000, 200))
    expected = np.quantile([spearmanr(first[row], second[row]).statistic for row in drawn], [0.025, 0.975])
    assert found == pytest.approx(expected, abs=0.02)
    assert found != spearman_interval(torch.tensor(first), torch.tensor(second), list(range(200)), 1000, seed=2)


def test_no_rank_no_correlation():
    x = torch.arange(6).double()
    assert math.isnan(spearman(x, torch.full((6,), 0.1)))
    assert math.isnan(spearman(torch.ones(1), torch.ones(1)))
    assert all(map(math.isnan, spearman_interval(torch.ones(1), torch.ones(1), [0], 20, seed=1)))
