"""A bounded part of scripts/fuzz/folders.py: translations and stores of others are answered with their content or one
error message."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "fuzz"))

import checkpoints
import folders


@pytest.mark.parametrize("name", folders.READERS)
def test_no_traceback_and_no_hang(name):
    counts, slowest = checkpoints.fuzz(150, 3, *folders.READERS[name])
    assert counts.keys() == {"read", "refused"}
    assert slowest < checkpoints.SLOWEST_S
