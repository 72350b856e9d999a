"""Tests of training through the command line: logs, normalisation, precisions, resuming and several workers."""

import os
import signal
import subprocess
from pathlib import Path

import command_line as cl
import pytest

WITHOUT_DROPOUT = ("--dropout", 0, "--attention-dropout", 0)


def test_log_lines(student: cl.Run):
    """Over the student's six epochs loss and cross-entropy fall, and the share of the teacher is neither 0 nor 1."""
    train, valid = student.result.logs("train"), student.result.logs("valid")
    assert len(train) == len(valid) == 6
    for rows in (train, valid):
        assert rows[-1]["loss"] < rows[0]["loss"]
        assert rows[-1]["nll_loss"] < rows[0]["nll_loss"]
        for row in rows:
            assert 0 < row["teacher_share"] < 0.9
            assert row["ppl"] == pytest.approx(2 ** row["nll_loss"], rel=0.01)
            assert row["kd_loss"] > 0
            assert 0 < row["accuracy"] < 100
    assert all(0 < row["ece"] < 0.5 for row in valid)
    assert not any("ece" in row for row in train)
    assert train[-1]["accuracy"] > train[0]["accuracy"]
    # The student starts far below its teacher.
    assert train[0]["gap"] < -1


def test_the_best_translation_is_far_below_the_teachers(student: cl.Run, teacher: cl.Run):
    """--eval-bleu scores the student, not the teacher, whose BLEU a student cannot have after a few updates."""
    theirs = max(row["bleu"] for row in teacher.result.logs("valid"))
    assert theirs > 20
    assert max(row["bleu"] for row in student.result.logs("valid")) < theirs / 4


def test_validation_is_plain_cross_entropy(student: cl.Run, plain: cl.Run, teacher: cl.Run, data: Path, tmp_path: Path):
    """nll_loss is the cross-entropy that fairseq's own criterion reports for the same parameters. fairseq-validate
    takes the criterion from the checkpoint, so for the latter the student's parameters are put into the plain run's."""
    state = plain.state()
    state["model"] = student.state()["model"]
    cl.torch.save(state, tmp_path / "swapped.pt")
    common = (data, *cl.USER_DIR, "--cpu", "--log-format", "json", "--max-tokens", 4000)
    task = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", "--teacher-path", teacher.path())
    plain_task = ("--task", "translation", "--criterion", "label_smoothed_cross_entropy")
    ours, theirs = cl.together(
        lambda: cl.fairseq("validate", *common, *task, "--path", student.path()),
        lambda: cl.fairseq("validate", *common, *plain_task, "--path", tmp_path / "swapped.pt"),
    )
    assert (ours.code, theirs.code) == (0, 0), ours.end() + theirs.end()
    (gated,), (smoothed,) = ours.logs("valid"), theirs.logs("valid")
    assert gated["nll_loss"] == pytest.approx(smoothed["nll_loss"], abs=0.0011)
    assert gated["nll_loss"] == pytest.approx(student.result.logs("valid")[-1]["nll_loss"], abs=0.0011)
    assert 0 < gated["teacher_share"] < 1
    assert gated["loss"] != gated["nll_loss"]


@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_one_batch_is_two_halves(gate: str, data: Path, plain: cl.Run, tmp_path: Path):
    """A batch of 64 sentences and two of 32 with --update-freq 2 give the same parameters, as gradients are normalised
    once. The optimizer is SGD: Adam would turn the rounding of a gradient near 0 into a full step."""
    usual = ("--train-subset", "valid", "--required-batch-size-multiple", 1, "--max-update", 3, "--disable-validation")
    steps = ("--optimizer", "sgd", "--lr", 0.5, "--max-tokens", 9999, "--clip-norm", 0.5, *WITHOUT_DROPOUT)
    average = ("--sentence-avg",) if gate == "sentence" else ()
    # The teacher is the student's initial model, sharpened, so that either gate decides both ways.
    start = ("--finetune-from-model", plain.path(), "--teacher-temperature", 0.8)
    options = cl.distil(plain.path(), "--gate", gate, *usual, *steps, *average, *start, *cl.KEEP_LAST)
    whole, halves = cl.together(
        lambda: cl.train(data, tmp_path / "whole", *options, "--batch-size", 64),
        lambda: cl.train(data, tmp_path / "halves", *options, "--batch-size", 32, "--update-freq", 2),
    )
    for run in (whole, halves):
        assert [row["num_updates"] for row in run.result.logs("train")] == [1, 2, 3]
    assert 0 < whole.result.logs("train")[0]["teacher_share"] < 1
    assert whole.result.logs("train")[0]["bsz"] == halves.result.logs("train")[0]["bsz"] == 64
    gaps = cl.differences(whole.state()["model"], halves.state()["model"])
    assert max(gaps.values(), default=0) < 1e-6
    for name in ("loss", "nll_loss", "teacher_share", "gap"):
        one, other = (run.result.logs("train")[-1][name] for run in (whole, halves))
        assert one == pytest.approx(other, abs=0.0011)


