"""fairseq's logs, written by fairseq's own progress bars."""

import logging
import math
import time

import command_line as cl
import pytest
from fairseq.logging import progress_bar

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import logs


@pytest.fixture(params=["simple", "json"])
def bars(request, tmp_path):
    """(function that makes a progress bar of that format, the file that it logs to)."""
    file = tmp_path / "train.log"
    handler = logging.FileHandler(file)
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
    logger, level = progress_bar.logger, progress_bar.logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def bar(epoch: int, prefix: str | None = None):
        return progress_bar.progress_bar(range(9), request.param, 1, epoch=epoch, prefix=prefix)

    yield bar, file
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_curves(bars):
    bar, file = bars
    for epoch in (1, 2):
        bar(epoch).print({"loss": 3, "teacher_share": 0.25 * epoch, "num_updates": 10 * epoch}, "train")
        for subset, shift in (("valid", 0), ("valid1", 1)):
            numbers = {"loss": 9, "nll_loss": 4.5 - epoch + shift, "ece": 0.02 * epoch, "bleu": 20 + epoch, "lr": 1e-05}
            bar(epoch, f"valid on '{subset}' subset").print({**numbers, "num_updates": 10 * epoch}, subset)
    found = logs.read(file).curves
    assert found["nll_loss"] == ([10, 20], [3.5, 2.5])
    assert found["ece"] == ([10, 20], [0.02, 0.04])
    assert found["bleu"] == ([10, 20], [21, 22])
    assert found["teacher_share"] == ([10, 20], [0.25, 0.5])


def test_inner_lines_and_resumption(bars):
    """Many points an epoch where the log has them; a run resumed from an earlier update replaces what came after."""
    bar, file = bars
    for share, first in ((0.1, 0), (0.9, 3)):
        training = bar(1)
        for place in training:
            updates = first + place
            training.log({"teacher_share": share, "num_updates": updates}, "train_inner", updates)
        training.print({"teacher_share": 0.5, "num_updates": 9}, "train")
    x, y = logs.read(file).curves["teacher_share"]
    assert x == list(range(1, 12))
    assert y == [0.1] * 2 + [0.9] * 9


def test_loss_of_plain_cross_entropy(bars):
    """fairseq's cross_entropy logs its loss alone."""
    bar, file = bars
    bar(1, "valid on 'valid' subset").print({"loss": 4.25, "num_updates": 7}, "valid")
    assert logs.read(file).curves == {"nll_loss": ([7], [4.25])}


def test_a_log_of_fairseq_train(student: cl.Run, tmp_path):
    """The settings and the six epochs of a real run."""
    (tmp_path / "train.log").write_text(student.result.output)
    log = logs.read(tmp_path / "train.log")
    valid = student.result.logs("valid")
    for name in ("nll_loss", "ece", "bleu"):
        assert log.curves[name] == ([row["num_updates"] for row in valid], [row[name] for row in valid])
    assert log.curves["teacher_share"][1] == [row["teacher_share"] for row in student.result.logs("train")]
    expected = {"arch": "transformer_iwslt_de_en", "criterion": "hard_gate_kd", "gate": "token", "lr": [0.005]}
    assert {name: log.settings[name] for name in expected} == expected
    assert log.settings["teacher_path"].endswith("teacher_then_deleted.pt")
    assert log.settings["task"] == "translation_with_teacher"
    assert log.settings["cpu"] is True


