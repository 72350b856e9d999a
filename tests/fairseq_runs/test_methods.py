"""Tests of gates and teacher sources through fairseq-train: the loss falls, and what a run remembers is restored."""

import re
from pathlib import Path

import command_line as cl
import pytest
import torch

from hgkd_fairseq import cli
from hgkd_fairseq.gates import GATES

SELF = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)
SMOOTHING = ("--gate", "always", "--kd-weight", 0.1, "--teacher-temperature", 1)
UPDATES, MIDDLE = 16, 8

# Options of each run; TEACHER stands for those with a checkpoint. Runs of MEMORY remember something between steps.
TEACHER = object()
PLAIN = {
    "none": (*SELF, "--gate", "none", "--confidence-penalty", 0.1),
    "token-reversed": (TEACHER, "--gate", "token-reversed"),
    "sentence-reversed": (TEACHER, "--gate", "sentence-reversed"),
    "always": (TEACHER, "--gate", "always", "--kd-weight", 0.5),
    "annealed": (TEACHER, "--gate", "annealed", "--gate-share", 0.5, "--teacher-temperature-start", 4),
    "floor": (TEACHER, "--gate", "floor", "--gate-floor", "0.2,0.8"),
    "sentence-floor": (TEACHER, "--gate", "sentence-floor", "--gate-floor", "0.8,0.2"),
    "typical": (TEACHER, "--gate", "typical", "--kd-weight", 0.2, "--typical-margin", -0.1),
    "expected": (TEACHER, "--gate", "expected"),
    "drawn": (TEACHER, "--gate", "token", "--gate-on", "student-draw"),
    "without dropout": (TEACHER, "--gate", "token", "--gate-dropout", "off", "--ignore-prefix-size", 1),
    "wsl": (TEACHER, "--gate", "wsl"),
    "wsl-normalised": (TEACHER, "--gate", "wsl-normalised"),
    "soft": (TEACHER, "--gate", "soft", "--gate-sharpness", 2),
    "selective-batch": (TEACHER, "--gate", "selective-batch"),
    "virtual-teacher": (*SELF, "--gate", "virtual-teacher", "--kd-weight", 0.2),
    "instance convex": (
        *(TEACHER, "--gate", "instance", "--held-out", "test", "--refresh-interval", 2, "--weight-rule", "convex"),
        *("--label-smoothing", 0.1, "--bf16"),
    ),
    "unigram": (*SELF, "--teacher-source", "unigram", "--gate", "always", "--kd-weight", 0.1),
}
MEMORY = {
    "random": (TEACHER, "--gate", "random"),
    "selective-global": (TEACHER, "--gate", "selective-global", "--gate-queue", 500),
    "soft-learned": (TEACHER, "--gate", "soft-learned"),
    "instance": (TEACHER, "--gate", "instance", "--held-out", 0.1, "--refresh-interval", 1),
    "loras": (*SELF, "--teacher-source", "loras", *SMOOTHING),
    "progressive": (*SELF, "--teacher-source", "previous-epoch", "--gate", "progressive"),
    "beta": (*SELF, "--teacher-source", "ema", "--store-ema", "--ema-decay", 0.9, "--gate", "beta"),
}
RUNS = {**PLAIN, **MEMORY}
CONSTANT = {"always": 0.5, "unigram": 0.1, "loras": 0.1}  # the teacher's share


def options(name: str, teacher: cl.Run) -> tuple:
    first, *rest = RUNS[name]
    return (*cl.distil(teacher.path()), *rest) if first is TEACHER else RUNS[name]


