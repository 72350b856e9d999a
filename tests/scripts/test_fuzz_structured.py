"""A bounded part of scripts/fuzz/structured.py: JSON, grids, lists and tables of others are answered with their content
or one error message."""

import contextlib
import io
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "fuzz"))

import checkpoints
import structured


@pytest.mark.parametrize("name", structured.READERS)
def test_no_traceback_and_no_hang(name):
    with contextlib.redirect_stdout(io.StringIO()):  # of the readers that print
        counts, slowest = checkpoints.fuzz(150, 3, *structured.READERS[name])
    assert counts.keys() == {"read", "refused"}
    assert slowest < checkpoints.SLOWEST_S
