"""A cross-fitted gauge: each training sentence is judged by a teacher that was trained without it."""

from pathlib import Path

import command_line as cl
import pytest
import torch

from hgkd_fairseq import cli
from hgkd_fairseq.teacher.store import Store

OURS = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)


@pytest.fixture(scope="module")
def folds(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[cl.Run]:
    """Two teachers, each trained on half of the data."""
    folder = tmp_path_factory.mktemp("folds")
    steps = ("--gate", "none", "--max-epoch", 8, "--max-tokens", 400, *cl.KEEP_LAST)
    return cl.together(
        *[lambda k=k: cl.train(data, folder / str(k), *OURS, *steps, "--leave-out-fold", f"{k}/2") for k in (1, 2)]
    )


@pytest.fixture(scope="module")
def gauge(data: Path, folds: list[cl.Run], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gauge") / "store"
    paths = ":".join(str(run.path()) for run in folds)
    words = ("store", data, "--teacher-path", paths, "--folds", "--kind", "gold", "--output", folder, "--cpu")
    assert cli.main([*map(str, words), "--teacher-temperature", "1.2"]) == 0
    return folder


def test_each_teacher_was_trained_without_its_fold(folds: list[cl.Run]):
    for run in folds:
        assert "300 of 600 training sentences are kept aside" in run.result.output
    assert cl.differences(*[run.state()["model"] for run in folds])


def test_each_sentence_is_judged_by_the_teacher_that_has_not_seen_it(
    data: Path, folds: list[cl.Run], gauge: Path, tmp_path
):
    """Its numbers are those that this teacher alone gives; validation sentences are judged by both."""
    found = Store(str(gauge))
    assert found.manifest["folds"] == 2
    for place, run in enumerate(folds):
        alone = tmp_path / str(place)
        words = ("store", data, "--teacher-path", run.path(), "--kind", "gold", "--output", alone, "--cpu")
        assert cli.main([*map(str, words), "--teacher-temperature", "1.2"]) == 0
        own = Store(str(alone))
        for number in range(40):
            gold, other = (store.sentence(number)[1]["gold"][:, :2] for store in (found, own))
            close = torch.allclose(torch.from_numpy(gold.copy()), torch.from_numpy(other.copy()), atol=1e-4)
            assert close == (number % 2 == place)
    # Held-out sentences are less probable than those that a teacher was trained on.
    seen, unseen = ([], [])
    own = Store(str(tmp_path / "0"))
    for number in range(600):
        (unseen if number % 2 == 0 else seen).append(own.sentence(number)[1]["gold"][:, 0].mean())
    assert sum(seen) / len(seen) > sum(unseen) / len(unseen) + 0.02


@pytest.mark.parametrize("gate", ["token", "typical"])
def test_the_gate_reads_the_gauge_and_learns_from_the_teacher(
    gate: str, data: Path, teacher: cl.Run, gauge: Path, tmp_path: Path
):
    """Another gauge gives another share; the KL is that of the teacher."""
    margin = ("--typical-margin", 0.1) if gate == "typical" else ()
    common = (
        "--gate",
        gate,
        *margin,
        "--max-update",
        4,
        "--dropout",
        0,
        "--attention-dropout",
        0,
        "--teacher-temperature",
        1.2,
    )
    live, gauged, native = cl.together(
        lambda: cl.train(data, tmp_path / "live", *cl.distil(teacher.path(), *common)),
        lambda: cl.train(
            data,
            tmp_path / "gauged",
            *cl.distil(teacher.path(), *common, "--gauge-store", gauge, "--loss-impl", "eager"),
        ),
        lambda: cl.train(data, tmp_path / "native", *cl.distil(teacher.path(), *common, "--gauge-store", gauge)),
    )
    rows = [run.result.logs("valid")[-1] for run in (live, gauged, native)]
    assert rows[0]["teacher_share"] != rows[1]["teacher_share"]
    assert rows[1]["teacher_share"] == pytest.approx(rows[2]["teacher_share"], abs=1e-3)
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], abs=2e-3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--gate", "always"), ["--gauge-store", "gate always", "does not compare the gold tokens"]),
        (("--gate-on", "argmax"), ["--gauge-store", "reading argmax"]),
        (("--teacher-temperature", 2), ["was written at temperature 1.2", "--teacher-temperature 1.2 or 1"]),
        (
            ("--gate", "typical", "--teacher-temperature", 1),
            ["was written at temperature 1.2: give --teacher-temperature 1.2"],
        ),
        (("--leave-out-fold", "3/2"), ["--leave-out-fold 3/2: give K/N"]),
        (("--teacher-path", "", "--teacher-store", "GAUGE", "--gauge-store", ""), ["give it in --gauge-store"]),
    ],
)
def test_what_cannot_be_used(options, expected, data: Path, teacher: cl.Run, gauge: Path, tmp_path: Path):
    words = [str(gauge) if word == "GAUGE" else word for word in options]
    common = ("--gauge-store", gauge, "--teacher-temperature", 1.2)
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", tmp_path)
    cl.one_error_message(cl.fairseq("train", *arguments, *cl.distil(teacher.path(), *common, *words)), expected)


def test_folds_need_several_teachers(data: Path, teacher: cl.Run, tmp_path: Path, capsys):
    words = (
        "store",
        data,
        "--teacher-path",
        teacher.path(),
        "--folds",
        "--kind",
        "gold",
        "--output",
        tmp_path / "x",
        "--cpu",
    )
    assert cli.main([*map(str, words)]) == 1
    assert "--folds needs --kind gold and several teachers" in capsys.readouterr().err
