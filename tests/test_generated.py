"""Reading what fairseq-generate wrote, and joining its pieces to words."""

import io

import pytest
import sentencepiece
from fairseq.data.data_utils import post_process

from hgkd_fairseq import generated
from hgkd_fairseq.errors import UserError

SENTENCES = [
    "Ein Mann, der einen grünen Hut trägt, schaut dorthin.",
    "Zwei Hunde spielen (im Schnee) – und ein dritter sieht zu!",
    "Er sagte: „Das ist's.“",
    "3,5 km bis Köln",
]


def pieces() -> list[str]:
    """The sentences as sentencepiece cuts them: into so few pieces that words and marks stand apart."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20), model_writer=model, vocab_size=62, character_coverage=1.0, minloglevel=2
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [" ".join(processor.encode(sentence, out_type=str)) for sentence in SENTENCES]


def test_sentencepiece_is_undone():
    """As fairseq does it with --remove-bpe sentencepiece."""
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
        (["a dog", "e-mail @ home"], ["a dog", "e-mail @ home"]),  # in words already
        (["▁a ▁<unk> ▁b", ""], ["a <unk> b", ""]),
    ],
)
def test_texts(lines: list[str], expected: list[str]):
    assert list(generated.texts(dict(enumerate(lines))).values()) == expected


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
    """The best hypothesis, and where --bpe and --tokenizer made text of it that text, as they made it of T-."""
    file = tmp_path / "generate-test.txt"
    file.write_text(OUTPUT)
    lines = generated.read_lines(file)
    assert lines["T"] == {0: "ja", 1: "ein Satz ."}
    assert lines["P"] == {1: "-1 -1 -1 -1 -1"}
    assert generated.translations(lines) == {0: "Ja", 1: "Der Satz."}
    file.write_text("".join(line for line in OUTPUT.splitlines(keepends=True) if not line.startswith("D-")))
    assert generated.translations(generated.read_lines(file)) == {0: "ja", 1: "der Satz ."}


def test_references_end_with_their_lines(tmp_path):
    """Whatever wrote them; not at a separator of Unicode's, which str.splitlines() would take for an end."""
    (tmp_path / "test.en").write_text("one\u2028still one\r\ntwo\n\n", encoding="utf-8", newline="")
    assert generated.read_references(tmp_path / "test.en") == ["one\u2028still one", "two", ""]


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
