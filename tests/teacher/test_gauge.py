"""Tests of --teacher-temperature auto and of what a run logs about its teacher."""

import re
from argparse import Namespace
from pathlib import Path

import command_line as cl
import pytest
from making_stores import make_task

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import temperature
from hgkd_fairseq.plugin.training_state import TrainingState
from hgkd_fairseq.teacher import gauge

GAUGE = re.compile(
    r"fits the teacher to the validation set is ([\d.]+): NLL ([\d.]+) bits there, ([\d.]+) at 1, and ([\d.]+) at 1"
)


@pytest.fixture(scope="module")
def fitted(data: Path, teacher: cl.Run) -> temperature.Fit:
    return temperature.fit(str(data), str(teacher.path()), cpu=True)


@pytest.fixture(scope="module")
def run(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> cl.Run:
    folder = tmp_path_factory.mktemp("auto")
    return cl.train(data, folder, *cl.distil(teacher.path(), "--teacher-temperature", "auto", "--max-update", 3))


def kept(run: cl.Run) -> float:
    return run.state()["extra_state"]["TranslationWithTeacherTask"]["fitted_temperature"]


def test_auto_is_what_the_single_command_fits(run: cl.Run, fitted: temperature.Fit):
    assert kept(run) == pytest.approx(fitted.temperature, abs=1e-3)
    degree, at_it, at_1, training = map(float, GAUGE.search(run.result.output).groups())
    assert degree == kept(run)
    assert f"--teacher-temperature auto: {degree:.4f}" in run.result.output
    assert at_it == pytest.approx(fitted.scaled["nll"].value, abs=2e-3)
    assert at_1 == pytest.approx(fitted.raw["nll"].value, abs=2e-3)
    assert 0 < training < at_1  # the teacher had 30 epochs of the 600 training sentences
    assert "confident; auto takes" not in run.result.output


def test_the_same_as_that_number(run: cl.Run, data: Path, teacher: cl.Run, tmp_path: Path):
    """A run with auto equals one with the fitted number, and its checkpoint is validated and resumed at that number; a
    checkpoint without a fitted number cannot be validated with auto."""
    options = ("--teacher-temperature", kept(run), "--max-update", 3)
    auto = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)
    asked = (*auto, "--teacher-path", teacher.path(), "--teacher-temperature", "auto", "--path", run.path())
    number, validated = cl.together(
        lambda: cl.train(data, tmp_path / "number", *cl.distil(teacher.path(), *options)),
        lambda: cl.fairseq("validate", data, *cl.LOGS, *asked, "--max-tokens", 800),
    )
    assert cl.differences(number.state()["model"], run.state()["model"]) == {}
    assert kept(number) is None
    trained = run.result.logs("valid")[-1]
    for name in ("loss", "nll_loss", "teacher_share"):
        assert validated.logs("valid")[-1][name] == trained[name], validated.end()
    number.path().rename(tmp_path / "moved.pt")
    resumed, refused = cl.together(
        lambda: cl.train(
            data, tmp_path / "resumed", "--restore-file", run.path(), *cl.distil(teacher.path(), *options[:2]),
            "--teacher-temperature", "auto", "--max-update", 5,
        ),
        lambda: cl.fairseq("validate", data, *cl.LOGS, *asked[:-1], tmp_path / "moved.pt", "--max-tokens", 800),
    )  # fmt: skip
    assert kept(resumed) == kept(run)
    cl.one_error_message(refused, ["--teacher-temperature auto", "holds no fitted temperature"])


def test_no_data_to_fit_it_to(data: Path):
    """Missing data have an error message other than that of data which no temperature fits."""
    task = make_task(data)
    task.load_dataset("train")
    cfg = Namespace(valid_subset="valid", combine_valid_subsets=False, teacher_temperature="auto")
    with pytest.raises(UserError, match=r"auto is fitted to subset valid, and that is not loaded, or .* --disable-val"):
        gauge.begin(cfg, task, None, None, TrainingState())


def test_a_far_temperature_is_warned_of(fitted: temperature.Fit, data: Path, teacher: cl.Run, tmp_path: Path):
    far = round(fitted.temperature + 0.5, 2)
    past = ("--teacher-source", "ema", "--store-ema", "--teacher-path", "", "--teacher-temperature", "auto")
    warned, refused = cl.together(
        lambda: cl.train(data, tmp_path, *cl.distil(teacher.path(), "--teacher-temperature", far, "--max-update", 1)),
        lambda: cl.fairseq("train", data, *cl.SIZE, *cl.STEPS, *cl.LOGS, "--save-dir", tmp_path / "past",
                           *cl.distil(teacher.path(), *past)),
    )  # fmt: skip
    line = f"--teacher-temperature {far:g} is above the {fitted.temperature:.2f} that fits the teacher"
    assert line in warned.result.output
    assert "students end underconfident; auto takes the fitted one" in warned.result.output
    cl.one_error_message(refused, ["--teacher-temperature auto fits a frozen model", "--teacher-source ema is none"])
