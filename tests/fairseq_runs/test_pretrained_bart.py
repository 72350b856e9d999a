"""Tests of fairseq's task for models fine-tuned from mBART, with a teacher: language tokens end sources and targets."""

import json
import re
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq.data import Dictionary

from hgkd_fairseq import cli, plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.teacher import inputs
from hgkd_fairseq.teacher.live import LiveTeacher

TASK = ("--task", "translation_from_pretrained_bart_with_teacher", "--langs", "de,en,fr")

plugin.register()


def check_inference(printed: Path, folder: Path):
    """Check that the calibration of fairseq-generate's output covers the printed tokens and the next one: an end of
    sentence or, where the length limit cuts a translation, the language token."""
    tokens = {number: len(text.split()) for number, text in lines_of(printed, r"H-(\d+)\t\S+")}
    scores = {number: text.split() for number, text in lines_of(printed, r"P-(\d+)")}
    assert {len(scores[number]) - count for number, count in tokens.items()} == {1, 2}
    words = ("calibration", "inference", printed, "--language-token", "last", "--replicates", 0)
    assert cli.main([str(word) for word in (*words, "--json", folder / "found.json")]) == 0
    confidences = [2 ** float(one) for number, count in tokens.items() for one in scores[number][: count + 1]]
    found = values(folder / "found.json")
    assert found["confidence"] == pytest.approx(sum(confidences) / len(confidences), abs=1e-4)


def lines_of(printed: Path, beginning: str) -> list[tuple[str, str]]:
    return re.findall(rf"^{beginning}\t(.*)$", printed.read_text(), flags=re.MULTILINE)


def values(file: Path) -> dict[str, float]:
    return {row["key"]: row["value"] for row in json.loads(file.read_text())["scores"]}


def check_commands(
    run: cl.Run, data: Path, generated: cl.Result, cut: cl.Result, folder: Path, capsys: pytest.CaptureFixture
):
    """Check that hgkd score gives fairseq-generate's translations and hgkd calibration the training's numbers, and that
    CTranslate2 translates alike if it is given the tokens that end a source, and those that begin and end a target."""
    scoring = ("score", data, run.folder, "--cpu", "--generate", "--beam 2 --max-len-b 7")
    assert cli.main([str(word) for word in (*scoring, "--checkpoint", "last")]) == 0
    assert (run.folder / "last/translations.txt").read_text().splitlines() == cut.hypotheses()
    check_inference(run.folder / "last/generate-test.txt", folder)
    assert "inference_ece" in json.loads((run.folder / "last/scores.json").read_text())
    # After one epoch most translations are empty and continue after the end of sentence, with tokens not printed.
    capsys.readouterr()
    assert cli.main([str(word) for word in (*scoring, "--checkpoint", "checkpoint1.pt")]) == 0
    assert "1: scored without the ECE of its translations: " in capsys.readouterr().err
    assert "inference_ece" not in json.loads((run.folder / "1/scores.json").read_text())
    words = ("calibration", "forced", data, "--path", run.path(), "--gen-subset", "valid", "--cpu", "--replicates", 0)
    words = (*words, "--json", folder / "valid.json", "--tokens", folder / "tokens.tsv")
    assert cli.main([str(word) for word in words]) == 0
    assert "[en]" not in (folder / "tokens.tsv").read_text()
    found = values(folder / "valid.json")
    logged = run.result.logs("valid")[-1]
    assert found["nll"] == pytest.approx(logged["nll_loss"], abs=0.0011)
    assert found["ece"] == pytest.approx(logged["ece"], abs=1e-4)
    given = ("--lang-pair", "de-en")
    capsys.readouterr()
    assert cli.main([str(word) for word in (*scoring, "--checkpoint", "last", *given)]) == 1
    assert "is no model of several language pairs; drop it" in capsys.readouterr().err

    ctranslate2 = pytest.importorskip("ctranslate2")
    words = ("export", run.path(), folder / "exported.pt", "--ctranslate2", folder / "ct2", "--no-comparison")
    assert cli.main([str(word) for word in words]) == 0
    translator = ctranslate2.Translator(str(folder / "ct2"), device="cpu", intra_threads=1)
    sources = [[*line.removesuffix(" [de]").split(), "</s>", "[de]"] for line in generated.sources()]
    prefixes = [["[en]"]] * len(sources)
    found = translator.translate_batch(sources, prefixes, beam_size=2, max_decoding_length=12, end_token="[en]")
    translations = [[token for token in one.hypotheses[0] if token != "</s>"] for one in found]
    assert [" ".join(tokens) for tokens in translations] == generated.hypotheses()


