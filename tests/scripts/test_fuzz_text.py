"""A bounded part of scripts/fuzz/text.py: text that others wrote is answered with its content or one error message."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "fuzz"))

import checkpoints
import text


@pytest.mark.parametrize(("make", "reader"), text.READERS, ids=lambda function: function.__name__)
def test_no_traceback_and_no_hang(make, reader):
    counts, slowest = checkpoints.fuzz(150, 3, make, reader)
    assert counts.keys() <= {"read", "refused"}
    assert slowest < checkpoints.SLOWEST_S
