"""Reading what fairseq-generate writes, and the scores of it, on sentences that can be checked by hand."""

import itertools
import math
import sys
from pathlib import Path

import pytest

from hgkd_fairseq.calibration.pieces import join, mark, words
from hgkd_fairseq.calibration.scores import Settings
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation.inference import Labelling, evaluate, read

# Two sentences, out of order, between what else stands in such a file. Of sentence 1 there are two translations.
OUTPUT = """2026-01-01 | INFO | fairseq_cli.generate | loading model(s)
S-1\t▁ein ▁H und
T-1\t▁a ▁big ▁d og
H-1\t-0.5\t▁a ▁d og
D-1\t-0.5\t▁a ▁d og
P-1\t-1.0000 -2.0000 -0.0000 -1.0000
H-1\t-0.9\t▁the ▁d og
D-1\t-0.9\t▁the ▁d og
P-1\t-3.0000 -3.0000 -3.0000 -3.0000
S-0\t▁ja
T-0\t▁yes
H-0\t-0.1\t▁yes
D-0\t-0.1\t▁yes
P-0\t-1.0000 0.0001
Generate test with beam=5: BLEU4 = 12.3
"""


def written(folder: Path, text: str = OUTPUT) -> str:
    file = folder / "generate-test.txt"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_read(tmp_path):
    first, second = read(written(tmp_path))
    assert first == (0, ["▁yes"], [-1.0, 0.0], ["▁yes"])
    assert second == (1, ["▁a", "▁d", "og"], [-1.0, -2.0, -0.0, -1.0], ["▁a", "▁big", "▁d", "og"])


def test_read_keeps_white_space_that_is_no_blank(tmp_path):
    """A no-break space and a line separator are pieces like any other."""
    text = "T-0\ta \u00a0 \u2028 b\nH-0\t-1\ta \u00a0 \u2028 b\nP-0\t-1 -1 -1 -1 -1\n"
    (row,) = read(written(tmp_path, text))
    assert row.tokens == row.reference == ["a", "\u00a0", "\u2028", "b"]


def test_read_empty_translation(tmp_path):
    (row,) = read(written(tmp_path, "T-0\ta\nH-0\t-1\t\nP-0\t-1.5\n"))
    assert (row.tokens, row.logprobs) == ([], [-1.5])


def test_scores_by_hand(tmp_path):
    """Tokens: yes 1/2 right, its end 1 right; a 1/2 right, d 1/4 after the deletion of "big", og 1 right, end 1/2
    right. In 4 bins: (0, 1/4] 1/4 - 0, (1/4, 1/2] 3/2 - 3, (3/4, 1] 2 - 2."""
    found = evaluate(written(tmp_path), settings=Settings(bins=4))
    assert found["ece"].value == pytest.approx((0.25 + 1.5) / 6)
    assert found["ece"].signature == "ECE|bins:4|mode:inference|align:wang2020|eos:yes|tok:bpe|version:0.1.0"
    assert found["accuracy"].value == pytest.approx(5 / 6)
    assert found["ece_without_eos"].value == pytest.approx((0.25 + 1.0) / 4)
    assert found["brier_top1"].value == pytest.approx((0.25 + 0 + 0.25 + 0.0625 + 0 + 0.25) / 6)
    assert (found.about["tokens"], found.about["sentences"]) == (6, 2)
    plain = evaluate(written(tmp_path), options=Labelling(labels="ter"), settings=Settings(bins=4))
    assert plain["ece"].value == pytest.approx((0.75 + 1.5) / 6)
    assert "|align:ter|" in plain["ece"].signature


def test_words_by_hand(tmp_path):
    """Words: yes 1/2, a 1/2, dog 1/4 * 1 after the deletion of "big"."""
    found = evaluate(written(tmp_path), options=Labelling(words=True), settings=Settings(bins=4))
    assert found["ece_without_eos"].value == pytest.approx((0.25 + 1.0) / 3)
    assert "|eos:no|tok:word|" in found["ece_without_eos"].signature


def test_words_of_pieces_that_span_words(tmp_path):
    spanning = OUTPUT.replace("▁a ▁d og", "▁a▁d og x").replace("▁a ▁big", "▁a▁big")
    assert evaluate(written(tmp_path, spanning))["ece"].value > 0
    with pytest.raises(UserError, match="the piece ▁a▁d spans words, which have no probability of their own"):
        evaluate(written(tmp_path, spanning), options=Labelling(words=True))


