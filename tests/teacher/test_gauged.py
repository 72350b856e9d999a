"""Tests of a cross-fitted gauge: each training sentence is scored by a teacher that was trained without it."""

import math
from pathlib import Path

import command_line as cl
import pytest
import torch
from making_stores import CPU, FP32, TranslationWithTeacherTask, batches, make_task

from hgkd_fairseq import cli
from hgkd_fairseq.gates import get_gate
from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.loss.eager import logits, mean_logprobs
from hgkd_fairseq.plugin import checkpoints, features
from hgkd_fairseq.teacher.store import Store

OURS = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)


@pytest.fixture(scope="module")
def folds(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[cl.Run]:
    """Return two teachers, each trained on half of the data."""
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
    """The numbers of a sentence are those of the teacher that was trained without it, not those of the other one."""
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
    gate: str, data: Path, teacher: cl.Run, gauge: Path, live: TranslationWithTeacherTask, tmp_path: Path
):
    """The gauge's numbers decide, so that the share differs from that of the teacher's own; the KL of the tokens that
    they give to the teacher is the teacher's."""
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
    usual, gauged, native = cl.together(
        lambda: cl.train(data, tmp_path / "live", *cl.distil(teacher.path(), *common)),
        lambda: cl.train(
            data,
            tmp_path / "gauged",
            *cl.distil(teacher.path(), *common, "--gauge-store", gauge, "--loss-impl", "eager"),
        ),
        lambda: cl.train(data, tmp_path / "native", *cl.distil(teacher.path(), *common, "--gauge-store", gauge)),
    )
    rows = [run.result.logs("valid")[-1] for run in (usual, gauged, native)]
    assert rows[0]["teacher_share"] != rows[1]["teacher_share"]
    assert rows[1]["teacher_share"] == pytest.approx(rows[2]["teacher_share"], abs=1e-3)
    assert rows[1]["loss"] == pytest.approx(rows[2]["loss"], abs=2e-3)
    task = make_task(data, teacher_path=str(teacher.path()), gauge_store=str(gauge))
    task.load_teacher()
    student = checkpoints.build(checkpoints.read(gauged.path()), task).eval()
    how = get_gate(gate, **({"typical_margin": 0.1} if margin else {}))
    total, tokens = 0.0, 0
    for sample in batches(task, "valid"):
        gold = task.teacher.gauge.signal(sample, CPU, FP32).gold
        (head,) = live.teacher.signal(sample, CPU, FP32).heads
        with torch.no_grad():
            mine = features.head(student, sample["net_input"])
            open_ = gated_distillation(
                mine.hidden, mine.weight, head.hidden, head.weight, sample["target"], gate=how, teacher_temperature=1.2,
                teacher_gold=gold.at(1.2), teacher_entropy=gold.entropy_at(1.2),
            ).teacher_mask  # fmt: skip
            logq, logp = mean_logprobs([head], 1.2), logits(mine).log_softmax(-1)
        total += float((logq.exp() * (logq - logp)).sum(-1)[open_].sum()) / math.log(2)
        tokens += int(open_.sum())
    assert tokens > 0
    for row in rows[1:]:
        assert row["kd_loss"] == pytest.approx(total / tokens, abs=2e-3)


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
        (("--leave-out-fold", "01/2"), ["--leave-out-fold 01/2: give K/N"]),
        (("--teacher-path", "", "--teacher-store", "GAUGE", "--gauge-store", ""), ["give it in --gauge-store"]),
    ],
)
def test_what_cannot_be_used(options, expected, data: Path, teacher: cl.Run, gauge: Path, tmp_path: Path):
    words = [str(gauge) if word == "GAUGE" else word for word in options]
    common = ("--gauge-store", gauge, "--teacher-temperature", 1.2)
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", tmp_path)
    cl.one_error_message(cl.fairseq("train", *arguments, *cl.distil(teacher.path(), *common, *words)), expected)


def folded(capsys, data: Path, paths: list, folder: Path, *options) -> tuple[int, str]:
    """Run `hgkd store --folds` and return its exit status and stderr."""
    words = ("store", data, "--teacher-path", ":".join(map(str, paths)), "--folds", "--kind", "gold", "--cpu")
    capsys.readouterr()
    return cli.main([*map(str, (*words, "--output", folder, *options))]), capsys.readouterr().err


def test_folds_in_another_order(data: Path, teacher: cl.Run, folds: list[cl.Run], gauge: Path, tmp_path: Path, capsys):
    """No store is written with teachers in the wrong order, which would score sentences that they were trained on, nor
    is one continued by teachers whose folds are exchanged."""
    one, other = (run.path() for run in folds)
    for paths, expected in (
        ([other, one], f"asks {other} of fold 1/2, and it was trained with --leave-out-fold 2/2; name"),
        ([one, teacher.path()], f"asks {teacher.path()} of fold 2/2, and it was trained without --leave-out-fold;"),
        ([one, other, one], f"asks {one} of fold 1/3, and it was trained with --leave-out-fold 1/2; name"),
    ):
        status, error = folded(capsys, data, paths, tmp_path / "store")
        assert status == 1
        assert expected in error
    status, error = folded(capsys, data, [one, other], tmp_path / "store", "--subset", "valid")
    assert status == 1
    assert "--folds is of the sentences of train, and --subset valid lacks it; add it" in error
    assert not (tmp_path / "store").exists()
    exchanged = []
    for run, fold in ((folds[1], "1/2"), (folds[0], "2/2")):
        state = run.state()
        state["cfg"]["task"]["leave_out_fold"] = fold
        exchanged.append(tmp_path / f"{fold[0]}.pt")
        torch.save(state, exchanged[-1])
    status, error = folded(capsys, data, exchanged, gauge, "--teacher-temperature", "1.2")
    assert status == 1
    assert "another teacher" in error


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
