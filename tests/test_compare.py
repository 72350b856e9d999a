"""Tests of hgkd compare: what it refuses before anything is translated, and its references. test_export.py tests what
it measures."""

import csv
from pathlib import Path

import command_line as cl
import pytest

from hgkd_fairseq import cli
from hgkd_fairseq.evaluation import compare, forced


@pytest.mark.parametrize(
    ("models", "options", "expected"),
    [
        (["{tmp}/folder"], [], "name at least one fairseq checkpoint beside the CTranslate2 folders"),
        (["{tmp}/none.pt"], [], "none.pt does not exist; name a fairseq checkpoint"),
        (["{model}", "{tmp}/folder"], [], "folder is no model of CTranslate2 ("),
        (["{model}"], ["--gen-subset", "dev"], "there is no subset dev in "),
        (["{model}"], ["--reference", "{tmp}/none.en"], "none.en does not exist; name a text file"),
        (["{model}"], ["--reference", "{tmp}/two.en"], "two.en has 2 lines and subset test 64 sentences"),
    ],
)
def test_refused(models, options, expected, data, plain: cl.Run, tmp_path, capsys, monkeypatch):
    if "CTranslate2 (" in expected:
        pytest.importorskip("ctranslate2")
    (tmp_path / "folder").mkdir()
    (tmp_path / "two.en").write_text("one\ntwo\n")
    monkeypatch.setattr(compare, "translate_all", lambda *_: pytest.fail("translated"))
    known = {"tmp": tmp_path, "model": plain.path("checkpoint_best.pt")}
    arguments = [word.format(**known) for word in [*models, *options]]
    assert cli.main(["compare", str(data), *arguments, "--cpu"]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("hgkd: error: "))
    assert expected in line


@pytest.fixture(scope="module")
def unknown_words(data: Path, tmp_path_factory) -> tuple[Path, list[str]]:
    """Return a test set whose references have words that the dictionary lacks, and the references as fairseq writes
    them."""
    folder = tmp_path_factory.mktemp("unknown")
    targets = ["t1 never t2", "seen t3", "t4 t5 before", "t6 t7 t8"] * 2
    (folder / "test.de").write_text("w1 w2 w3\n" * len(targets))
    (folder / "test.en").write_text("".join(f"{line}\n" for line in targets))
    languages = (
        "--source-lang",
        "de",
        "--target-lang",
        "en",
        "--testpref",
        folder / "test",
        "--destdir",
        folder / "bin",
    )
    known = ("--srcdict", data / "dict.de.txt", "--tgtdict", data / "dict.en.txt")
    result = cl.fairseq("preprocess", *languages, *known)
    assert result.code == 0, result.end()
    escaped = [" ".join(word if word[0] == "t" else "<<unk>>" for word in line.split()) for line in targets]
    return folder / "bin", escaped


def test_unknown_words_of_references(unknown_words, plain: cl.Run, tmp_path):
    """References are escaped as by fairseq-generate, so that <unk> in a translation matches no unknown word."""
    folder, expected = unknown_words
    checkpoint = str(plain.path("checkpoint_best.pt"))
    model = compare.FairseqModel(checkpoint, str(folder), compare.Search(), cpu=True)
    batches = [
        compare.make_batch(model, sample, compare.Search())
        for sample in forced.batches(model.task, model.models, "test", 4000)
    ]
    found = {
        index: " ".join(reference)
        for batch in batches
        for index, reference in zip(batch.sample["id"].tolist(), batch.references, strict=True)
    }
    assert [found[index] for index in range(len(expected))] == expected
    # The table of tokens has the same words and the end of each sentence.
    forced.evaluate(str(folder), checkpoint, cpu=True, tokens_file=str(tmp_path / "tokens.tsv"))
    with (tmp_path / "tokens.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    tokens = [" ".join(row["token"] for row in rows if int(row["sentence"]) == index) for index in range(len(expected))]
    assert tokens == [f"{line} </s>" for line in expected]
    options = ("--path", checkpoint, "--cpu", "--required-batch-size-multiple", 1)
    generated = cl.fairseq("generate", folder, *cl.USER_DIR, *options)
    lines = dict(line.split("\t") for line in generated.output.splitlines() if line.startswith("T-"))
    assert [lines[f"T-{index}"] for index in range(len(expected))] == expected
