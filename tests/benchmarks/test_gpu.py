"""scripts/benchmarks/gpu.sh: every part at toy size on the CPU, and what it refuses."""

import os
import subprocess
import sys
from pathlib import Path

import command_line as cl
import pytest

sys.path.insert(0, str(cl.ROOT / "tests" / "recipes"))
import corpora

SCRIPT = cl.ROOT / "scripts" / "benchmarks" / "gpu.sh"
RECIPE = cl.ROOT / "scripts" / "recipes" / "iwslt14-de-en.sh"
SMALL = (*cl.SIZE[2:], "--max-tokens", 512, "--lr", 0.01, "--warmup-updates", 4)


def run(script: Path, *arguments) -> subprocess.CompletedProcess:
    command = ["bash", str(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


def test_all_parts_on_the_cpu(tmp_path: Path):
    """Exit status 0 and a report with every part done and a number from each."""
    originals, recipe, out = tmp_path / "originals", tmp_path / "recipe", tmp_path / "out"
    originals.mkdir()
    corpora.iwslt14(originals)
    made = run(RECIPE, "--dir", recipe, "--from", originals, "--gpus", 0, "--until", "data")
    assert made.returncode == 0, made.stderr
    trial = ("--max-update", 5, "--until", "training", "--", *SMALL)  # test_recipes.py goes on to the scores
    done = run(
        SCRIPT, "--device", "cpu", "--minutes", 5, "--out", out, "--recipe", recipe, "--methods", "hkd-t",
        "--commit", "abc1234", "--", *trial,
    )  # fmt: skip
    report = (out / "gpu.md").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + report
    for part in ("Tests on the device", "The loss head", "A training step", "Trainings"):
        assert f"## {part}: done" in report
    assert "| commit | abc1234 |" in report
    assert "| device | cpu |" in report
    assert " passed" in report
    assert "| time, chunked token |" in report
    assert "A step of KD (KD, chunked) over one of CE (fairseq):" in report
    assert "`hkd-t-1`: valid | epoch 001 | valid on 'valid' subset" in report
    for file in ("loss.csv", "step.csv", "tests.log", "train-teacher.log", "train-hkd-t.log"):
        assert (out / file).stat().st_size > 0


def test_a_part_that_fails_is_reported_and_the_next_one_runs(tmp_path: Path):
    """A recipe's folder that the trainings cannot use; the next part runs."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    (recipe / "recipe").write_text("no-such-recipe\n")
    done = run(
        SCRIPT, "--device", "cpu", "--minutes", 5, "--out", tmp_path / "out", "--recipe", recipe,
        "--part", "train", "--part", "step",
    )  # fmt: skip
    report = (tmp_path / "out" / "gpu.md").read_text()
    assert done.returncode == 1
    assert "## Trainings: FAILED" in report
    assert "## A training step: done" in report


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--part", "rows"), "--part rows: must be tests, loss, step or train"),
        (("--minutes", "0"), "--minutes 0: needs a whole number above 0"),
        (("--minutes",), "--minutes needs a value"),
        (("--device", "tpu"), "--device tpu: must be cuda or cpu"),
        (("--recipe", "/nonexistent"), "--recipe /nonexistent: no folder of a recipe"),
        (("--site", "/nonexistent"), "--site /nonexistent: no such folder"),
        (("--jobs", "x"), "--jobs x: needs a whole number above 0"),
        (("--nothing",), "unknown argument --nothing: see --help"),
    ],
)
def test_what_it_refuses(arguments: tuple, message: str, tmp_path: Path):
    done = run(SCRIPT, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()