def test_sentences_by_hand(tmp_path):
    """Sentence 0: probability 1/2, mean per token 2^-1/2, is the reference. Sentence 1: 2^-4, 2^-1, is not."""
    found = evaluate(written(tmp_path), settings=Settings(bins=4))
    exact = found["ece_sentence_product_exact"]
    assert exact.value == pytest.approx((0.5 + 2**-4) / 2)
    assert exact.signature == "ECE|bins:4|mode:inference|unit:sentence|conf:product|right:exact|version:0.1.0"
    assert found["ece_sentence_geomean_exact"].value == pytest.approx(((1 - 2**-0.5) + 0.5) / 2)
    # Both metrics give the reference itself 100, so the first sentence's error is the same.
    assert found["ece_sentence_product_chrf"].value > 0.25


def test_sentences_without_blanks(tmp_path):
    """In Chinese, by the tokenizer that is asked for: 13a takes a sentence for one word."""
    pairs = [
        ("▁猫 坐 在 垫 子", "▁猫 坐 在 垫 子 上", -1),
        ("▁鸟 站 在 树 里", "▁鸟 站 在 树 枝", -2),
        ("▁它", "▁他", -3),
    ]
    output = "".join(
        f"T-{i}\t{theirs}\nH-{i}\t-1\t{ours}\nP-{i}\t{' '.join([str(bits)] * (1 + len(ours.split())))}\n"
        for i, (ours, theirs, bits) in enumerate(pairs)
    )
    found = {how: evaluate(written(tmp_path, output), options=Labelling(tokenize=how)) for how in ("13a", "zh", "char")}
    assert math.isnan(found["13a"]["spearman_mean_bleu"].value)  # all 0
    assert found["zh"]["spearman_mean_bleu"].value == found["char"]["spearman_mean_bleu"].value == 1
    for how, scores in found.items():
        tok = "" if how == "13a" else f"|tok:{how}"
        assert f"|right:bleu{tok}|version:" in scores["ece_sentence_geomean_bleu"].signature
        assert f"|quality:bleu{tok}|version:" in scores["spearman_mean_bleu"].signature
        assert "tok:" not in scores["spearman_mean_chrf"].signature
        assert "|tok:bpe|" in scores["ece"].signature


def test_references_from_a_file(tmp_path):
    (tmp_path / "test.bpe.en").write_text("▁yes\n▁a ▁d og\n", encoding="utf-8")
    decoded = OUTPUT.replace("T-1\t▁a ▁big ▁d og", "T-1\ta big dog").replace("T-0\t▁yes", "T-0\tyes")
    found = evaluate(written(tmp_path, decoded), str(tmp_path / "test.bpe.en"))
    assert found["accuracy"].value == 1


def test_table_of_tokens(tmp_path):
    evaluate(written(tmp_path), tokens_file=str(tmp_path / "tokens.tsv"))
    assert (tmp_path / "tokens.tsv").read_text(encoding="utf-8").splitlines() == [
        "sentence\ttoken\tconfidence\tcorrect",
        "0\t▁yes\t0.5\t1",
        "0\t</s>\t1.0\t1",
        "1\t▁a\t0.5\t1",
        "1\t▁d\t0.25\t0",
        "1\tog\t1.0\t1",
        "1\t</s>\t0.5\t1",
    ]


