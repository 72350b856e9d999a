"""The streaming calibration table, on examples that can be added up by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hgkd_fairseq.calibration import CalibrationHistogram

# Five predictions in 4 bins, (0, 1/4] (1/4, 1/2] (1/2, 3/4] (3/4, 1]:
#   bin 0: 0.25 wrong                          count 1  confidence 0.25   correct 0   gap  0.25
#   bin 1: none
#   bin 2: 0.625 right, 0.75 wrong             count 2  confidence 1.375  correct 1   gap  0.1875
#   bin 3: 0.875 right, 1.0 right              count 2  confidence 1.875  correct 2   gap -0.0625
CONFIDENCE = [0.25, 0.625, 0.75, 0.875, 1.0]
CORRECT = [False, True, False, True, True]
SUMS = [[1, 0, 2, 2], [0.25, 0, 1.375, 1.875], [0, 0, 1, 2]]

predictions = st.lists(st.tuples(st.floats(0, 1, width=32), st.booleans()), min_size=1, max_size=40)


def histogram(confidence, correct, bins: int = 4) -> CalibrationHistogram:
    result = CalibrationHistogram(bins=bins)
    result.update(torch.tensor(confidence), torch.tensor(correct))
    return result


def test_hand_example():
    table = histogram(CONFIDENCE, CORRECT)
    assert table.sums.tolist() == SUMS
    assert table.gaps().tolist() == [0.25, 0.0, 0.1875, -0.0625]
    assert table.ece() == pytest.approx((0.25 + 0.375 + 0.125) / 5)
    assert table.mce() == 0.25
    assert table.mce(min_count=2) == 0.1875
    assert math.isnan(table.mce(min_count=3))
    assert repr(table) == "CalibrationHistogram(bins=4, count=5)"


@pytest.mark.parametrize(
    ("confidence", "expected_bin"),
    [(0.0, 0), (1e-9, 0), (0.25, 0), (math.nextafter(0.25, 1), 1), (0.5, 1), (0.75, 2), (0.7500001, 3), (1.0, 3)],
)
def test_bins_are_closed_above(confidence: float, expected_bin: int):
    table = CalibrationHistogram(bins=4)
    table.update(torch.tensor([confidence], dtype=torch.float64), torch.tensor([True]))
    assert table.sums[0].tolist() == [float(b == expected_bin) for b in range(4)]


def test_twenty_bins_unless_told():
    assert CalibrationHistogram().bins == 20
    assert CalibrationHistogram().sums.dtype == torch.float64


def test_empty_is_not_a_number():
    assert math.isnan(CalibrationHistogram().ece())
    assert math.isnan(CalibrationHistogram().mce())
    table = histogram(CONFIDENCE, CORRECT)
    table.update(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
    assert table.sums.tolist() == SUMS


def test_takes_arrays_half_precision_and_numbers():
    table = CalibrationHistogram(bins=4)
    table.update(np.array(CONFIDENCE, dtype=np.float32), np.array(CORRECT, dtype=np.int64))
    assert table.sums.tolist() == SUMS
    table = CalibrationHistogram(bins=4)
    table.update(torch.tensor(CONFIDENCE, dtype=torch.bfloat16), torch.tensor(CORRECT).float())
    assert table.sums.tolist() == SUMS


def test_starts_from_sums():
    assert CalibrationHistogram(sums=np.array(SUMS)).ece() == histogram(CONFIDENCE, CORRECT).ece()


def test_perfect_calibration_scores_zero():
    # Of 4 predictions at 0.75 three are right, of 2 at 0.5 one.
    table = histogram([0.75] * 4 + [0.5] * 2, [True, True, True, False, True, False])
    assert table.ece() == 0
    assert table.mce() == 0


@pytest.mark.parametrize(
    ("correct", "score"), [(True, 0.0), (False, 1.0)], ids=["certain and right", "certain and wrong"]
)
def test_certain(correct: bool, score: float):
    table = histogram([1.0] * 3, [correct] * 3, bins=20)
    assert (table.ece(), table.mce()) == (score, score)


def test_counts_past_what_fp32_can_count():
    # 2**24 + 1 is the first integer that fp32 does not have.
    table = CalibrationHistogram(bins=1, sums=torch.tensor([[2.0**24], [2.0**24], [2.0**24]], dtype=torch.float64))
    table.update(torch.ones(1), torch.ones(1, dtype=torch.bool))
    assert table.sums.tolist() == [[16777217.0]] * 3


@settings(deadline=None, max_examples=50)
@given(first=predictions, second=predictions, bins=st.integers(1, 25))
def test_merge_is_one_update(first, second, bins: int):
    merged, other = histogram(*zip(*first, strict=True), bins=bins), histogram(*zip(*second, strict=True), bins=bins)
    merged.merge(other)
    once = histogram(*zip(*first, *second, strict=True), bins=bins)
    torch.testing.assert_close(merged.sums, once.sums, rtol=1e-12, atol=0)


def test_merge_leaves_the_other_alone():
    one, other = histogram(CONFIDENCE, CORRECT), histogram(CONFIDENCE, CORRECT)
    one.merge(other)
    one.update(torch.tensor([0.5]), torch.tensor([True]))
    assert other.sums.tolist() == SUMS
    assert one.sums[0].tolist() == [2, 1, 4, 4]


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_order_does_not_matter(data):
    rows = data.draw(predictions)
    shuffled = data.draw(st.permutations(rows))
    one, other = (histogram(*zip(*order, strict=True)) for order in (rows, shuffled))
    torch.testing.assert_close(one.sums, other.sums, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=100)
@given(rows=predictions, bins=st.integers(1, 25))
def test_maximum_error_is_never_below_the_expected_one(rows, bins: int):
    table = histogram(*zip(*rows, strict=True), bins=bins)
    assert table.mce() >= table.ece() - 1e-12
    assert 0 <= table.ece() <= 1
    assert table.sums[0].sum() == len(rows)
    # ECE by its definition, prediction by prediction.
    members = [[] for _ in range(bins)]
    for confidence, correct in rows:
        members[max(math.ceil(confidence * bins), 1) - 1].append(confidence - correct)
    assert table.ece() == pytest.approx(sum(abs(sum(gaps)) for gaps in members) / len(rows), abs=1e-9)


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([0.5, 0.5], [True], "must be of one length"),
        ([[0.5]], [[True]], "1-d"),
        ([1.5], [True], "outside"),
        ([-0.1], [True], "probabilities are expected, not logarithms"),
        ([math.nan], [True], "NaN"),
    ],
)
def test_bad_predictions(confidence, correct, message: str):
    table = CalibrationHistogram(bins=4)
    with pytest.raises(ValueError, match=message):
        table.update(torch.tensor(confidence), torch.tensor(correct))
    assert table.sums.sum() == 0


def test_bad_tables():
    with pytest.raises(ValueError, match="bins is 0; it must be at least 1"):
        CalibrationHistogram(bins=0)
    with pytest.raises(ValueError, match="cannot merge tables of 20 and 10 bins"):
        CalibrationHistogram(20).merge(CalibrationHistogram(10))
