"""Tests of reading the output of fairseq-generate and of joining its subword pieces to words."""

import io

import pytest
import sentencepiece
from fairseq.data import Dictionary
from fairseq.data.data_utils import post_process
from sacrebleu.metrics import BLEU

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import generated, inference

SENTENCES = [
    "Ein Mann, der einen grünen Hut trägt, schaut dorthin.",
    "Zwei Hunde spielen (im Schnee) – und ein dritter sieht zu!",
    "Er sagte: „Das ist's.“",
    "3,5 km bis Köln",
]


def pieces() -> list[str]:
    """Return the sentences in the pieces of a sentencepiece model so small that some marks are pieces of their own."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, vocab_size=62, character_coverage=1.0, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [" ".join(processor.encode(sentence, out_type=str)) for sentence in SENTENCES]


def test_sentencepiece_is_undone():
    """Pieces of sentencepiece are joined as by fairseq's --remove-bpe sentencepiece."""
    lines = pieces()
    assert any("▁ " in line for line in lines)  # a mark that is a piece of its own
    found = generated.texts(dict(enumerate(lines)))
    assert [found[index] for index in range(4)] == SENTENCES
    assert [post_process(line, "sentencepiece") for line in lines] == SENTENCES


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a d@@ o@@ g .", "no marks here"], ["a dog .", "no marks here"]),
        (["▁a ▁d og", "▁no"], ["a dog", "no"]),
        (["og ▁a"], ["og a"]),  # a sentence that begins within a word
        (["a dog", "e-mail @ home"], ["a dog", "e-mail @ home"]),  # words, not pieces
        (["▁a ▁<unk> ▁b", ""], ["a <unk> b", ""]),
        (
            ["a dog", "press ▁ twice", "a cat"],
            ["a dog", "press ▁ twice", "a cat"],
        ),  # a mark that is part of the text
        (["a d@@ og", "press ▁ ▁ ▁", "a cat"], ["a dog", "press ▁ ▁ ▁", "a cat"]),
        (["▁a ▁d og", "og", "▁a"], ["a dog", "og", "a"]),
    ],
)
def test_texts(lines: list[str], expected: list[str]):
    assert list(generated.texts(dict(enumerate(lines))).values()) == expected


@pytest.mark.parametrize(
    ("symbol", "lines"),
    [
        ("sentencepiece", ["▁one▁of▁the ▁big ▁d og s▁ and▁a", "▁the▁end ▁", "Ein▁ Satz▁ ."]),
        ("subword_nmt", ["a d@@ o@@ g .", "@@ a@@@@ b", "x@@"]),
        ("sentencepiece", ["▁E-mail@@ ▁a <unk> <<unk>>", "▁b"]),  # one word ends as a piece of subword_nmt would
    ],
)
def test_texts_are_fairseqs(symbol: str, lines: list[str]):
    """A mark is a blank wherever it is in a piece: sentencepiece without split_by_whitespace makes such pieces."""
    expected = [post_process(line, symbol) for line in lines]
    assert list(generated.texts(dict(enumerate(lines))).values()) == expected
    assert BLEU().corpus_score(generated.joined([line.split() for line in lines]), [expected]).score == pytest.approx(
        100
    )


def test_references_made_of_ids():
    """Unknown words are escaped as fairseq escapes them, so that no translation can match them."""
    dictionary = Dictionary()
    for word in ("a", "b", "c"):
        dictionary.add_symbol(word)
    ids = [dictionary.index(word) for word in ("a", "never seen", "b")] + [dictionary.eos(), dictionary.pad()]
    expected = dictionary.string(ids[:-1], escape_unk=True)
    assert " ".join(generated.reference(dictionary, ids)) == expected == "a <<unk>> b"


OUTPUT = """\
2026-01-31 12:00:00 | INFO | fairseq_cli.generate | {}
S-1\tx
T-1\tein Satz .
H-1\t-0.5\tder Sa@@ tz .
D-1\t-0.5\tDer Satz.
P-1\t-1 -1 -1 -1 -1
H-1\t-0.7\tdie zweite Hypothese
D-1\t-0.7\tDie zweite Hypothese
T-0\tja
H-0\t-0.1\tja
D-0\t-0.1\tJa
"""