def test_table_of_tokens_in_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    evaluate(written(tmp_path), tokens_file=str(tmp_path / "tokens.parquet"))
    table = parquet.read_table(tmp_path / "tokens.parquet")
    assert table.column("token").to_pylist() == ["▁yes", "</s>", "▁a", "▁d", "og", "</s>"]
    assert table.column("confidence").to_pylist() == [0.5, 1.0, 0.5, 0.25, 1.0, 0.5]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install pyarrow, or name a \.tsv file"):
        evaluate(written(tmp_path), tokens_file=str(tmp_path / "tokens.parquet"))
    with pytest.raises(UserError, match=r"ends in \.tsv or \.parquet"):
        evaluate(written(tmp_path), tokens_file=str(tmp_path / "tokens.csv"))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("H-", "X-"), "holds no translations"),
        (("T-1\t", "X-1\t"), "no line T-1 for its H-1"),
        (("P-0\t", "X-0\t"), "no line P-0 for its H-0"),
        (
            ("H-1\t-0.5\t▁a ▁d og", "H-1\t-0.5\ta dog"),
            "H-1 has 2 tokens and an end of sentence, P-1 4 scores; run fair",
        ),
        # fairseq prints no end of sentence within a hypothesis
        (("H-1\t-0.5\t▁a ▁d og", "H-1\t-0.5\t▁a ▁d"), "goes on after an end of .*without --diverse-beam-groups"),
        (("T-1\t▁a ▁big ▁d og\n", "T-1\ta big dog\n"), ""),  # one reference in pieces will do
        (("-2.0000 -0.0000", "nan -0.0000"), "P-1 holds a score that is NaN or above 0"),
        (("-2.0000 -0.0000", "0.7 -0.0000"), "P-1 holds a score that is NaN or above 0"),
        (("-2.0000 -0.0000", "minus -0.0000"), "P-1 holds something that is no number"),
        ((" ▁big ▁d og\n", "\n", "T-0\t▁yes", "T-0\tyes", "T-1\t▁a", "T-1\ta"), "in pieces \\(▁\\) and the references"),
    ],
)
def test_files_that_do_not_fit(tmp_path, change, expected):
    text = OUTPUT
    for old, new in zip(change[::2], change[1::2], strict=True):
        assert old in text
        text = text.replace(old, new)
    if not expected:
        evaluate(written(tmp_path, text))
        return
    with pytest.raises(UserError, match=expected):
        evaluate(written(tmp_path, text))


@pytest.mark.parametrize(("place", "left"), [("first", [-2.0, 0.0, -1.0]), ("last", [-1.0, -2.0, 0.0])])
def test_a_score_of_a_language_token(tmp_path, place: str, left: list[float]):
    """One score more than tokens and end of sentence. Where "last", a translation that was cut has none."""
    text = OUTPUT.replace("H-1\t-0.5\t▁a ▁d og", "H-1\t-0.5\t▁a ▁d")
    if place == "first":
        text = text.replace("P-0\t-1.0000 0.0001", "P-0\t-9.0000 -1.0000 0.0001")
    first, second = read(written(tmp_path, text), language_token=place)
    assert (first.logprobs, second.logprobs) == ([-1.0, 0.0], left)
    assert second.tokens == ["▁a", "▁d"]
    with pytest.raises(UserError, match=r"language tokens?; drop --language-token"):
        read(written(tmp_path), language_token=place)


def test_files_that_are_no_output(tmp_path):
    (tmp_path / "binary").write_bytes(b"H-0\xff\xfe")
    (tmp_path / "one.txt").write_text("▁yes\n")
    for file, reference, expected in (
        (tmp_path / "gone", None, "gone does not exist"),
        (tmp_path / "binary", None, "is no text"),
        (written(tmp_path), tmp_path / "one.txt", "has 1 lines for 2 translations"),
    ):
        with pytest.raises(UserError, match=expected):
            evaluate(str(file), reference and str(reference))


def test_the_mark_that_most_pieces_bear():
    """Other pieces may hold the other one's sign."""
    assert mark([["▁a", "b@@"], ["c@@"]]) == "@@"
    assert mark([["a@@"], ["▁b", "▁c"]]) == "▁"
    assert mark([["▁a", "▁b", "▁c"], ["a@@"] * 5]) == "@@"


@pytest.mark.parametrize(
    ("tokens", "expected_mark", "expected_words"),
    [
        ("▁of▁the ▁d og", "▁", ["of the", "dog"]),  # a piece that spans words
        ("Ein▁ S atz▁ .", "▁", ["Ein", "Satz", "."]),  # sentencepiece's treat_whitespace_as_suffix
        ("▁ og", "▁", ["og"]),
        ("▁a ▁d og", "▁", ["a", "dog"]),
        ("og ▁a", "▁", ["og", "a"]),  # a sentence that begins within a word
        ("a d@@ o@@ g .", "@@", ["a", "dog", "."]),
        ("a dog", "", ["a", "dog"]),
        ("", "", []),
    ],
)
def test_pieces(tokens: str, expected_mark: str, expected_words: list[str]):
    assert mark([[], tokens.split()]) == expected_mark
    assert join(tokens.split(), expected_mark) == expected_words
    grouped = words(tokens.split(), expected_mark)
    assert list(itertools.chain(*grouped)) == list(range(len(tokens.split())))
