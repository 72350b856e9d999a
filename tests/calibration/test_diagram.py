"""Diagrams: what is drawn, and that files which cannot be drawn are refused."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.report import diagram
from hgkd_fairseq.report.names import short_names

# 4 bins: one empty, one with fewer tokens than FEW.
BARS = {
    "count": [20, 0, 4, 40],
    "confidence": [4.0, 0, 2.5, 36.0],
    "correct": [5.0, 0, 1.0, 30.0],
    "low": [0.1, 0.0, 0.3, 0.6],
    "high": [0.4, 1.0, 0.6, 0.9],
}
RESULT = {
    "mode": "forced",
    "bins": 4,
    "ece": 0.1234,
    "ece_without_eos": 0.2,
    "histograms": {"eos:yes": BARS, "eos:no": {**BARS, "count": [20, 0, 5, 40]}},
}


@pytest.fixture
def files(tmp_path) -> list[str]:
    found = []
    for name in ("base", "student"):
        (tmp_path / name).mkdir()
        file = tmp_path / name / "forced.json"
        file.write_text(json.dumps(RESULT))
        found.append(str(file))
    return found


def test_points_and_intervals():
    axes = Figure().subplots()
    (line,) = diagram.reliability(axes, [RESULT], ["Base"], "eos:yes")
    assert line.get_xdata() == pytest.approx([0.2, 0.625, 0.9])
    assert line.get_ydata() == pytest.approx([0.25, 0.25, 0.75])
    assert line.get_label() == "Base: ECE 12.34 %, 64 tokens"
    (hollow,) = [row for row in axes.lines if row.get_markerfacecolor() == "white"]
    assert list(hollow.get_xdata()) == pytest.approx([0.625])
    # The second accuracy lies below its interval, which then starts at the accuracy.
    ends = [[end[1] for end in segment] for segment in axes.collections[0].get_segments()]
    assert ends == [pytest.approx([0.1, 0.4]), pytest.approx([0.25, 0.6]), pytest.approx([0.6, 0.9])]


def test_models_differ_without_colour():
    axes = Figure().subplots()
    lines = diagram.reliability(axes, [RESULT] * diagram.MOST, list("abcdef"), "eos:yes")
    assert len({line.get_marker() for line in lines}) == diagram.MOST
    bars = diagram.confidences(axes, [RESULT] * diagram.MOST, "eos:no")
    assert len({bar.get_hatch() for bar in bars}) == diagram.MOST
    assert [patch.get_height() for patch in axes.patches[:4]] == [20, 0, 5, 40]


@pytest.mark.parametrize(("suffix", "magic"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
def test_files(files, tmp_path, suffix: str, magic: bytes):
    for number in (1, 2):
        output = tmp_path / f"diagram{number}{suffix}"
        diagram.draw(files[:number], str(output))
        assert output.read_bytes().startswith(magic)
        assert output.stat().st_size > 10000


def test_names(files, tmp_path):
    assert short_names([Path(file) for file in files]) == ["base/forced", "student/forced"]
    assert short_names([Path(files[0])]) == ["forced"]
    # Scores of a language pair, and of one checkpoint of it.
    folders = [tmp_path / run / "de-en" / "last" for run in ("base", "student-1.2")]
    assert short_names(folders) == ["base/de-en/last", "student-1.2/de-en/last"]
    assert short_names([folders[1], folders[1].parent / "best"]) == ["last", "best"]


def test_refusals(files, tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "text.json").write_text("text")
    (tmp_path / "ten.json").write_text(json.dumps({**RESULT, "bins": 10}))
    output = str(tmp_path / "x.png")
    for arguments, expected in [
        (([str(tmp_path / "gone.json")], output), "gone.json does not exist"),
        (([str(tmp_path / "other.json")], output), "is no file of"),
        (([str(tmp_path / "text.json")], output), "is no file of"),
        (([files[0], str(tmp_path / "ten.json")], output), "4 and 10 bins; score them with one --bins"),
        ((files, str(tmp_path / "x.gif")), "ends in .png or .svg"),
        ((files, output, ["one"]), "1 times --label for 2 files"),
        ((files * 4, output), "at most 6"),
    ]:
        with pytest.raises(UserError, match=expected):
            diagram.draw(*arguments)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"need matplotlib: pip install 'hgkd-fairseq\[report\]'"):
        diagram.draw(files, output)


def test_labels_are_shown_as_they_are(files, tmp_path):
    """matplotlib would take $ for mathematics, and leave out what begins with _; a name may hold anything."""
    diagram.draw(files, str(tmp_path / "x.svg"), ["a $x_{$ b", "_c\x1b[2J\udcff"])
    drawn = (tmp_path / "x.svg").read_text()  # matplotlib writes a text of its figures as a comment too
    assert "<!-- a $x_{$ b: ECE 12.34 %, 64 tokens -->" in drawn
    assert "<!-- _c\\x1b[2J\\udcff: ECE 12.34 %, 64 tokens -->" in drawn


def test_of_no_tokens(tmp_path):
    """A model that translates into nothing has no ECE without the end of sentence."""
    nothing = {"count": [0, 0], "confidence": [0, 0], "correct": [0, 0]}
    result = {**RESULT, "bins": 2, "ece_without_eos": None, "histograms": {"eos:yes": nothing, "eos:no": nothing}}
    (tmp_path / "x.json").write_text(json.dumps(result))
    diagram.draw([str(tmp_path / "x.json")], str(tmp_path / "x.svg"), None, "eos:no")
    assert "<!-- x: no ECE, 0 tokens -->" in (tmp_path / "x.svg").read_text()


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"mode": None}, "mode is not text"),
        ({"bins": 0}, "bins is not from 1 to"),
        ({"bins": 3}, "a list of histograms has not 3 numbers"),
        ({"ece": "0.1"}, "ece is not a number"),
        ({"ece": float("nan")}, "NaN is no number of JSON"),
        ({"histograms": {"eos:yes": BARS}}, "histograms lacks 'eos:no'"),
        (
            {"histograms": {"eos:yes": BARS, "eos:no": {**BARS, "count": [-1, 0, 1, 2]}}},
            r"eos:no.count\[0\] is not from 0",
        ),
        ({"histograms": {"eos:yes": BARS, "eos:no": {**BARS, "low": [None] * 4}}}, r"eos:no.low\[0\] is not a number"),
        ({"histograms": {"eos:yes": BARS, "eos:no": {**BARS, "correct": [1e300] * 4}}}, r"correct\[0\] is not from 0"),
    ],
)
def test_a_file_of_results_is_checked(changed, expected, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({**RESULT, **changed}))
    with pytest.raises(UserError, match=rf"x\.json is no file of .*{expected}"):
        diagram.draw([str(tmp_path / "x.json")], str(tmp_path / "x.svg"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