def test_lines(tmp_path):
    """The first hypothesis of a sentence is taken, from the D- lines (detokenised text) if there are any, else H-."""
    file = tmp_path / "generate-test.txt"
    file.write_text(OUTPUT)
    lines = generated.read_lines(file)
    assert lines["T"] == {0: "ja", 1: "ein Satz ."}
    assert lines["P"] == {1: "-1 -1 -1 -1 -1"}
    assert generated.translations(lines) == {0: "Ja", 1: "Der Satz."}
    file.write_text("".join(line for line in OUTPUT.splitlines(keepends=True) if not line.startswith("D-")))
    assert generated.translations(generated.read_lines(file)) == {0: "ja", 1: "der Satz ."}


def test_references_end_with_their_lines(tmp_path):
    """Only LF and CRLF end a reference, not Unicode separators, at which str.splitlines() splits, nor a carriage return
    within a line."""
    text = "one\u2028still one\r\ntwo\n\na\rlone\x0creturn\x85\n"
    (tmp_path / "test.en").write_text(text, encoding="utf-8", newline="")
    expected = ["one\u2028still one", "two", "", "a\rlone\x0creturn\x85"]
    assert generated.read_references(tmp_path / "test.en") == expected


WHOLE = "".join(f"S-{i}\tx\nT-{i}\ta b\nH-{i}\t-0.5\ta b\nD-{i}\t-0.5\ta b\nP-{i}\t-1 -1 -1\n" for i in range(4))
TASK = "2026-01-31 12:00:00 | INFO | fairseq.tasks.translation | data test de-en {} examples\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (WHOLE, None),
        (TASK.format(4) + WHOLE, None),
        (WHOLE.replace("D-", "X-"), None),
        (WHOLE.replace("H-2", "X-2").replace("D-2", "X-2"), "3 translations of 4 sentences .first one missing: 2"),
        (WHOLE.replace("H-3", "X-3"), "3 translations of 4 sentences .first one missing: 3"),
        (WHOLE.replace("D-1", "X-1"), "3 translations of 4 sentences .first one missing: 1"),
        (TASK.format(6) + WHOLE, "4 translations of 6 sentences .first one missing: 4"),
        (WHOLE + WHOLE, "holds S-0 twice, as of two runs; keep the lines of one"),
        (WHOLE.replace("S-", "X-") * 2, "holds T-0 twice"),
        (WHOLE + f"H-{'9' * 5000}\t-1\tx\n", "sentence with the number 999999999999..., which is of no subset"),
        (WHOLE.replace("H-2\t-0.5\ta b\n", "H-2\t-0.5\n"), "H-2 has no score and no translation"),
    ],
)
def test_one_rule_for_all_commands(output: str, expected: str | None, tmp_path):
    """Every reader refuses an output in which sentences are missing, repeated or malformed."""
    file = tmp_path / "generate-test.txt"
    file.write_text(output)
    for read in (generated.read_lines, lambda file: inference.read(str(file)), generated.read_texts):
        if expected is None:
            read(file)
        else:
            with pytest.raises(UserError, match=expected):
                read(file)


def test_refusals(tmp_path):
    (tmp_path / "binary").write_bytes(b"H-0\t\xff\xfe")
    (tmp_path / "empty").write_text("T-0\tx\n")
    for read, file, expected in (
        (generated.read_lines, "gone", "gone does not exist; name what fairseq-generate wrote"),
        (generated.read_lines, "binary", "binary is no text"),
        (generated.read_lines, "empty", "empty holds no translations"),
        (generated.read_references, "gone", "gone does not exist; name a text file with a reference a line"),
        (generated.read_references, "binary", "binary is no text"),
    ):
        with pytest.raises(UserError, match=expected):
            read(tmp_path / file)
