"""The task of models that begin as mBART, with a teacher: language tokens end sources and targets."""

from pathlib import Path

import command_line as cl

TASK = ("--task", "translation_from_pretrained_bart_with_teacher", "--langs", "de,en,fr")


def test_training(data: Path, tmp_path: Path):
    """A teacher and a student by the same task, which translates; another task's teacher, or other languages, are
    refused."""
    usual = (*cl.USER_DIR, *TASK, "--criterion", "hard_gate_kd", *cl.KEEP_LAST)
    first = cl.train(data, tmp_path / "teacher", *usual, "--gate", "none", "--max-epoch", 3, *cl.BLEU)
    taught = (*usual, "--teacher-path", first.path(), "--max-update", 3)
    again = ("--restore-file", first.path(), "--reset-optimizer", "--gate", "always", "--teacher-temperature", 1)
    again = (*again, "--max-update", 1)
    steps = (*cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, "--save-dir", tmp_path / "no")
    student, other_languages, other_task, generated = cl.together(
        lambda: cl.train(data, tmp_path / "student", *taught, *again, "--dropout", 0, "--attention-dropout", 0),
        lambda: cl.fairseq("train", data, *steps, *taught, "--langs", "de,en,it"),
        lambda: cl.fairseq("train", data, *steps, *cl.distil(first.path(), "--max-update", 3)),
        lambda: cl.fairseq(
            *("generate", data, *cl.USER_DIR, *TASK, "--source-lang", "de", "--target-lang", "en", "--cpu"),
            *("--path", first.path(), "--gen-subset", "test", "--beam", 2, "--max-len-b", 12),
        ),
    )
    # It begins as its teacher: nothing lies between them before the first update. Each target has its EOS and its
    # language token.
    assert student.result.logs("train")[0]["kd_loss"] < 1e-3
    assert "bleu" in first.result.logs("valid")[-1]
    assert len(generated.hypotheses()) == 64, generated.end()
    lengths = [len(line.split()) for line in generated.hypotheses()]
    assert sum(lengths) / len(lengths) < 11  # it ends
    cl.one_error_message(other_languages, ["'[it]', is none of the teacher's"])
    cl.one_error_message(other_task, ["they need the same language tokens"])