def test_epochs_of_a_killed_run(tmp_path):
    """Epoch 2 was made twice, and the share of epoch 3 was lost between its checkpoint and its line."""
    lines = [
        '| INFO | valid | {"epoch": 1, "valid_nll_loss": "5.5", "valid_ece": "0.1", "valid_num_updates": "10"}',
        '| INFO | train | {"epoch": 1, "train_teacher_share": "0.25", "train_num_updates": "10"}',
        '| INFO | valid | {"epoch": 2, "valid_nll_loss": "9", "valid_ece": "0.9", "valid_num_updates": "20"}',
        '| INFO | valid | {"epoch": 2, "valid_nll_loss": "4.5", "valid_ece": "0.2", "valid_num_updates": "20"}',
        '| INFO | train | {"epoch": 2, "train_teacher_share": "0.5", "train_num_updates": "20"}',
        '| INFO | valid | {"epoch": 3, "valid_nll_loss": "4.0", "valid_ece": "0.3", "valid_num_updates": "30"}',
        '| INFO | train | {"epoch": 4, "train_teacher_share": "0.75", "train_num_updates": "40"}',
    ]
    (tmp_path / "train.log").write_text("\n".join(lines))
    assert logs.read(tmp_path / "train.log").epochs == [
        {"updates": 10, "valid_nll": 5.5, "valid_ece": 0.1, "teacher_share": 0.25},
        {"updates": 20, "valid_nll": 4.5, "valid_ece": 0.2, "teacher_share": 0.5},
        {"updates": 30, "valid_nll": 4.0, "valid_ece": 0.3},
    ]


HYDRA = "[2026-01-31 12:00:00,000][{}][INFO] - {}\n"


def test_a_log_of_hydra(tmp_path):
    """Another start of each line; the architecture is the model's name, and an option of another group a reference."""
    settings = (
        "{'_name': None, 'dataset': {'_name': None, 'max_tokens': 400}, 'model': {'_name': 'lstm', 'dropout': 0.2}, "
        "'criterion': {'_name': 'hard_gate_kd', 'max_tokens': '${dataset.max_tokens}', 'lr': '${optimization.lr}'}, "
        "'optimization': {'lr': [0.005]}, 'job_logging_cfg': {'version': 1, 'root': {'level': 'INFO'}}}"
    )
    lines = [("fairseq_cli.train", settings), ("fairseq.tasks.translation", "[de] dictionary: 56 types")]
    valid = "epoch 001 | valid on 'valid' subset | loss 5.177 | nll_loss 5.177 | ece 0.0309 | wps 89.2 | num_updates 9"
    lines += [("train_inner", "epoch 001:      5 / 9 loss=6.12, teacher_share=0.25, num_updates=5, lr=0.005")]
    lines += [("valid", valid)]
    (tmp_path / "train.log").write_text("".join(HYDRA.format(*line) for line in lines))
    log = logs.read(tmp_path / "train.log")
    assert log.curves == {"nll_loss": ([9], [5.177]), "ece": ([9], [0.0309]), "teacher_share": ([5], [0.25])}
    expected = {"arch": "lstm", "dropout": 0.2, "max_tokens": 400, "criterion": "hard_gate_kd", "lr": [0.005]}
    assert log.settings.items() >= expected.items()
    assert not log.empty


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["4.5", "3.5"], None),
        (["4.5", "nan", "3.5"], None),  # it came back
        (["4.5", "nan", "nan"], 20),
        (["inf", "nan"], 10),
    ],
)
def test_a_run_that_diverged(values: list[str], expected: int | None, bars):
    bar, file = bars
    for epoch, value in enumerate(values, start=1):
        bar(epoch, "valid on 'valid' subset").print({"nll_loss": float(value), "num_updates": 10 * epoch}, "valid")
    assert logs.read(file).diverged == expected


@pytest.mark.parametrize("number", ["nan", "inf", "-1", "1e308", "1" * 400, "9" * 5000, "[1]", "null", "true", "x"])
@pytest.mark.parametrize(
    "line", ['{{"valid_nll_loss": 1, "valid_num_updates": {}}}', "epoch 1 | loss 1 | num_updates {}"]
)
def test_updates_that_are_none(line: str, number: str, tmp_path):
    """There is no point of the curve at an update that cannot be."""
    start = "2026-01-31 12:00:00 | INFO | valid | "
    (tmp_path / "train.log").write_text(f"{start}{line.format(7)}\n{start}{line.format(number)}\n")
    found = logs.read(tmp_path / "train.log").curves["nll_loss"]
    assert found == (([1], [1.0]) if number == "true" and line[0] == "{" else ([7], [1.0]))