def test_distil_start_update(plain: cl.Run, data: Path, teacher: cl.Run, tmp_path: Path):
    """Until --distill-start-update a run equals the plain one; then the teacher is used."""
    start = int(plain.result.logs("train")[1]["num_updates"])
    options = ("--label-smoothing", 0.1, "--distill-start-update", start, "--max-epoch", 3)
    run = cl.train(data, tmp_path, *cl.distil(teacher.path(), *options))
    ours, theirs = run.result.logs("train"), plain.result.logs("train")
    assert [row["teacher_share"] == 0 for row in ours] == [True, True, False]
    for epoch in range(2):
        for name in ("loss", "nll_loss", "gnorm"):
            assert ours[epoch][name] == pytest.approx(theirs[epoch][name], abs=0.0011)
    gaps = cl.differences(run.state("checkpoint2.pt")["model"], plain.state("checkpoint2.pt")["model"])
    assert max(gaps.values(), default=0) < 1e-4
    gaps = cl.differences(run.state("checkpoint3.pt")["model"], plain.state("checkpoint3.pt")["model"])
    assert max(gaps.values()) > 1e-3
    # Validation always uses the loss with the teacher, so that its numbers can be compared over the whole run.
    assert all(row["teacher_share"] > 0 for row in run.result.logs("valid"))


@pytest.fixture(scope="module")
def half_precision(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cl.Run]:
    folder = tmp_path_factory.mktemp("half")
    options = {
        "--memory-efficient-fp16": ("--fp16-init-scale", 4, "--gate", "token"),
        "--amp": ("--gate", "token", "--untempered-gate"),
        "--bf16": ("--gate", "token", "--gate-on", "argmax"),
    }
    common = cl.distil(teacher.path(), "--max-epoch", 5, *cl.KEEP_LAST, "--disable-validation")
    runs = cl.together(
        *[lambda n=name, o=more: cl.train(data, folder / n, *common, n, *o) for name, more in options.items()]
    )
    return dict(zip(options, runs, strict=True))


@pytest.mark.parametrize("precision", ["--memory-efficient-fp16", "--amp", "--bf16"])
def test_half_precision(precision: str, half_precision: dict[str, cl.Run]):
    rows = half_precision[precision].result.logs("train")
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4, 5]
    losses = [row["nll_loss"] for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.5
    assert all(0 < row["teacher_share"] < 1 for row in rows[1:])


def test_from_a_run_without_a_teacher(plain: cl.Run, data: Path, teacher: cl.Run, tmp_path: Path):
    """--finetune-from-model starts from a run of plain cross-entropy, whose save-dir fairseq refuses to resume from."""
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *cl.distil(teacher.path(), "--max-epoch", 1))
    tuned, refused = cl.together(
        lambda: cl.train(
            data, tmp_path, *cl.distil(teacher.path(), "--max-epoch", 1, "--finetune-from-model", plain.path())
        ),
        lambda: cl.fairseq("train", *arguments, "--save-dir", plain.folder),
    )
    # It starts where the plain run ended.
    before = plain.result.logs("train")
    assert before[-1]["nll_loss"] - 0.5 < tuned.result.logs("train")[0]["nll_loss"] < before[-1]["nll_loss"] + 0.3
    assert tuned.result.logs("train")[0]["num_updates"] == before[0]["num_updates"]
    assert refused.code != 0
    assert "--reset-optimizer" in refused.output
    assert "begin training epoch" not in refused.output