@pytest.fixture(scope="module")
def runs(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cl.Run]:
    """Return runs of 16 updates each, with a checkpoint after 8, in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("methods")
    steps = ("--max-update", UPDATES, "--save-interval-updates", MIDDLE, "--dropout", 0.1)
    names = list(RUNS)
    trained = cl.together(
        *[lambda n=name: cl.train(data, folder / n, *options(n, teacher), *steps, *cl.KEEP_LAST) for name in names]
    )
    return dict(zip(names, trained, strict=True))


def test_every_gate_is_trained():
    trained = {rest[rest.index("--gate") + 1] for rest in RUNS.values()}
    # "token" and "sentence" are trained in test_training.py, "pair" in test_several_pairs.py.
    assert trained | {"token", "sentence", "pair"} == set(GATES)


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls(name: str, runs: dict[str, cl.Run]):
    rows = runs[name].result.logs("train")
    assert rows[-1]["num_updates"] == UPDATES
    assert rows[-1]["nll_loss"] < rows[0]["nll_loss"] - 0.2
    shares = [row["teacher_share"] for row in rows]
    if name in ("none", "virtual-teacher", "beta"):  # beta's teacher only sorts the draws
        assert shares == [0] * len(rows)
    elif name in CONSTANT:
        assert shares == pytest.approx([CONSTANT[name]] * len(rows), abs=1e-4)
    elif name == "floor":
        assert all(0.2 < share < 0.8 for share in shares)
    elif name == "sentence-floor":  # few sentences are above a trained teacher yet
        assert all(0.5 < share <= 0.8 for share in shares)
    elif name == "typical":
        assert all(0.2 < share < 1 for share in shares)
    elif name == "annealed":
        assert shares[0] == 1
        assert shares[-1] == 0
    elif name == "progressive":  # the first epoch has no previous one
        assert shares[0] == 0
        assert shares[1:] == sorted(shares[1:])
        assert 0 < shares[1] < shares[-1] < 0.8
    elif name == "sentence-reversed":  # few sentences are above a trained teacher yet
        assert all(share > 0.5 for share in shares)
    else:
        assert all(0 < share < 1 for share in shares[1:])


@pytest.mark.parametrize("name", MEMORY)
def test_resumed_in_the_middle_of_an_epoch(
    name: str, runs: dict[str, cl.Run], data: Path, teacher: cl.Run, tmp_path: Path
):
    middle = runs[name].path(f"checkpoint_2_{MIDDLE}.pt")  # the second epoch: fairseq alone would make other batches
    steps = ("--max-update", UPDATES, "--disable-validation", "--dropout", 0.1, "--restore-file", middle)
    resumed = cl.train(data, tmp_path, *options(name, teacher), *steps, *cl.KEEP_LAST)
    assert f"@ {MIDDLE} updates" in resumed.result.output
    one, other = runs[name].state(), resumed.state()
    assert cl.differences(one["model"], other["model"]) == {}
    memory, again = (state["extra_state"]["TranslationWithTeacherTask"] for state in (one, other))
    assert cl.differences(memory, again) == {}
    if name == "selective-global":
        assert len(memory["gate"]["queue"]) == 500
    if name == "soft-learned":
        assert cl.differences(one["criterion"], other["criterion"]) == {}
        assert one["criterion"]["learned_gate.sharpness"] != 1.0
    if name == "loras":
        assert cl.differences(one["criterion"], other["criterion"]) == {}
        assert (one["criterion"]["learned_teacher.embedding"] != 1).float().mean() > 0.5
    if name == "progressive":
        assert memory["previous_epoch"]["epoch"] > 1
    if name == "instance":  # refreshed in each of three epochs, once after the checkpoint
        assert memory["gate"]["epoch"] == 3
        assert resumed.result.output.count("sentences refreshed") == 1


@pytest.fixture(scope="module")
def validated(runs: dict[str, cl.Run], data: Path, teacher: cl.Run) -> dict[str, cl.Result]:
    """Return fairseq-validate's results for runs that depend on what was learned or remembered, or on the progress."""
    names = [*MEMORY, "annealed"]
    common = (data, *cl.LOGS, "--max-tokens", 800)

    def validate(name: str) -> cl.Result:
        own = list(options(name, teacher))
        for training in ("--ema-decay", "--store-ema"):  # no options of fairseq-validate
            if training in own:
                del own[own.index(training) : own.index(training) + 1 + (training == "--ema-decay")]
        return cl.fairseq("validate", *common, *own, "--path", runs[name].path())

    results = cl.together(*[lambda name=name: validate(name) for name in names])
    return dict(zip(names, results, strict=True))


@pytest.mark.parametrize("name", [*MEMORY, "annealed"])
def test_validated_as_in_training(name: str, runs: dict[str, cl.Run], validated: dict[str, cl.Result]):
    """fairseq-validate gives the numbers that training gave for the same checkpoint."""
    assert validated[name].code == 0, validated[name].end()
    (found,), expected = validated[name].logs("valid"), runs[name].result.logs("valid")[-1]
    numbers = ("loss", "nll_loss", "kd_loss", "teacher_share", "gap", "ece")
    assert {number: found[number] for number in numbers} == {number: expected[number] for number in numbers}


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        (
            "none",
            ("--gate", "selective-global"),
            "--gate selective-global --teacher-source checkpoint is asked for, and --gate none made it",
        ),
        ("soft", ("--gate", "soft-learned"), "--gate soft-learned is asked for, and --gate soft made it"),
        ("beta", ("--gate", "beta", "--teacher-source", "previous-epoch"), "--teacher-source previous-epoch is asked"),
    ],
)
def test_validated_as_another_run(
    name: str, given: tuple, expected: str, runs: dict[str, cl.Run], data: Path, teacher: cl.Run
):
    """A checkpoint cannot be validated with a gate or teacher source whose state it lacks."""
    own = given if "--teacher-source" in given else (*given, "--teacher-path", teacher.path())
    result = cl.fairseq("validate", data, *cl.LOGS, "--max-tokens", 800, *SELF, *own, "--path", runs[name].path())
    cl.one_error_message(result, [f"{runs[name].path()} cannot be validated in this way: {expected}", "--gate none"])


def refreshes(run: cl.Run) -> list[float]:
    """Return the median changes of the data and the teacher weights, two numbers per refresh."""
    found = re.findall(r"refreshed in .* median change data (\S+), teacher (\S+);", run.result.output)
    return [float(change) for row in found for change in row]


