"""Every answer to "when", trained through fairseq-train: the loss falls, and what a run remembers comes back."""

from pathlib import Path

import command_line as cl
import pytest

from hgkd_fairseq.gates import GATES

SELF = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)
UPDATES, MIDDLE = 16, 8

# What the command line of each run adds; TEACHER stands for a checkpoint. `MEMORY` remember something between steps.
TEACHER = object()
PLAIN = {
    "none": (*SELF, "--gate", "none", "--confidence-penalty", 0.1),
    "token-reversed": (TEACHER, "--gate", "token-reversed"),
    "sentence-reversed": (TEACHER, "--gate", "sentence-reversed"),
    "always": (TEACHER, "--gate", "always", "--kd-weight", 0.5),
    "annealed": (TEACHER, "--gate", "annealed", "--gate-share", 0.5, "--teacher-temperature-start", 4),
    "soft": (TEACHER, "--gate", "soft", "--gate-sharpness", 2),
    "selective-batch": (TEACHER, "--gate", "selective-batch"),
    "virtual-teacher": (*SELF, "--gate", "virtual-teacher", "--kd-weight", 0.2),
    "unigram": (*SELF, "--teacher-source", "unigram", "--gate", "always", "--kd-weight", 0.1),
}
MEMORY = {
    "random": (TEACHER, "--gate", "random"),
    "selective-global": (TEACHER, "--gate", "selective-global", "--gate-queue", 500),
    "soft-learned": (TEACHER, "--gate", "soft-learned"),
    "progressive": (*SELF, "--teacher-source", "previous-epoch", "--gate", "progressive"),
    "beta": (*SELF, "--teacher-source", "ema", "--store-ema", "--ema-decay", 0.9, "--gate", "beta"),
}
RUNS = {**PLAIN, **MEMORY}


def options(name: str, teacher: cl.Run) -> tuple:
    first, *rest = RUNS[name]
    return (*cl.distil(teacher.path()), *rest) if first is TEACHER else RUNS[name]


@pytest.fixture(scope="module")
def runs(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cl.Run]:
    """Each trained for 16 updates, with a checkpoint after 8, in the middle of an epoch."""
    folder = tmp_path_factory.mktemp("methods")
    steps = ("--max-update", UPDATES, "--save-interval-updates", MIDDLE, "--disable-validation", "--dropout", 0.1)
    names = list(RUNS)
    trained = cl.together(
        *[lambda n=name: cl.train(data, folder / n, *options(n, teacher), *steps, *cl.KEEP_LAST) for name in names]
    )
    return dict(zip(names, trained, strict=True))


def test_every_gate_is_trained():
    trained = {rest[rest.index("--gate") + 1] for rest in RUNS.values()}
    assert trained | {"token", "sentence"} == set(GATES)  # those two in test_training.py


@pytest.mark.parametrize("name", RUNS)
def test_the_loss_falls(name: str, runs: dict[str, cl.Run]):
    rows = runs[name].result.logs("train")
    assert rows[-1]["num_updates"] == UPDATES
    assert rows[-1]["nll_loss"] < rows[0]["nll_loss"] - 0.2
    shares = [row["teacher_share"] for row in rows]
    if name in ("none", "virtual-teacher", "beta"):  # beta's teacher only gauges
        assert shares == [0] * len(rows)
    elif name in ("always", "soft", "soft-learned", "unigram"):
        assert shares == [1] * len(rows)
    elif name == "annealed":
        assert shares[0] == 1
        assert shares[-1] == 0
    elif name == "progressive":  # no previous epoch in the first one
        assert shares == [0] + [1] * (len(rows) - 1)
    elif name == "sentence-reversed":  # no sentence is above a trained teacher yet: all of them are below
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
    if name == "progressive":
        assert memory["previous_epoch"]["epoch"] > 1


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
    ],
    ids=lambda value: " ".join(map(str, value[:4])),
)
def test_refused(given: tuple, expected: list[str], data: Path, tmp_path: Path):
    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *SELF, "--save-dir", tmp_path, *given)
    cl.one_sentence(cl.fairseq("train", *arguments), expected)
