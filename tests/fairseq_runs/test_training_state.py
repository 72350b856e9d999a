"""Tests of what a run learns and remembers besides its model, with which only the same run is resumed, and of teachers
that training would overwrite."""

import argparse
from pathlib import Path

import command_line as cl
import pytest
import torch

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import training_state
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.teacher.live import refuse_what_training_writes
from hgkd_fairseq.teacher.unigram import log_frequencies

SELF = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)
SMOOTHING = ("--gate", "always", "--kd-weight", 0.1, "--teacher-temperature", 1)


def build(data: Path, *options):
    """Return (task, criterion) as fairseq-train builds them."""
    from fairseq import options as fairseq_options
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    arguments = [str(a) for a in (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *SELF, "--save-dir", "new", *options)]
    parser = fairseq_options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser, arguments))
    task = tasks.setup_task(cfg.task)
    return task, task.build_criterion(cfg.criterion)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--gate", gate, option, value), f"{option}: {float(value)} is ")
        for gate, option in (
            ("always", "--kd-weight"),
            ("selective-batch", "--kd-weight"),
            ("selective-global", "--kd-weight"),
            ("virtual-teacher", "--virtual-gold"),
            ("virtual-teacher", "--virtual-temperature"),
            ("beta", "--beta-shape"),
            ("random", "--gate-share"),
            ("selective-batch", "--gate-share"),
            ("annealed", "--gate-share"),
            ("soft", "--gate-sharpness"),
            ("soft-learned", "--gate-sharpness"),
            ("instance", "--refresh-change"),
        )
        for value in ("nan", "inf", "-1")
    ]
    + [
        (("--gate", "none", option, value), f"{option} {float(value)}: it must be ")
        for option in ("--label-smoothing", "--confidence-penalty")
        for value in ("nan", "inf", "-1")
    ]
    + [
        (("--gate", "none", "--teacher-temperature", value), f"--teacher-temperature {value}: it {what}")
        for value, what in (*((number, "must be") for number in ("nan", "inf", "-1")), ("hot", "is neither a number"))
    ]
    + [
        (("--teacher-temperature-start", "inf", "--max-update", 9), "--teacher-temperature-start inf: it must be"),
        (
            ("--gate", "selective-global", "--gate-queue", 10**9),
            "--gate-queue: 1000000000 is out of range; with gate selective-global it must be a number of tokens",
        ),
        (("--gate", "instance", "--held-out", "nan"), "--held-out nan: a share"),
        (("--gate", "instance", "--held-out", "train1"), "--held-out train1: that is trained on"),
        (("--gate", "instance", "--held-out", "../bin/valid"), "--held-out ../bin/valid: there is no such subset in"),
        (
            ("--gate", "virtual-teacher", "--label-smoothing", 0.1),
            "--label-smoothing: --gate virtual-teacher smooths the targets itself; drop the option",
        ),
        (("--gate", "beta", "--confidence-penalty", 0.1), "--confidence-penalty: --gate beta smooths the targets"),
        (("--gate", "beta", "--divergence", "js"), "--divergence js: --gate beta has none; drop the option"),
        (("--gate", "none", "--divergence", "js"), "--divergence js: --gate none has none; drop the option"),
        (("--gate", "beta", "--gate-dropout", "off"), "--gate-dropout off: it is for gates that read the student's"),
        *[
            (("--gate", "random", "--gate-share", 0.5, *what), "--gate random --gate-share draws, and reads nothing")
            for what in (("--gate-on", "argmax"), ("--untempered-gate",), ("--gate-dropout", "off"))
        ],
        (
            ("--gate", "none", "--num-batch-buckets", 2),
            "--num-batch-buckets: fairseq's code for it fails with numpy >= 2",
        ),
        (("--teacher-temperature-share", 0.5), "--teacher-temperature-share is of --teacher-temperature-start: add it"),
        (
            ("--teacher-temperature", "auto", "--disable-validation"),
            "--teacher-temperature auto needs a validation set: drop --disable-validation, or give a number",
        ),
        (("--distill-start-update", 9, "--max-update", 9), "--distill-start-update 9: the training ends before"),
        (("--fp16",), "--fp16 needs a GPU; on the CPU give --memory-efficient-fp16, --amp or --bf16"),
        (("--loss-impl", "triton"), "--loss-impl triton: Triton "),
        (("--best-checkpoint-metric", "bleu"), "--best-checkpoint-metric bleu: name one of ece, gap, kd_loss, loss,"),
        (("--best-checkpoint-metric", "accuracy"), "--best-checkpoint-metric accuracy: name one of"),
        (
            ("--best-checkpoint-metric", "accuracy", "--report-accuracy"),
            "--best-checkpoint-metric accuracy: fairseq would keep the checkpoint with the lowest one; add --maximize",
        ),
        (
            ("--best-checkpoint-metric", "ece", "--maximize-best-checkpoint-metric"),
            "--maximize-best-checkpoint-metric: a lower ece is better; drop the option",
        ),
        (
            ("--best-checkpoint-metric", "ppl", "--maximize-best-checkpoint-metric"),
            "--maximize-best-checkpoint-metric: a lower ppl is better; drop the option",
        ),
        (
            ("--best-checkpoint-metric", "nll_loss", "--maximize-best-checkpoint-metric"),
            "--maximize-best-checkpoint-metric: a lower nll_loss is better; drop the option",
        ),
        (
            ("--teacher-temperature-start", 3, "--teacher-temperature-share", 0, "--max-update", 9),
            "--teacher-temperature-share 0: --teacher-temperature-start is then never used",
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_options_are_checked_before_anything_is_loaded(given: tuple, expected: str, data: Path):
    with pytest.raises(UserError) as caught:
        build(data, *given)
    assert str(caught.value).startswith(expected)


def test_the_teacher_of_all_training_data(data: Path, tmp_path: Path):
    """The unigram teacher counts what is trained on: also train1 and all data folders, the first part as often as
    --upsample-primary says, and no sentence that is too long."""
    for file in data.iterdir():
        (tmp_path / file.name).symlink_to(file)
    for side in ("de", "en"):
        for end in ("bin", "idx"):
            (tmp_path / f"train1.de-en.{side}.{end}").symlink_to(data / f"valid.de-en.{side}.{end}")
    task, _ = build(
        f"{tmp_path}:{data}", "--teacher-source", "unigram", *SMOOTHING, "--upsample-primary", 3, "--max-tokens", 8
    )
    task.load_dataset("train", combine=True)  # the first folder, as fairseq's trainer does
    task.load_dataset("valid")
    first, added = task.dataset("train"), task.dataset("valid")
    assert len(first) == 3 * 600 + 64
    trained = [
        *[first[i] for i in range(len(first))],
        *[first[i] for i in range(600)],
    ]  # the second folder has the train of the first
    short = [row["target"] for row in trained if max(len(row["source"]), len(row["target"])) <= 8]
    assert 0 < len(short) < len(trained)
    assert len(added) == 64
    counts = sum(torch.bincount(target, minlength=len(task.tgt_dict)) for target in short).clamp(min=1).double()
    expected = (counts / counts.sum()).log().float()
    torch.testing.assert_close(task.load_teacher().logprobs, expected, rtol=0, atol=0)
    assert list(task.datasets) == ["train", "valid"]


def test_training_data_that_are_not_there(data: Path):
    with pytest.raises(UserError, match="unigram counts the training data: there is no subset gone in"):
        build(data, "--teacher-source", "unigram", *SMOOTHING, "--train-subset", "gone")


def test_log_frequencies():
    found = log_frequencies([torch.tensor([2, 2, 3]), torch.tensor([3, 3])], 5)
    assert found.exp().tolist() == pytest.approx([1 / 8, 1 / 8, 2 / 8, 3 / 8, 1 / 8])


@pytest.mark.parametrize(
    ("teacher", "refused"),
    [
        ("s/checkpoint_best.pt", True),
        ("s/checkpoint_last.pt", True),
        ("s/checkpoint12.pt", True),
        ("s/checkpoint_3_400.pt", True),
        ("s/checkpoint.best_bleu_30.1230.pt", True),
        ("s/crash.pt", True),
        ("linked/checkpoint_best.pt", True),  # the folder by another name
        ("t/to_s.pt", True),  # a link to it
        ("t/to_link.pt", True),  # a link to a link
        ("t/t.pt:s/checkpoint_best.pt", True),
        ("s/link_out/checkpoint_best.pt", False),
        ("s/teacher.pt", False),
        ("t/checkpoint_best.pt", False),
        ("t/t.pt", False),
    ],
)
def test_a_teacher_that_the_student_would_write_over(
    teacher: str, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    Path("s").mkdir()
    Path("t").mkdir()
    Path("linked").symlink_to("s")
    Path("s/link_out").symlink_to("../t")
    Path("t/t.pt").touch()
    Path("t/to_s.pt").symlink_to("../s/checkpoint_best.pt")
    Path("t/to_link.pt").symlink_to("to_s.pt")
    Path("s/checkpoint_last.pt").symlink_to("../t/t.pt")  # training replaces the link, not its target
    if not refused:
        refuse_what_training_writes(teacher, "./s/")
        return
    with pytest.raises(UserError, match=r"lies in --save-dir \./s/ under a name that this training writes"):
        refuse_what_training_writes(teacher, "./s/")


def test_what_a_gate_remembers_is_outside_the_criterion(data: Path, teacher: cl.Run):
    """A gate's memory is saved and restored in fp32 with the task's state: fairseq saves no buffers of a criterion
    without parameters, and --fp16 converts them."""
    given = ("--gate", "selective-global", "--teacher-path", teacher.path())
    (task, criterion), (again, other) = build(data, *given), build(data, *given)
    memory = criterion.gate_in_use().weights.state
    memory["queue"] = torch.tensor([1 + 2**-20, 2.0])  # fp16 would round the first
    criterion.half()
    assert criterion.state_dict() == {}
    again.set_checkpoint_dict(task.get_checkpoint_dict()["TranslationWithTeacherTask"])
    found = other.gate_in_use().weights.state["queue"]
    assert found.dtype == torch.float32
    assert torch.equal(found, memory["queue"])


def prepared(state: dict, data: Path, new_run: bool, *options):
    """Return the state as fairseq-train would load it, and the criterion's own initial parameters."""
    task, criterion = build(data, *options)
    training_state.prepare(state, "old.pt", task, criterion, new_run)
    return state, criterion.state_dict()


@pytest.fixture(scope="module")
def students(data: Path, teacher: cl.Run, plain: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return, by name, checkpoints of runs of two updates each, and that of `plain`."""
    folder = tmp_path_factory.mktemp("students")
    steps = ("--max-update", 2, "--disable-validation", *cl.KEEP_LAST)
    runs = {
        "always": cl.distil(teacher.path(), "--gate", "always", "--kd-weight", 0.5),
        "selective-global": cl.distil(teacher.path(), "--gate", "selective-global"),
        "soft-learned": cl.distil(teacher.path(), "--gate", "soft-learned", "--finetune-from-model", plain.path()),
        "unigram": (*SELF, "--teacher-source", "unigram", *SMOOTHING),
    }
    cl.together(*[lambda n=name: cl.train(data, folder / n, *runs[n], *steps) for name in runs])
    return {name: folder / name / "checkpoint_last.pt" for name in runs} | {"plain": plain.path()}


RESUMED = [
    ("always", ("--gate", "always", "--kd-weight", 0.5), ""),
    ("always", ("--gate", "always", "--kd-weight", 0.3), "--kd-weight 0.3 is asked for, and --kd-weight 0.5 made it"),
    ("always", ("--gate", "none"), "--gate none is asked for, and --gate always --teacher-source checkpoint made it"),
    ("always", ("--gate", "soft-learned"), "--gate soft-learned is asked for, and --gate always made it"),
    ("selective-global", ("--gate", "instance"), "--gate instance is asked for, and --gate selective-global made it"),
    (
        "selective-global",
        ("--gate", "selective-global", "--gate-queue", 50),
        "--gate-queue 50 is asked for, and --gate-q",
    ),
    ("soft-learned", ("--gate", "soft-learned"), ""),
    ("soft-learned", ("--gate", "token"), "--gate token is asked for, and --gate soft-learned made it"),
    ("unigram", ("--teacher-source", "unigram", *SMOOTHING), ""),
    (
        "unigram",
        ("--teacher-source", "loras", *SMOOTHING),
        "--teacher-source loras is asked for, and --teacher-source u",
    ),
    ("plain", ("--gate", "token"), "LabelSmoothedCrossEntropyCriterion made it"),
]


@pytest.mark.parametrize(("name", "options", "problem"), RESUMED)
def test_resumed_as_another_run(
    name: str, options: tuple, problem: str, students: dict[str, Path], data: Path, teacher: cl.Run
):
    taught = () if "--teacher-source" in options or "none" in options else ("--teacher-path", teacher.path())
    state = training_state_of(students[name])
    if not problem:
        before = repr(state)
        assert repr(prepared(state, data, False, *options, *taught)[0]) == before
    else:
        with pytest.raises(UserError) as caught:
            prepared(state, data, False, *options, *taught)
        assert str(caught.value).startswith(f"old.pt is of another run: {problem}")
        assert "--finetune-from-model" in str(caught.value)
        assert "--reset-optimizer" in str(caught.value)
    # A new run takes the model, and nothing of the old run's gate.
    state, learned = prepared(training_state_of(students[name]), data, True, *options, *taught)
    assert training_state.memory_in(state["extra_state"]) == {}
    assert state["extra_state"]["previous_training_time"] == 0
    if learned:
        assert cl.differences(state["criterion"], learned) == {}


def test_a_parameter_that_the_gate_did_not_have_yet(students: dict[str, Path], data: Path, teacher: cl.Run):
    """A run of a gate that has got another parameter since is resumed with its default, and with no other value."""
    taught = ("--teacher-path", teacher.path(), "--gate", "selective-global")
    state = training_state_of(students["selective-global"])
    del training_state.memory_in(state["extra_state"])["method"]["kd_weight"]
    prepared(state, data, False, *taught)
    with pytest.raises(UserError, match=r"--kd-weight 0\.5 is asked for, and --kd-weight 1\.0 made it"):
        prepared(state, data, False, *taught, "--kd-weight", 0.5)


def test_a_moving_average_begins_with_the_weights(data: Path, plain: cl.Run, tmp_path: Path):
    """Of a checkpoint without one, with which fairseq fails. With a decay of 1 it stays what it was."""
    past = ("--teacher-source", "ema", "--store-ema", "--ema-decay", 1.0, "--gate", "always", "--kd-weight", 0.5)
    steps = ("--finetune-from-model", plain.path(), "--max-update", 2, "--disable-validation", *cl.KEEP_LAST)
    run = cl.train(data, tmp_path, *SELF, *past, *steps)
    found = cl.differences(run.state()["extra_state"]["ema"], plain.state()["model"])
    assert found.keys() <= {"encoder.version", "decoder.version"}  # fairseq's numbers, no weights


def test_options_that_were_not_set_before_are_reported():
    """A changed option without a default value, such as --jsd-beta, is reported; one that a checkpoint lacks is not."""
    new = argparse.Namespace(divergence="js", jsd_beta=0.3)
    expected = "--jsd-beta 0.3 is asked for, and the default made it"
    assert training_state.changes(new, argparse.Namespace(divergence="js", jsd_beta=None)) == expected
    assert training_state.changes(new, argparse.Namespace()) == ""


def test_epochs_that_are_counted_again():
    """With --reset-dataloader the epochs begin with 1: what was remembered in the old epoch 2 is not of the new one."""
    state = training_state.TrainingState()
    state.resume({"previous_epoch": {"epoch": 2, "model": {}}, "gate": {"epoch": torch.tensor(3)}})
    state.memory["unigram"] = torch.zeros(5)
    state.restart_epochs()
    assert state.memory["previous_epoch"]["epoch"] == 0
    assert int(state.memory["gate"]["epoch"]) == 0


def test_reset_dataloader_keeps_the_memory(students: dict[str, Path], data: Path, teacher: cl.Run, tmp_path: Path):
    """--reset-dataloader resets the position in the data but not the gate's memory; fairseq alone resets both."""
    gate = cl.distil(teacher.path(), "--gate", "selective-global")
    steps = ("--disable-validation", *cl.KEEP_LAST, "--restore-file", students["selective-global"])
    run = cl.train(data, tmp_path, *gate, *steps, "--reset-dataloader", "--max-update", 3)
    assert run.state()["extra_state"]["train_iterator"]["iterations_in_epoch"] == 1  # not 3
    kept, more = (
        training_state.memory_in(cl.load(path)["extra_state"])["gate"]["queue"]
        for path in (students["selective-global"], run.path())
    )
    kept, more = kept[kept.isfinite()], more[more.isfinite()]  # nan: not filled yet
    assert 0 < len(kept) < len(more)
    assert torch.isin(kept, more).all()


def training_state_of(path: Path) -> dict:
    from fairseq import checkpoint_utils

    return checkpoint_utils.load_checkpoint_to_cpu(str(path))


def test_resumed_with_another_teacher(students: dict[str, Path], data: Path, teacher: cl.Run, plain: cl.Run, tmp_path):
    """fairseq-train identifies a teacher by its weights, so that a copy may be used; --reset-optimizer, which the
    refusal of another teacher names, works."""
    copy = tmp_path / "copy.pt"
    copy.write_bytes(teacher.path().read_bytes())
    given = (
        "--gate",
        "always",
        "--kd-weight",
        0.5,
        "--restore-file",
        students["always"],
        "--max-update",
        3,
        "--no-save",
    )

    def resume(path: Path, *more) -> cl.Result:
        arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--disable-validation", "--save-dir", tmp_path)
        return cl.fairseq("train", *arguments, *cl.distil(path, *given, *more))

    same, other, new = cl.together(
        lambda: resume(copy), lambda: resume(plain.path()), lambda: resume(plain.path(), "--reset-optimizer")
    )
    assert same.code == 0, same.end()
    assert new.code == 0, new.end()
    cl.one_error_message(other, ["is of another run: another teacher taught its student", "--reset-optimizer"])


def test_what_was_learned_is_validated(students: dict[str, Path], data: Path):
    """fairseq-validate builds a new criterion, which gets the learned parameters from the checkpoint."""
    from fairseq import checkpoint_utils

    path = str(students["soft-learned"])
    _, cfg, task = checkpoint_utils.load_model_ensemble_and_task([path], arg_overrides={"data": str(data)})
    criterion = task.build_criterion(cfg.criterion)
    assert cl.differences(criterion.state_dict(), cl.load(students["soft-learned"])["criterion"]) == {}
    assert criterion.state_dict()["learned_gate.sharpness"] != 1
    cfg.criterion.gate = "selective-global"
    with pytest.raises(UserError, match="cannot be validated in this way: --gate selective-global"):
        task.build_criterion(cfg.criterion)


def test_nan_gradients_are_reported(data: Path, teacher: cl.Run, tmp_path: Path):
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", tmp_path, "--lr", 1e30, "--no-save")
    result = cl.fairseq("train", *arguments, *cl.distil(teacher.path(), "--disable-validation"))
    assert result.code == 1
    (error,) = result.errors()
    assert error.startswith("update 2: gradients are Nan/Inf: the training has diverged; lower --lr")
    assert "Traceback" not in result.output
    assert "StopIteration" not in result.output


def test_workers_whose_gradients_differ_are_no_divergence():
    """Gradients that differ between workers are not reported as divergence, for which fairseq raises the same class."""
    from fairseq.trainer import Trainer

    class Broken(Trainer):
        def __init__(self):
            pass

        def get_num_updates(self):
            return 6

        def _set_seed(self):
            raise FloatingPointError("Fatal error: gradients are inconsistent between workers. Try another backend")

    with pytest.raises(UserError) as caught:
        Broken().train_step([])
    assert str(caught.value) == "update 7: Fatal error: gradients are inconsistent between workers. Try another backend"


def test_weights_of_the_sentences_that_were_learned(data: Path, teacher: cl.Run, tmp_path: Path):
    """`hgkd weights` reads the rows of sentences that are short enough to train on and not held out, whatever the name
    of the task's class."""
    from hgkd_fairseq.sentence_weights import table as weight_table

    gate = ("--gate", "instance", "--held-out", 0.1, "--refresh-interval", 1, "--max-update", 2)
    options = (*gate, "--max-source-positions", 7, "--max-target-positions", 7, "--disable-validation", *cl.KEEP_LAST)
    run = cl.train(data, tmp_path, *cl.distil(teacher.path(), *options))
    task, _ = build(data, "--gate", "none")
    task.load_dataset("train")
    lengths = [max(len(row["source"]), len(row["target"])) for row in (task.dataset("train")[i] for i in range(600))]
    held_out = run.state()["extra_state"]["TranslationWithTeacherTask"]["gate"]["held_out"].tolist()
    expected = [i for i in range(600) if lengths[i] <= 7 and not held_out[i]]
    assert 100 < len(expected) < 400
    found = weight_table.read(str(run.path()))
    assert found.sentence.tolist() == expected
    assert (found.teacher != Instance.TEACHER).float().mean() > 0.9

    state = run.state()
    state["extra_state"]["MyTask"] = state["extra_state"].pop("TranslationWithTeacherTask")
    torch.save(state, tmp_path / "of_a_subclass.pt")
    assert torch.equal(weight_table.read(str(tmp_path / "of_a_subclass.pt")).data, found.data)
