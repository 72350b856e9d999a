"""The task of models that begin as mBART, with a teacher: language tokens end sources and targets."""

from pathlib import Path

import command_line as cl
import pytest
from fairseq.data import Dictionary

from hgkd_fairseq import plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.teacher import inputs
from hgkd_fairseq.teacher.live import LiveTeacher

TASK = ("--task", "translation_from_pretrained_bart_with_teacher", "--langs", "de,en,fr")

plugin.register()


def test_training(data: Path, tmp_path: Path):
    """A teacher and a student by the same task, which translates; a student of another task, or of other languages, is
    refused."""
    usual = (*cl.USER_DIR, *TASK, "--criterion", "hard_gate_kd", *cl.KEEP_LAST)
    first = cl.train(data, tmp_path / "teacher", *usual, "--gate", "none", "--max-epoch", 3, *cl.BLEU)
    taught = (*usual, "--teacher-path", first.path(), "--max-update", 1, "--gate", "always", "--teacher-temperature", 1)
    again = ("--restore-file", first.path(), "--reset-optimizer", "--dropout", 0, "--attention-dropout", 0)
    student, generated = cl.together(
        lambda: cl.train(data, tmp_path / "student", *taught, *again),
        lambda: cl.fairseq(
            *("generate", data, *cl.USER_DIR, *TASK, "--source-lang", "de", "--target-lang", "en", "--cpu"),
            *("--path", first.path(), "--gen-subset", "test", "--beam", 2, "--max-len-b", 12),
        ),
    )
    # It begins as its teacher: nothing lies between them before the first update.
    assert student.result.logs("train")[0]["kd_loss"] < 1e-3
    assert "bleu" in first.result.logs("valid")[-1]
    assert len(generated.hypotheses()) == 64, generated.end()
    lengths = [len(line.split()) for line in generated.hypotheses()]
    assert sum(lengths) / len(lengths) < 11  # it ends

    dictionary = Dictionary.load(str(data / "dict.en.txt"))
    both = ([str(first.path())], dictionary, dictionary)
    with pytest.raises(UserError, match="they need the same language tokens"):
        LiveTeacher(*both, languages=("de", "en"))
    added = inputs.added({"_name": TASK[1], "source_lang": "de", "target_lang": "en"})
    assert len(LiveTeacher(*both, languages=("de", "en"), added=added).models) == 1
    dictionary.add_symbol("[it]")
    with pytest.raises(UserError, match=r"'\[it\]', is none of the teacher's"):
        LiveTeacher(*both, languages=("de", "en"), added=added)