def test_weights_of_sentences(runs: dict[str, cl.Run], tmp_path: Path, capsys: pytest.CaptureFixture):
    independent, convex = (runs[name].state()["extra_state"] for name in ("instance", "instance convex"))
    table, held_out = (independent["TranslationWithTeacherTask"]["gate"][key] for key in ("data", "held_out"))
    assert len(table) == 600
    assert held_out.sum() == 60
    assert "60 of 600 training sentences are kept aside" in runs["instance"].result.output
    assert torch.equal(table != torch.tensor(0.1), ~held_out)  # only held-out sentences keep their first weight
    changes = refreshes(runs["instance"])
    assert len(changes) == 6
    assert all(0.02 < change < 0.2 for change in changes)

    gate = convex["TranslationWithTeacherTask"]["gate"]
    assert not gate["held_out"].any()
    torch.testing.assert_close(gate["data"] + gate["teacher"], torch.ones(600))
    assert (gate["teacher"] != torch.tensor(0.9)).float().mean() > 0.9
    assert gate["epoch"] == 2

    listed, output, figure = tmp_path / "some.txt", tmp_path / "weights.tsv", tmp_path / "weights.svg"
    some = (~held_out).nonzero().flatten()[:9].tolist()
    listed.write_text("".join(f"{number}\n" for number in some))
    arguments = ["weights", runs["instance"].path(), "--compare", listed, "--output", output, "--plot", figure]
    assert cli.main([str(argument) for argument in arguments]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"some: 9 sentences, median weight data {table[some].median():.4f}, teacher ")
    assert second.startswith("others: 531 sentences")
    lines = [line.split("\t") for line in output.read_text().splitlines()]
    assert lines[0] == ["sentence", "data", "teacher"]
    assert [int(line[0]) for line in lines[1:]] == (~held_out).nonzero().flatten().tolist()
    assert [float(line[1]) for line in lines[1:]] == pytest.approx(table[~held_out].tolist(), rel=1e-5)
    assert figure.read_text().count("</svg>") == 1
    listed.write_text("600\n999999\n")
    assert cli.main([str(argument) for argument in arguments[:4]]) == 1
    assert f"--compare {listed}: none of its numbers is that of a sentence with" in capsys.readouterr().err
    assert cli.main(["weights", str(runs["none"].path())]) == 1
    assert "has no weights of sentences; name a checkpoint of a run with --gate instance" in capsys.readouterr().err


def test_two_workers_refresh_as_one_does(data: Path, teacher: cl.Run, tmp_path: Path):
    short = ("--max-tokens", 400, "--dropout", 0, "--attention-dropout", 0, "--disable-validation", *cl.KEEP_LAST)
    gate = ("--gate", "instance", "--held-out", "test", "--refresh-interval", 1, "--max-update", 5)
    options = cl.distil(teacher.path(), *gate, *short)
    one = cl.train(data, tmp_path / "one", *options, "--update-freq", 2)
    two = cl.two_workers(data, tmp_path / "two", *options)
    tables = [run.state()["extra_state"]["TranslationWithTeacherTask"]["gate"] for run in (one, two)]
    assert cl.differences(*tables) == {}
    assert (tables[0]["teacher"] != torch.tensor(0.9)).float().mean() > 0.9
    assert cl.differences(one.state()["model"], two.state()["model"]) == {}
    assert len(refreshes(two)) == 2


def test_resuming_with_other_sentences_kept_aside_is_refused(
    runs: dict[str, cl.Run], data: Path, teacher: cl.Run, tmp_path: Path
):
    given = ("--gate", "instance", "--held-out", 0.2, "--restore-file", runs["instance"].path(), "--max-update", 99)
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", tmp_path)
    result = cl.fairseq("train", *arguments, *cl.distil(teacher.path(), *given))
    assert result.errors() == [
        "--held-out: the checkpoint has weights of 600 training sentences of which others are kept aside; "
        "resume with the same data and the same --held-out"
    ]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--gate", "tokens"), ["--gate: unknown gate", "known gates: always,"]),
        (("--gate", "token", "--kd-weight", 0.5), ['--kd-weight: gate "token" does not take it', "always"]),
        (("--gate", "always", "--kd-weight", 2), ["--kd-weight: 2.0 is no share"]),
        (("--gate", "always", "--gate-on", "argmax"), ["--gate-on: gate always does not compare"]),
        (("--gate", "progressive", "--max-epoch", 3), ["--gate progressive", "--max-update N"]),
        (("--gate", "beta", "--teacher-source", "ema"), ["--teacher-source ema", "--store-ema"]),
        (("--gate", "always"), ["--teacher-path CHECKPOINT"]),
        (("--gate", "token", "--teacher-source", "loras"), ["--teacher-source loras", "--gate always --kd-weight 0.1"]),
        (("--gate", "instance", "--held-out", "valid"), ["--held-out valid: --valid-subset chooses", "0.02"]),
    ],
    ids=lambda value: " ".join(map(str, value[:4])),
)
def test_refused(given: tuple, expected: list[str], data: Path, tmp_path: Path):
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *SELF, "--save-dir", tmp_path, *given)
    cl.one_error_message(cl.fairseq("train", *arguments), expected)
