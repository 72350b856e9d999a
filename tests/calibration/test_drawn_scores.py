"""Scores of drawn predictions, each against its definition, prediction by prediction, and at the ends of the scale.

HGKD_EXAMPLES=N draws N sets for each of the tests, in place of the few that CI draws."""

import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hgkd_fairseq.calibration import CalibrationHistogram, adaptive_ece
from hgkd_fairseq.calibration.distribution import brier, distribution_tables
from hgkd_fairseq.calibration.histogram import ece
from hgkd_fairseq.calibration.scores import Predictions, Settings

GIVEN = os.environ.get("HGKD_EXAMPLES")
ENDS = st.sampled_from((0.0, 1.0, 0.5, 0.05, 1 - 2.0**-24, 2.0**-149, 0.1, 0.3))
CONFIDENCES = st.one_of(ENDS, st.floats(0, 1, width=32))
LEAST = 2.0**-24  # of a probability, for the NLL
ROWS = st.lists(st.tuples(CONFIDENCES, st.booleans()), min_size=1, max_size=40)


def drawn(few: int):
    found = {"max_examples": int(GIVEN)} if GIVEN else {"max_examples": few, "derandomize": True}
    return settings(deadline=None, database=None, suppress_health_check=list(HealthCheck), **found)


def predictions(rows: list[tuple[float, bool]], bins: int, sentences: int = 1) -> Predictions:
    made = Predictions(Settings(bins=bins, replicates=0))
    confidence, correct = zip(*rows, strict=True)
    sentence = torch.arange(len(rows)) % sentences
    made.update(sentence, torch.tensor(confidence, dtype=torch.float64), torch.tensor(correct))
    return made


def values(made: Predictions) -> dict[str, float]:
    return {score.key: score.value for score in made.scores()}


def members(rows, bins: int) -> list[list[tuple[float, bool]]]:
    """Of each bin (b / bins, (b + 1) / bins]; 0 is in the first."""
    found: list[list[tuple[float, bool]]] = [[] for _ in range(bins)]
    for confidence, correct in rows:
        found[max(math.ceil(confidence * bins), 1) - 1].append((confidence, correct))
    return found


@drawn(25)
@given(rows=ROWS, bins=st.integers(1, 25), data=st.data())
def test_scores_by_definition_in_any_order(rows, bins: int, data):
    found = values(predictions(rows, bins))
    count = len(rows)
    gaps = [sum(c - r for c, r in part) for part in members(rows, bins)]
    sizes = [len(part) for part in members(rows, bins)]
    filled = [(gap / size, size) for gap, size in zip(gaps, sizes, strict=True) if size]
    expected = {
        "ece": sum(map(abs, gaps)) / count,
        "mce": max(abs(gap) for gap, _ in filled),
        "rms": math.sqrt(sum(gap**2 * size for gap, size in filled) / count),
        "overconfidence": sum(gap for gap in gaps if gap > 0) / count,
        "underconfidence": -sum(gap for gap in gaps if gap < 0) / count,
        "accuracy": sum(r for _, r in rows) / count,
        "confidence": sum(c for c, _ in rows) / count,
        "brier_top1": sum((c - r) ** 2 for c, r in rows) / count,
    }
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-12), key
    # A confident prediction that was wrong would have an infinite NLL.
    bits = [-math.log2(min(max(c if r else 1 - c, LEAST), 1 - LEAST)) for c, r in rows]
    assert found["nll_top1"] == pytest.approx(sum(bits) / count, rel=1e-9, abs=1e-12)
    for key, value in found.items():
        if key in (
            "ece",
            "mce",
            "rms",
            "overconfidence",
            "underconfidence",
            "adaptive_ece",
            "smooth_ece",
            "brier_top1",
        ):
            assert -1e-12 <= value <= 1 + 1e-12, key
    again = data.draw(st.permutations(rows))
    other = values(predictions(again, bins, sentences=data.draw(st.integers(1, 5))))
    for key, value in found.items():
        assert other[key] == pytest.approx(value, rel=1e-9, abs=1e-9, nan_ok=True), key


@drawn(60)
@given(rows=ROWS, bins=st.integers(1, 25))
def test_adaptive_ece_by_definition(rows, bins: int):
    """Equal confidences are never parted; a bin's edges are the quantiles by linear interpolation."""
    confidence, correct = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows, strict=True))
    ordered = sorted(c for c, _ in rows)
    found: dict[int, list[float]] = {}
    for c, r in rows:
        last = max(place for place, other in enumerate(ordered) if other == c)  # rank of the last of its equals
        place = min(last * bins // max(len(rows) - 1, 1), bins - 1)
        found.setdefault(place, []).append(c - r)
    assert adaptive_ece(confidence, correct, bins) == pytest.approx(
        sum(abs(sum(gaps)) for gaps in found.values()) / len(rows), abs=1e-12
    )


@drawn(40)
@given(
    seed=st.integers(0, 2**32 - 1), count=st.integers(1, 6), vocabulary=st.integers(5, 60), bins=st.integers(1, 25),
    scale=st.sampled_from((0.0, 1.0, 1e4)),
)  # fmt: skip
def test_whole_distributions_by_definition(seed: int, count: int, vocabulary: int, bins: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    p = (scale * torch.randn(count, vocabulary, generator=generator, dtype=torch.float64)).softmax(1)
    gold = torch.randint(vocabulary, (count,), generator=generator)
    onehot = torch.nn.functional.one_hot(gold, vocabulary).double()
    torch.testing.assert_close(brier(p, gold), (p - onehot).square().sum(1), atol=1e-12, rtol=0)
    tables = distribution_tables(p, gold, bins, torch.zeros_like(gold), 1)[0]
    weighted, full = [0.0] * bins, [0.0] * bins
    for row in range(count):
        for token in range(vocabulary):
            c, r = float(p[row, token]), float(onehot[row, token])
            # Which is in a bin above 1 / bins; all others share the first.
            place = max(math.ceil(c * bins), 1) - 1 if c > 1 / bins else 0
            weighted[place] += c * (r - c)
            full[place] += r - c
    for table, gaps in zip(tables, (weighted, full), strict=True):
        assert float(ece(table)) == pytest.approx(sum(map(abs, gaps)) / count, abs=1e-9)


@pytest.mark.parametrize(("confidence", "correct", "expected"), [(1.0, 1, 0), (1.0, 0, 1), (0.0, 0, 0), (0.0, 1, 1)])
def test_one_prediction_that_is_certain(confidence: float, correct: int, expected: int):
    for bins in (1, 20):
        found = values(predictions([(confidence, bool(correct))], bins))
        keys = ("ece", "mce", "rms", "adaptive_ece", "brier_top1")
        assert {found[key] for key in keys} == {float(expected)}
        assert found["nll_top1"] == pytest.approx(24 if expected else -math.log2(1 - LEAST))
        table = CalibrationHistogram(bins)
        table.update([confidence], [correct])
        assert table.ece() == expected
