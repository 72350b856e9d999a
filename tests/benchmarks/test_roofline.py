"""The traffic model on shapes small enough to count by hand."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "benchmarks"))

import roofline as r

CHIP = r.Chip("toy", flops=1.0, hbm=1.0, l2_bytes=1e9, l2=1.0, processors=2)
SHAPE = r.Shape("toy", tokens=4, dim=2, vocabulary=8)


def test_minimum():
    flops, moved = r.minimum(SHAPE)
    assert flops == 4 * 2 * 4 * 8 * 2  # four products of 2 N V d
    # bf16: hidden of student and teacher 2 x 8 numbers, both weights 2 x 16; dH 8, dW 16
    assert moved == 2 * (16 + 32 + 8 + 16)


@pytest.mark.parametrize("resident", [True, False])
def test_bytes_of_a_chunk(resident: bool):
    """Chunks of 2 tokens: a block of logits has 2 x 8 numbers, 32 bytes; a weight 32 bytes, hidden states 8."""
    chip = r.Chip("toy", 1.0, 1.0, 64 if resident else 63, 1.0, 1)  # both blocks have 64 bytes
    found = {phase.name: phase for phase in r.phases(SHAPE, 2, chip)}
    for name in ("student", "teacher", "d_hidden"):
        phase = found[name]
        assert phase.flops == 2 * 2 * 8 * 2
        assert phase.hbm == 32 + 8 + (0 if resident else 32)
        assert phase.l2 == (32 if resident else 0)
    # Pass 1 reads two blocks, pass 2 reads two and writes one. The rows in flight, 2 of 2 x 8 numbers, are the blocks
    # themselves: pass 2 finds its rows in L2 only where the blocks are there.
    assert (found["rows"].flops, found["rows"].hbm, found["rows"].l2) == ((0, 0, 160) if resident else (0, 160, 0))
    # dz is read; the product writes 8 x 2 fp32 numbers, which are read and added to as many: four times 64 bytes.
    assert found["d_weight"].hbm == 8 + 4 * 64 + (0 if resident else 32)
    fused = {phase.name: phase for phase in r.phases(SHAPE, 2, chip, fused=True)}
    assert found["d_weight"].hbm - fused["d_weight"].hbm == 2 * 64


def test_rows_in_flight_are_read_again_from_l2():
    chip = r.Chip("toy", 1.0, 1.0, 128, 1.0, 2)  # 4 rows of both blocks, of 8 in each
    rows = next(phase for phase in r.phases(r.Shape("toy", 8, 2, 8), 8, chip) if phase.name == "rows")
    assert (rows.hbm, rows.l2) == (3 * 128, 2 * 128)


def test_prediction_adds_up():
    whole = r.predict(SHAPE, 2, CHIP)
    parts = r.phases(SHAPE, 2, CHIP)
    assert whole.flops == r.minimum(SHAPE)[0]
    assert whole.hbm == 2 * sum(phase.hbm for phase in parts)
    assert whole.device == 2 * sum(phase.seconds(CHIP) for phase in parts)
    assert whole.host == 2 * r.HOST_SECONDS
    # Whole batch in one chunk, however large a chunk may be.
    assert r.predict(SHAPE, 4096, CHIP).hbm == r.predict(SHAPE, 4, CHIP).hbm


def test_eager_moves_each_matrix_many_times():
    a_number = r.eager_bytes(SHAPE) - r.minimum(SHAPE)[1]
    # 7 passes of 2 bytes and 22 of 4 over 4 x 8 numbers
    assert a_number == 4 * 8 * (7 * 2 + 22 * 4)


@pytest.mark.parametrize(
    ("rows", "columns", "processors", "fill"),
    [
        (128, 256, 1, 1.0),  # one tile, one processor
        (128, 257, 2, 257 / 384),  # six tiles of 64 x 128 in three full waves; larger ones are emptier
        (64, 128, 1, 1.0),  # the smallest tile
        (128, 256, 3, 2 / 3),  # two tiles of 128 x 128 keep two of three busy
    ],
)
def test_how_well_tiles_fill_the_chip(rows, columns, processors, fill):
    slow_l2 = r.Chip("toy", 1.0, 1.0, 1e9, 1e-9, processors)  # no splitting: partial sums cost too much
    assert r.product(rows, columns, 64, slow_l2).fill == pytest.approx(fill)


def test_the_best_chunk_is_the_smallest_of_equals():
    for chip in r.CHIPS:
        for shape in r.SHAPES:
            chosen = r.predict(shape, r.best_chunk(shape, chip), chip).seconds
            times = {chunk: r.predict(shape, chunk, chip).seconds for chunk in r.CHUNKS if chunk <= shape.tokens}
            assert chosen <= 1.02 * min(times.values())
            assert all(
                t > 1.02 * min(times.values()) for chunk, t in times.items() if chunk < r.best_chunk(shape, chip)
            )