@pytest.mark.parametrize(
    "line",
    [
        "2026-01-31 12:00:00 | INFO | train | " + "a" * 300_000,
        "2026-01-31 12:00:00 | INFO | " + "a" * 300_000,
        "2026-01-31 12:00:00 | INFO | valid | " + "a=" * 150_000,
        "2026-01-31 12:00:00 | INFO | valid | {" + '"a": ' * 60_000,
        "2026-01-31 12:00:00 | INFO | valid | {" + '"a": [' * 50_000,
        "2026-01-31 12:00:00 | INFO | valid | " + '{"a": ' * 50_000,
        "2026-01-31 12:00:00 | INFO | x | {'_name': " + "a" * 300_000,
        "2026-01-31 12:00:00 | INFO | x | {'_name': '" + "\\'" * 150_000,
        "2026-01-31 12:00:00 | INFO | x | {'_name': " + "{" * 300_000,
        "2026-01-31 12:00:00 | INFO | x | {'_name': " + "-" * 300_000,
        "2026-01-31 12:00:00 | INFO | x | {'_name': [" + "a, " * 100_000 + "]}",
        "2026-01-31 12:00:00 | INFO | x | {'_name'" + ": {'_name'" * 30_000,
        "| INFO | " * 40_000,
        "[" * 300_000,
        "INFO:" * 60_000,
    ],
    ids=range(15),
)
def test_long_lines_take_no_time(line: str, tmp_path):
    (tmp_path / "train.log").write_text(line + "\n")
    start = time.process_time()
    logs.read(tmp_path / "train.log")
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("{'_name': None, 'common': {'_name': None, 'seed': 1, 'fp16': False}}", {"seed": 1, "fp16": False}),
        ("{'_name': None, 'task': {'_name': 'mine', 'source': previous-epoch, 'x': -1.5, 'y': [1, 2]}}",
         {"task": "mine", "source": "previous-epoch", "x": -1.5, "y": [1, 2]}),
        ("{'_name': None, 'model': Namespace(arch='tiny', betas='(0.9, 0.98)', lr=[0.1], data=None)}",
         {"arch": "tiny", "betas": "(0.9, 0.98)", "lr": [0.1], "data": None}),
        ("{'_name': None, 'common': {'seed': 1, 'fp", None),
        ("{'_name': None, 'common': {'a': {}, 'b': (), 'c': (1, 'x'), 'd': {2, 3}, 'e': [[1]], 'f': b'x', 'g': 1+2j}}",
         {"c": (1, "x"), "d": [2, 3], "e": [[1]], "f": "b'x'", "g": "1+2j"}),
        ("{'_name': None, 'common': {'a': 1e308, 'b': inf, 'c': -nan, 'd': '\\ud800', 'e': '\\x1b', 7: 8}}",
         {"a": 1e308, "b": math.inf, "d": "\ud800", "e": "\x1b", "7": 8}),
        ("{'_name': None, 'model': Namespace(a=Namespace(b=1), c=__import__('os'), d=2)}", None),
        ("{'_name'}", None),
        ("{'_name': None, []: 1}", {}),
        ("{'_name': {[]}}", {}),
        ("{'_name': None} {", None),
        ("{'_name': " + "[" * 5000 + "]" * 5000 + "}", None),
        ("{'_name': None, 'common': {'a': " + "9" * 5000 + ", 'b': " + "-" * 5000 + "}}",
         {"a": math.inf, "b": "-" * 5000}),
    ],
)  # fmt: skip
def test_settings(message: str, expected):
    found = logs.settings(message)
    if found:
        found = {name: each for name, each in found.items() if each == each}  # nan is not itself
    assert found == expected


def test_no_text(tmp_path):
    (tmp_path / "train.log").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"train\.log is no text"):
        logs.read(tmp_path / "train.log")
