"""Scores against hand-made examples, their definitions written out, and other libraries on the same inputs."""

import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import binary_calibration_error

from hgkd_fairseq.calibration import CalibrationHistogram, FineHistogram, adaptive_ece
from hgkd_fairseq.calibration.distribution import brier, distribution_tables
from hgkd_fairseq.calibration.fine import CELLS, MESH, OCTAVES, cell, smoothed_error
from hgkd_fairseq.calibration.histogram import ece, tabulate

predictions = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=60)


def sample(count: int, seed: int, tempered: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Confidences crowded towards 1, and correctness of an overconfident model where `tempered` is above 1."""
    rng = np.random.default_rng(seed)
    confidence = rng.beta(2.0, 0.7, size=count)
    return confidence, rng.random(count) < confidence**tempered


def filled(histogram, confidence, correct):
    histogram.update(confidence, correct)
    return histogram


# The five predictions of test_histogram.py, 4 bins: surpluses 0.25, none, 0.375, -0.125 of 1, 0, 2 and 2 predictions.
def test_hand_example():
    table = filled(CalibrationHistogram(4), np.array([0.25, 0.625, 0.75, 0.875, 1.0]), np.array([0, 1, 0, 1, 1]))
    assert table.rms() == pytest.approx(math.sqrt((1 * 0.25**2 + 2 * 0.1875**2 + 2 * 0.0625**2) / 5))
    assert table.overconfidence() == pytest.approx((0.25 + 0.375) / 5)
    assert table.underconfidence() == pytest.approx(0.125 / 5)
    assert table.accuracy() == 0.6


@settings(deadline=None, max_examples=100)
@given(rows=predictions, bins=st.integers(1, 25))
def test_order_of_the_scores(rows, bins: int):
    """ECE <= RMS <= MCE, and the ECE is its two parts."""
    table = filled(CalibrationHistogram(bins), *map(np.array, zip(*rows, strict=True)))
    assert table.ece() <= table.rms() + 1e-9
    assert table.rms() <= table.mce() + 1e-9
    assert table.overconfidence() + table.underconfidence() == pytest.approx(table.ece(), abs=1e-12)


def test_tables_of_groups():
    confidence, correct, group = torch.tensor([0.2, 0.9, 0.9]), torch.tensor([1, 0, 1]), torch.tensor([0, 2, 2])
    tables = tabulate(confidence, correct, bins=2, group=group, groups=3)
    assert tables.shape == (3, 3, 2)
    assert tables[:, 0].tolist() == [[1, 0], [0, 0], [0, 2]]
    assert ece(tables)[[0, 2]].tolist() == pytest.approx([0.8, 0.4])
    assert math.isnan(ece(tables)[1])


@pytest.mark.parametrize("bins", [10, 15, 20])
@pytest.mark.parametrize("count", [997, 20011])
def test_torchmetrics_agrees(bins: int, count: int):
    confidence, correct = sample(count, seed=bins, tempered=1.7)
    table = filled(CalibrationHistogram(bins), confidence, correct)
    for norm, score in (("l1", table.ece()), ("l2", table.rms()), ("max", table.mce())):
        theirs = binary_calibration_error(torch.tensor(confidence), torch.tensor(correct).long(), bins, norm)
        assert score == pytest.approx(float(theirs), abs=1e-9), norm


@pytest.mark.parametrize("bins", [10, 15, 20])
@pytest.mark.parametrize("count", [997, 20011])
def test_netcal_agrees(bins: int, count: int):
    """Only where netcal is installed, which brings Pyro and GPyTorch; numpy_adaptive_ece() is its definition."""
    metrics = pytest.importorskip("netcal.metrics")
    confidence, correct = sample(count, seed=bins, tempered=1.7)
    table = filled(CalibrationHistogram(bins), confidence, correct)
    assert table.ece() == pytest.approx(metrics.ECE(bins).measure(confidence, correct), abs=1e-9)
    assert table.mce() == pytest.approx(metrics.MCE(bins).measure(confidence, correct), abs=1e-9)
    equal_mass = metrics.ECE(bins, equal_intervals=False).measure(confidence, correct)
    assert adaptive_ece(confidence, correct, bins) == pytest.approx(equal_mass, abs=1e-9)


def numpy_adaptive_ece(confidence, correct, bins: int) -> float:
    """Bins [edge, next edge) between the quantiles, with numpy's quantiles."""
    edges = np.quantile(confidence, np.arange(1, bins) / bins)
    index = np.searchsorted(edges, confidence, side="right")
    return sum(abs((confidence - correct)[index == b].sum()) for b in range(bins)) / len(confidence)


# Counts of which no quantile falls on a prediction: there numpy's rounding decides.
@pytest.mark.parametrize(("count", "bins"), [(98, 10), (1000, 20), (20012, 15), (7, 20)])
def test_adaptive_ece_is_its_definition(count: int, bins: int):
    confidence, correct = sample(count, seed=count, tempered=1.7)
    assert adaptive_ece(confidence, correct, bins) == pytest.approx(
        numpy_adaptive_ece(confidence, correct, bins), abs=1e-12
    )


def test_adaptive_ece_by_hand():
    # Six predictions in three bins of two: {0.1, 0.2} {0.3, 0.4} {0.9, 0.9}.
    confidence, correct = np.array([0.9, 0.1, 0.4, 0.3, 0.2, 0.9]), np.array([1, 0, 1, 0, 0, 0])
    assert adaptive_ece(confidence, correct, 3) == pytest.approx((0.3 + 0.3 + 0.8) / 6)
    # Equals stay together: all four in one bin, whatever their order.
    assert adaptive_ece(np.full(4, 0.5), np.array([1, 1, 0, 0]), 2) == 0
    assert adaptive_ece(np.full(4, 0.5), np.array([1, 0, 1, 0]), 2) == 0


@pytest.mark.parametrize("seed", range(4))
def test_streamed_adaptive_ece(seed: int):
    """Within the stated bound of the exact one: twice the share of predictions in cells that an edge falls into."""
    confidence, correct = sample(30011, seed, tempered=1.7)
    fine = FineHistogram()
    for part in np.array_split(np.arange(30011), 7):
        fine.update(confidence[part], correct[part])
    edges = torch.tensor(np.quantile(confidence, np.arange(1, 20) / 20))
    bound = 2 * float(fine.sums[0][cell(edges).unique()].sum()) / 30011
    exact = adaptive_ece(confidence, correct, 20)
    assert abs(fine.adaptive_ece(20) - exact) <= bound
    assert abs(fine.adaptive_ece(20) - exact) < 5e-4  # 7e-5 seen
    assert bound < 0.05


def test_cells_rise_with_confidence_and_never_lie():
    confidence = torch.cat(
        [torch.linspace(0, 1, 100001, dtype=torch.float64), 1 - 2.0 ** -torch.arange(1.0, 60).double()]
    )
    confidence = confidence.sort().values
    cells = cell(confidence)
    assert bool((cells.diff() >= 0).all())
    assert (cells[0], cells[-1]) == (0, OCTAVES * CELLS - 1)
    for part in cells.unique_consecutive()[:-1:997]:
        inside = confidence[cells == part]
        assert inside.max() - inside.min() <= 1 / (2 * CELLS)


def integral(confidence, correct, bandwidth: float, points: int = 20001) -> float:
    """smECE at one bandwidth as the paper has it: an integral over t of a sum over the predictions, with the Gaussian
    and its images behind 0 and 1."""
    t = (np.arange(points) + 0.5) / points
    smooth = np.zeros(points)
    for c, y in zip(confidence, correct, strict=True):
        for image in [c + 2 * turn for turn in range(-2, 3)] + [-c + 2 * turn for turn in range(-2, 3)]:
            smooth += (c - y) * np.exp(-((t - image) ** 2) / (2 * bandwidth**2)) / (bandwidth * math.sqrt(2 * math.pi))
    return float(np.abs(smooth).mean() / len(confidence))


@pytest.mark.parametrize("bandwidth", [0.01, 0.05, 0.3, 1.0])
def test_smooth_ece_is_the_published_integral(bandwidth: float):
    confidence, correct = sample(60, seed=3, tempered=1.7)
    fine = filled(FineHistogram(), np.append(confidence, [0.0, 1.0]), np.append(correct, [1, 0]))
    expected = integral(np.append(confidence, [0.0, 1.0]), np.append(correct, [1, 0]), bandwidth)
    assert smoothed_error(fine.spectrum(), bandwidth) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(
    ("confidence", "points"), [(100.5, {100: 1.0}), (100.75, {100: 0.75, 101: 0.25}), (0, {0: 1.0})]
)
def test_surplus_lies_where_its_predictions_do(confidence: float, points: dict[int, float]):
    fine = filled(FineHistogram(), np.array([confidence / MESH]), np.array([0.0]))
    mesh = torch.fft.irfft(fine.spectrum())[:MESH]
    expected = torch.zeros(MESH).double()
    for point, share in points.items():
        expected[point] = share * confidence / MESH
    torch.testing.assert_close(mesh, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tempered", [1.0, 1.3, 3.0])
def test_smooth_ece_is_its_own_bandwidth(tempered: float):
    confidence, correct = sample(300, seed=5, tempered=tempered)
    score = filled(FineHistogram(), confidence, correct).smooth_ece()
    assert integral(confidence, correct, score, points=4001) == pytest.approx(score, abs=1e-4)


def test_smoothing_keeps_a_surplus_of_one_sign():
    """Where every prediction is overconfident no kernel changes the sum: smooth ECE is confidence minus accuracy."""
    confidence, _ = sample(3000, seed=5)
    fine = filled(FineHistogram(), confidence, confidence**3)
    assert fine.smooth_ece() == pytest.approx((confidence - confidence**3).mean(), abs=1e-8)


@pytest.mark.parametrize("tempered", [1.0, 1.3, 3.0])
def test_relplot_agrees(tempered: float):
    """Only where it is installed. To 0.001: relplot searches the bandwidth in steps of 1/1024, and its truncated kernel
    on a mesh of 200 points misses what the test above asks for by 0.0005."""
    relplot = pytest.importorskip("relplot")
    confidence, correct = sample(3000, seed=5, tempered=tempered)
    ours = filled(FineHistogram(), confidence, correct).smooth_ece()
    assert ours == pytest.approx(relplot.smECE(confidence, correct.astype(float)), abs=1e-3)


def test_extremes_of_smooth_ece():
    assert math.isnan(FineHistogram().smooth_ece())
    assert math.isnan(FineHistogram().adaptive_ece())
    assert filled(FineHistogram(), np.full(9, 0.5), np.array([1, 0, 0.5] * 3)).smooth_ece() < 1e-8
    assert filled(FineHistogram(), np.ones(9), np.zeros(9)).smooth_ece() == 1.0  # no kernel hides that


@pytest.mark.parametrize("count", [2000, 1000000])
def test_perfect_calibration_scores_within_sampling_error(count: int):
    confidence, correct = sample(count, seed=11)
    table, fine = filled(CalibrationHistogram(20), confidence, correct), filled(FineHistogram(), confidence, correct)
    # Each bin's surplus is a sum of independent errors; the mean of its size is sqrt(2 / pi) of its deviation.
    index = np.clip(np.ceil(confidence * 20) - 1, 0, 19).astype(int)
    variance = np.bincount(index, weights=confidence * (1 - confidence), minlength=20)
    expected = math.sqrt(2 / math.pi) * np.sqrt(variance).sum() / count
    assert 0.4 * expected < table.ece() < 1.8 * expected
    assert 0.4 * expected < fine.adaptive_ece(20) < 1.8 * expected
    assert fine.smooth_ece() < 2.5 * expected
    assert filled(CalibrationHistogram(20), confidence, confidence**2).ece() > 20 * expected or count < 10000


@settings(deadline=None, max_examples=30)
@given(rows=predictions, data=st.data())
def test_fine_table_in_any_order_and_split(rows, data):
    cut = data.draw(st.integers(0, len(rows)))
    shuffled = data.draw(st.permutations(rows))
    confidence, correct = (np.array(column, dtype=float) for column in zip(*shuffled, strict=True))
    once = filled(FineHistogram(), *(np.array(column, dtype=float) for column in zip(*rows, strict=True)))
    merged = filled(FineHistogram(), confidence[:cut], correct[:cut])
    merged.merge(filled(FineHistogram(), confidence[cut:], correct[cut:]))
    torch.testing.assert_close(merged.sums, once.sums, rtol=1e-12, atol=0)
    assert merged.smooth_ece() == pytest.approx(once.smooth_ece(), abs=1e-9)


def resident_bytes() -> int:
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_ten_million_tokens_in_constant_memory():
    """Their confidences alone are 80 MB."""
    table, fine = CalibrationHistogram(20), FineHistogram()
    confidence, correct = sample(100000, seed=2, tempered=1.5)
    filled(table, confidence, correct)
    filled(fine, confidence, correct)
    before = resident_bytes()
    for _ in range(99):
        table.update(confidence, correct)
        fine.update(confidence, correct)
    assert resident_bytes() - before < 20e6
    assert table.sums[0].sum() == fine.sums[0].sum() == 10**7
    once = filled(CalibrationHistogram(20), confidence, correct)
    assert table.ece() == pytest.approx(once.ece(), rel=1e-9)


def distributions(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return (3 * torch.randn(count, classes)).softmax(1), torch.randint(classes, (count,))


def test_brier_is_sklearns():
    probability, gold = distributions(400, 7, seed=1)
    theirs = brier_score_loss(gold.numpy(), probability.double().numpy(), scale_by_half=False, labels=list(range(7)))
    assert brier(probability, gold).mean().item() == pytest.approx(theirs, abs=1e-6)
    assert brier(torch.tensor([[1.0, 0.0]]), torch.tensor([1])).item() == 2


@pytest.mark.parametrize("bins", [1, 4, 20])
def test_weighted_ece_is_its_definition(bins: int):
    """Class by class, as Kumar and Sarawagi write it."""
    probability, gold = distributions(150, 60, seed=bins)
    group = torch.arange(150) % 2
    tables = distribution_tables(probability, gold, bins, group, groups=2)[:, 0]
    for part, table in enumerate(tables):
        surplus = [0.0] * bins
        for row, answer in zip(probability[group == part].double().tolist(), gold[group == part].tolist(), strict=True):
            for index, p in enumerate(row):
                surplus[max(math.ceil(p * bins), 1) - 1] += p * ((index == answer) - p)
        assert float(ece(table)) == pytest.approx(sum(map(abs, surplus)) / 75, abs=1e-6)
        assert float(table[0].sum()) == pytest.approx(75, abs=1e-4)


@pytest.mark.parametrize("confidence", [[math.nan], [1.5]])
def test_bad_predictions(confidence):
    for update in (FineHistogram().update, lambda *both: adaptive_ece(*both)):
        with pytest.raises(ValueError, match="NaN or outside"):
            update(np.array(confidence), np.array([True]))
