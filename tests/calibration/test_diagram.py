"""Diagrams: what is drawn, and that files which cannot be drawn are refused."""

import json
import sys

import pytest
from matplotlib.figure import Figure

from hgkd_fairseq.calibration import diagram
from hgkd_fairseq.errors import UserError

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


def test_names(files):
    assert diagram.default_names(files) == ["base/forced", "student/forced"]
    assert diagram.default_names(["a/base.json", "a/student.json"]) == ["base", "student"]


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