def test_killed_and_resumed(data: Path, teacher: cl.Run, tmp_path: Path):
    """A run that is killed by SIGKILL within an epoch and started again equals an uninterrupted one, bit for bit."""
    save = ("--save-interval-updates", 4, "--max-update", 24, "--disable-validation", "--max-tokens", 400)
    options = cl.distil(teacher.path(), *save, "--dropout", 0.2)
    whole = cl.train(data, tmp_path / "whole", *options)
    folder = tmp_path / "killed"
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *options, "--save-dir", folder)
    with subprocess.Popen(
        cl.command("train", *arguments),
        env=cl.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            if "Saved checkpoint" in line and "@ 8 updates" in line:  # logged when all of its files are written
                os.kill(process.pid, signal.SIGKILL)
                break
        process.stdout.read()
    assert process.returncode == -signal.SIGKILL
    assert (folder / "checkpoint_1_8.pt").exists()
    made = cl.load(folder / "checkpoint_last.pt")["optimizer_history"][-1]["num_updates"]
    assert 8 <= made < 24

    resumed = cl.train(data, folder, *options)
    assert f"@ {made} updates" in resumed.result.output
    one, other = whole.state(), resumed.state()
    assert one["optimizer_history"][-1]["num_updates"] == other["optimizer_history"][-1]["num_updates"] == 24
    assert cl.differences(one["model"], other["model"]) == {}
    assert cl.differences(one["last_optimizer_state"], other["last_optimizer_state"]) == {}
    assert len(one["last_optimizer_state"]["state"]) > 0

    # Once more, as after a kill that came after the last checkpoint: nothing more is trained.
    last = resumed.path().read_bytes()
    again = cl.train(data, folder, *options)
    assert "the training has ended before: 24 updates are made" in again.result.output
    assert resumed.path().read_bytes() == last


def test_patience_is_counted_over_a_resume(data: Path, tmp_path: Path):
    """With a learning rate that changes nothing the first epoch is the best one, and --patience 3 ends the run with the
    third epoch after it, also if it is resumed in between."""
    options = (*cl.USER_DIR, "--criterion", "hard_gate_kd", "--gate", "none", "--lr", 1e-30, "--patience", 3)
    first = cl.train(data, tmp_path, *options, "--max-epoch", 2)
    assert [row["epoch"] for row in first.result.logs("valid")] == [1, 2]
    resumed = cl.train(data, tmp_path, *options, "--max-epoch", 9)
    assert [row["epoch"] for row in resumed.result.logs("valid")] == [3, 4]
    assert "early stop since valid performance hasn't improved for last 3 runs" in resumed.result.output
    again = cl.train(data, tmp_path, *options, "--max-epoch", 9)
    assert "the training has ended before: 3 validations have brought nothing" in again.result.output
    assert again.result.logs("train") == []


@pytest.fixture(scope="module")
def workers(data: Path, plain: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[cl.Run, tuple]]:
    """Return, by number of workers, a run of 5 updates and its options; one worker takes two batches per update."""
    folder = tmp_path_factory.mktemp("workers")
    # The teacher is the student's initial model, sharpened, so that the gate decides both ways.
    start = ("--finetune-from-model", plain.path(), "--teacher-temperature", 0.8)
    # An odd number of batches to validate on: one worker idles at the end.
    valid = ("--valid-subset", "valid,test", "--batch-size-valid", 24, "--required-batch-size-multiple", 1)
    options = cl.distil(
        plain.path(), *("--max-tokens", 400, *WITHOUT_DROPOUT, *cl.KEEP_LAST), *start, *valid,
        *("--gate", "sentence", "--report-accuracy"),
    )  # fmt: skip
    alone = (*options, "--update-freq", 2)
    one = cl.train(data, folder / "one", *alone, "--max-update", 5)
    two = cl.two_workers(data, folder / "two", *options, "--max-update", 5, logs=folder / "tensorboard")
    return {1: (one, alone), 2: (two, options)}


def test_two_workers(data: Path, workers):
    """Two workers and one with --update-freq 2 give the same parameters and log the same numbers, and the same
    parameters after both are resumed."""
    (one, alone), (two, options) = workers[1], workers[2]
    assert cl.differences(one.state()["model"], two.state()["model"]) == {}
    (single,), (double,) = one.result.logs("train"), two.result.logs("train")
    for name in ("loss", "nll_loss", "kd_loss", "teacher_share", "gap", "accuracy", "wpb", "bsz", "num_updates"):
        assert single[name] == double[name], name
    assert 0 < single["teacher_share"] < 1

    on = cl.train(data, one.folder, *alone, "--max-update", 8, "--disable-validation")
    resumed = cl.two_workers(data, two.folder, *options, "--max-update", 8, "--disable-validation")
    assert "Loaded checkpoint" in resumed.result.output
    assert resumed.state()["optimizer_history"][-1]["num_updates"] == 8
    assert cl.differences(on.state()["model"], resumed.state()["model"]) == {}


@pytest.mark.parametrize("subset", ["valid", "test"])
def test_two_workers_validate_alike(subset: str, workers):
    """Calibration and the other numbers are of all sentences, whichever worker had them in whichever batch."""
    (single,), (double,) = (workers[count][0].result.logs(subset) for count in (1, 2))
    assert single["ece"] == double["ece"] > 0.01
    for name in ("nll_loss", "accuracy", "teacher_share"):
        assert single[name] == double[name], name


def test_tensorboard(workers):
    """TensorBoard has the ECE and the reliability diagram of each subset; only the first worker writes them."""
    folder = workers[2][0].folder.parent / "tensorboard" / "0"
    assert not (folder.parent / "1").exists()
    for subset in ("valid", "test"):
        (file,) = (folder / subset).glob("events.*")
        values = [(event.step, value) for event in cl.events(file) for value in event.summary.value]
        (ece,) = [value.simple_value for _, value in values if value.tag == "ece"]
        assert ece == pytest.approx(workers[2][0].result.logs(subset)[0]["ece"])
        ((step, diagram),) = [(step, value.image) for step, value in values if value.tag == "reliability"]
        assert step == 5
        assert diagram.encoded_image_string.startswith(b"\x89PNG")
        assert (diagram.width, diagram.height) == (500, 630)
