"""fairseq's logs, written by fairseq's own progress bars."""

import logging

import command_line as cl
import pytest
from fairseq.logging import progress_bar

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.report import logs


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


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("{'_name': None, 'common': {'_name': None, 'seed': 1, 'fp16': False}}", {"seed": 1, "fp16": False}),
        ("{'_name': None, 'task': {'_name': 'mine', 'source': previous-epoch, 'x': -1.5, 'y': [1, 2]}}",
         {"task": "mine", "source": "previous-epoch", "x": -1.5, "y": [1, 2]}),
        ("{'_name': None, 'model': Namespace(arch='tiny', betas='(0.9, 0.98)', lr=[0.1], data=None)}",
         {"arch": "tiny", "betas": "(0.9, 0.98)", "lr": [0.1], "data": None}),
        ("{'_name': None, 'common': {'seed': 1, 'fp", None),
    ],
)  # fmt: skip
def test_settings(message: str, expected):
    assert logs.settings(message) == expected


def test_no_text(tmp_path):
    (tmp_path / "train.log").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"train\.log is no text"):
        logs.read(tmp_path / "train.log")
