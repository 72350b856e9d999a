"""Tests of training on the student's own translations: resumed runs and two workers, compared bit for bit."""

from pathlib import Path

import command_line as cl
import pytest


@pytest.fixture(scope="module")
def runs(data: Path, teacher: cl.Run, plain: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cl.Run]:
    """Return a run, one resumed from its checkpoint in the middle of the second epoch, and one of two workers."""
    folder = tmp_path_factory.mktemp("on-policy")
    own = ("--on-policy-share", 0.5, "--on-policy-sampling", "--on-policy-speculative", 3)
    short = ("--max-tokens", 400, "--max-update", 10, "--save-interval-updates", 8, "--dropout", 0)
    options = cl.distil(
        teacher.path(), "--gate", "token", "--divergence", "skew-kl", *own, *short, "--disable-validation"
    )
    start = ("--finetune-from-model", plain.path())
    one = cl.train(data, folder / "one", *options, *start, "--update-freq", 2)
    two = cl.two_workers(data, folder / "two", *options, *start)
    middle = one.path("checkpoint_2_8.pt")
    resumed = cl.train(data, folder / "resumed", *options, "--update-freq", 2, "--restore-file", middle)
    return {"one": one, "two": two, "resumed": resumed}


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_the_same_run(name: str, runs: dict[str, cl.Run]):
    """Two workers equal one with --update-freq 2, and a resumed run equals an uninterrupted one, bit for bit and with
    the same translations."""
    one, other = (run.state() for run in (runs["one"], runs[name]))
    assert cl.differences(one["model"], other["model"]) == {}
    memory, again = (state["extra_state"]["TranslationWithTeacherTask"] for state in (one, other))
    assert cl.differences(memory, again) == {}
    assert memory["on_policy"]["epoch"] == 2
    assert len(memory["on_policy"]["number"]) == 300
    log, same = (run.result.logs("train")[-1] for run in (runs["one"], runs[name]))
    assert 0.3 < log["on_policy_share"] < 0.8
    assert log["on_policy_loss"] == same["on_policy_loss"] > 0
    translated = runs[name].result.output.count("the student has translated 300 training sentences")
    assert translated == (2 if name == "two" else 0)


def test_the_loss_of_own_translations_falls(runs: dict[str, cl.Run]):
    first, second = runs["one"].result.logs("train")
    assert second["on_policy_loss"] < first["on_policy_loss"]