def generate(data: Path, path: Path, longest: int) -> cl.Result:
    return cl.fairseq(
        *("generate", data, *cl.USER_DIR, *TASK, "--source-lang", "de", "--target-lang", "en", "--cpu"),
        *("--path", path, "--gen-subset", "test", "--beam", 2, "--max-len-b", longest),
    )


def test_frequencies_of_targets(data: Path):
    """The unigram teacher does not count language tokens, which are never learned from the teacher."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    given = (*cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *cl.USER_DIR, *TASK, "--criterion", "hard_gate_kd")
    words = (data, *given, "--source-lang", "de", "--target-lang", "en", "--teacher-source", "unigram")
    args = options.parse_args_and_arch(options.get_training_parser(), [str(one) for one in words])
    task = tasks.setup_task(convert_namespace_to_omegaconf(args).task)
    task.load_dataset("train", combine=True)
    targets = [task.dataset("train")[index]["target"] for index in range(600)]
    english = task.target_dictionary.index("[en]")
    assert all(target[-1] == english for target in targets)
    counts = torch.bincount(torch.cat([target[:-1] for target in targets]), minlength=len(task.target_dictionary))
    counts = counts.clamp(min=1).double()
    torch.testing.assert_close(task.load_teacher().logprobs, (counts / counts.sum()).log().float(), rtol=0, atol=0)


def test_training(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """A teacher trained by the task teaches a student of the same task; a student of another task, or of other
    languages, is refused."""
    usual = (*cl.USER_DIR, *TASK, "--criterion", "hard_gate_kd")
    first = cl.train(data, tmp_path / "teacher", *usual, "--gate", "none", "--max-epoch", 12, *cl.BEST_BLEU)
    taught = (*usual, "--teacher-path", first.path(), "--max-update", 1, "--gate", "always", "--teacher-temperature", 1)
    again = ("--restore-file", first.path(), "--reset-optimizer", "--dropout", 0, "--attention-dropout", 0)
    student, generated, cut = cl.together(
        lambda: cl.train(data, tmp_path / "student", *taught, *again, *cl.KEEP_LAST),
        lambda: generate(data, first.path(), 12),
        lambda: generate(data, first.path(), 7),
    )
    # The student starts with the weights of its teacher, so that their KL is near 0 in the first update.
    assert student.result.logs("train")[0]["kd_loss"] < 1e-3
    assert "bleu" in first.result.logs("valid")[-1]
    assert len(generated.hypotheses()) == 64, generated.end()
    lengths = [len(line.split()) for line in generated.hypotheses()]
    assert sum(lengths) / len(lengths) < 11  # translations end before the limit
    check_commands(first, data, generated, cut, tmp_path, capsys)

    dictionary = Dictionary.load(str(data / "dict.en.txt"))
    both = ([str(first.path())], dictionary, dictionary)
    with pytest.raises(UserError, match="they need the same language tokens"):
        LiveTeacher(*both, languages=("de", "en"))
    added = inputs.added({"_name": TASK[1], "source_lang": "de", "target_lang": "en"})
    assert len(LiveTeacher(*both, languages=("de", "en"), added=added).models) == 1
    dictionary.add_symbol("[it]")
    with pytest.raises(UserError, match=r"'\[it\]', is none of the teacher's"):
        LiveTeacher(*both, languages=("de", "en"), added=added)
