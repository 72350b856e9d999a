"""A bounded part of scripts/fuzz/checkpoints.py: they are read or answered with one message."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "fuzz"))

import checkpoints


@pytest.mark.parametrize(
    ("make", "read", "inputs"),
    [
        (checkpoints.cases, checkpoints.read, 400),
        (checkpoints.transformers, checkpoints.build, 60),
        (checkpoints.literals, checkpoints.read_literal, 2000),
    ],
    ids=["files", "options", "literals"],
)
def test_every_checkpoint_is_answered(make, read, inputs: int):
    counts, slowest = checkpoints.fuzz(inputs, 3, make, read)
    assert counts.keys() == {"read", "refused"}
    assert counts["read"] > 0
    assert sum(counts.values()) == inputs
    assert slowest < checkpoints.SLOWEST_S
