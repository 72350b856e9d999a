"""`hgkd report` on runs that fairseq made: its tables, its page, and the folders it refuses."""

import html
import html.parser
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import command_line as cl
import pytest
import torch
from sacrebleu.metrics import BLEU, CHRF, TER

from hgkd_fairseq import cli
from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import inference
from hgkd_fairseq.report import page, runs, tables


@pytest.fixture(scope="module")
def folders(data, teacher, student, tmp_path_factory) -> list[Path]:
    """Two finished runs, with all that can be measured of them."""
    home = tmp_path_factory.mktemp("runs")
    found = {"base": teacher, "<b>student": student}  # a name that HTML would take for its own
    for name, run in found.items():
        (home / name).mkdir()
        for checkpoint in ("checkpoint_best.pt", "checkpoint_last.pt"):
            (home / name / checkpoint).symlink_to(run.path(checkpoint))
        (home / name / "train.log").write_text(run.result.output)

    folders = [home / name for name in found]
    options = ("--cpu", "--generate=--beam 2 --max-len-b 12")
    assert cli.main(["score", str(data), *map(str, folders), *options]) == 0
    return folders


@pytest.fixture(scope="module")
def written(folders, tmp_path_factory) -> str:
    """The page."""
    output = tmp_path_factory.mktemp("page") / "report.html"
    assert cli.main(["report", *map(str, folders), "--output", str(output)]) == 0
    return output.read_text()


@pytest.fixture(scope="module")
def found(folders) -> tables.Report:
    return tables.measure(runs.read_all(folders))


def texts(folder: Path) -> tuple[list[str], list[str]]:
    """(translations, references) straight from the lines; this corpus is in words."""
    output = (folder / "generate-test.txt").read_text()
    lines = [dict(re.findall(rf"^{letter}-(\d+)\t(.*)$", output, flags=re.MULTILINE)) for letter in "DT"]
    hypotheses, references = ([by_index[str(index)] for index in range(64)] for by_index in lines)
    return [line.split("\t")[1] for line in hypotheses], references


def test_scores_of_texts_are_sacrebleus(folders, found):
    for folder, row in zip(folders, found.quality.rows, strict=True):
        translations, references = texts(folder)
        for cell, metric in zip(row[1:4], (BLEU(), CHRF(), TER()), strict=True):
            assert cell.text == f"{metric.corpus_score(translations, [references]).score:.1f}"
            assert re.fullmatch(r"± \d+\.\d", cell.interval)
    assert found.quality.notes[0].startswith("BLEU: `nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|")


def test_costs_are_those_of_the_checkpoints(folders, found, teacher, student):
    for run, row, folder in zip((teacher, student), found.quality.rows, folders, strict=True):
        best, last = run.state("checkpoint_best.pt"), run.state()
        updates = [state["optimizer_history"][-1]["num_updates"] for state in (last, best)]
        forced = json.loads((folder / "forced.json").read_text())
        assert [cell.text for cell in row[5:]] == [
            f"{forced['parameters']:,}",
            f"{updates[0]:,} ({updates[1]:,})",
            f"{last['extra_state']['previous_training_time'] / 60:.1f}",
        ]
        assert row[4].text == f"{forced['nll']:.3f}"


def test_calibration_is_that_of_the_files(folders, found):
    for folder, row in zip(folders, found.calibration.rows, strict=True):
        assert row[1].text == f"{json.loads((folder / 'temperature.json').read_text())['temperature']:.3f}"
        kinds = [
            (file, key)
            for file in ("forced", "scaled", "inference", "inference_scaled")
            for key in ("ece", "ece_without_eos")
        ]
        for cell, (file, key) in zip(row[2:], kinds, strict=True):
            scores = json.loads((folder / f"{file}.json").read_text())["scores"]
            (score,) = [score for score in scores if score["key"] == key]
            assert cell.text == f"{100 * score['value']:.2f}"
            assert cell.interval == f"[{100 * score['low']:.2f}, {100 * score['high']:.2f}]"


def test_differences(folders, found):
    """Of ECE: by drawing sentences ourselves, another way, from the tokens of both models."""
    translation, calibration = (dict(zip(table.header, table.rows[0], strict=True)) for table in found.differences)
    assert translation["model − base"].text == calibration["model − base"].text == "<b>student"
    first, second = (json.loads((folder / "inference.json").read_text()) for folder in folders)
    cell = calibration["inference"]
    assert cell.text == tables.signed(100 * (second["ece"] - first["ece"]), 2)

    tables_of = [sentence_tables(folder / "generate-test.txt") for folder in folders]
    draws = torch.randint(64, (4000, 64), generator=torch.Generator().manual_seed(5))
    ece = [[CalibrationHistogram(sums=table[draw].sum(0)).ece() for draw in draws] for table in tables_of]
    drawn = torch.tensor(ece[1]) - torch.tensor(ece[0])
    ends = [float(end.replace("−", "-")) / 100 for end in re.findall(r"[−+]?\d+\.\d+", cell.interval)][:2]
    expected = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    assert ends == pytest.approx(expected, abs=0.25 * (expected[1] - expected[0]))
    # A student of six epochs is far from a teacher of thirty, whatever is measured.
    bleu = translation["BLEU"]
    assert bleu.text.startswith("−")
    assert (bleu.p, bleu.significant) == ("p = 0.001", True)
    (of_texts,), (of_errors,) = (table.notes for table in found.differences)
    assert ("counts one tail" in of_texts, "the two-sided p" in of_texts) == (True, False)
    assert ("counts one tail" in of_errors, "the two-sided p" in of_errors) == (False, True)


def sentence_tables(file: Path) -> torch.Tensor:
    """(sentences, 3, bins)"""
    found = []
    for row in inference.read(str(file)):
        histogram = CalibrationHistogram()
        labels = inference.ter_labels(row.tokens, row.reference)
        histogram.update(torch.tensor(row.logprobs).exp2(), torch.tensor(labels))
        found.append(histogram.sums)
    return torch.stack(found)


def test_a_run_does_not_differ_from_itself(folders, tmp_path):
    """Nothing is significant, and no p is small."""
    shutil.copytree(folders[0], tmp_path / "copy", symlinks=True)
    report = tables.measure(runs.read_all([folders[0], tmp_path / "copy"]))
    texts, errors = (table.rows[0][1:] for table in report.differences)
    assert not any(cell.significant for cell in [*texts, *errors])
    for cell in errors:
        assert (cell.text, cell.interval, cell.p) == ("0.00", "[0.00, 0.00]", "p = 1.000")
    assert [(cell.text, cell.p) for cell in texts] == [("0.0", "p = 1.000")] * 3


class Page(html.parser.HTMLParser):
    """Checks that elements are closed in order, and collects what a page refers to."""

    VOID = ("meta", "path", "use", "rect", "img", "link")

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.elements: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "data", "action"):
                self.references.append(value)
            self.references += re.findall(r"url\((.*?)\)", value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it(written):
    parsed = Page(written)
    assert len(set(parsed.ids)) == len(parsed.ids)
    assert {reference.removeprefix("#") for reference in parsed.references} <= set(parsed.ids)
    assert all(reference.startswith("#") for reference in parsed.references)
    assert "@import" not in written
    assert not {"script", "link", "img", "iframe"} & set(parsed.elements)
    assert len(written) < 1_000_000


def test_the_page_holds_all(written, found):
    for table in found.tables():
        for row in table.rows:
            for cell in row:
                assert f"<b>{html.escape(cell.text)}</b>" in written
    figures = re.findall(r'<svg role="img" aria-label="([^"]*)"', written)
    assert [label.split(":")[0] for label in figures[:4]] == 2 * [
        "Reliability diagram of base",
        "Reliability diagram of &lt;b&gt;student",
    ]
    assert [label.split(",")[0] for label in figures[4:]] == [
        "NLL on validation",
        "ECE on validation",
        "BLEU on validation",
        "Teacher&#x27;s share of training tokens",
    ]
    assert "<b>student" not in written.replace("<b>&lt;b&gt;student", "")
    assert ".partial" not in written  # the folder of fairseq-generate, until its files are whole
    commands = re.findall(r"^(fairseq-\w+|hgkd \w+) ", re.sub("<pre>", "\n", written), flags=re.MULTILINE)
    assert commands == 2 * ["fairseq-train", "fairseq-generate", "hgkd score"]
    assert f"torch {metadata.version('torch')}" in written  # whose own __version__ may name a CUDA as well
    options = dict(re.findall(r"<tr><td><code>(.*?)</code></td>(.*?)</tr>", written))
    values = {option: re.findall(r"<div>(.*?)</div>", cells) for option, cells in options.items()}
    assert values["--criterion"] == ["cross_entropy", "hard_gate_kd"]
    assert values["--max-epoch"] == ["30", "6"]
    assert not {"--lr", "--arch", "--save-dir"} & set(values)


def test_curves_are_the_logs(written, found, teacher):
    """The plotted points keep the proportions of the logged numbers."""
    (nll,) = re.findall(r'<svg role="img" aria-label="NLL.*?</svg>', written, flags=re.DOTALL)
    assert "var(--run-1)" in nll
    (drawn,) = re.findall(
        r'<path d="(M [^"]*)"[^>]*style="fill: none; stroke: color-mix[^"]*100%[^"]*stroke-width: 1.1', nll
    )
    points = [tuple(map(float, point)) for point in re.findall(r"[ML] ([\d.]+) ([\d.]+)", drawn)]
    logged = [(row["num_updates"], row.get("nll_loss", row["loss"])) for row in teacher.result.logs("valid")]
    assert len(points) == len(logged)
    for axis in (0, 1):
        drawn_steps = [(point[axis] - points[0][axis]) / (points[-1][axis] - points[0][axis]) for point in points]
        steps = [(value[axis] - logged[0][axis]) / (logged[-1][axis] - logged[0][axis]) for value in logged]
        assert drawn_steps == pytest.approx(steps, abs=1e-3)


def test_what_is_missing_is_said(folders, tmp_path, capsys):
    """Cells stay empty, and a line says what fills them in; nothing else is lost."""
    lean = tmp_path / "lean"
    lean.mkdir()
    for file in ("checkpoint_last.pt", "forced.json", "train.log"):
        (lean / file).symlink_to((folders[0] / file).resolve())
    assert cli.main(["report", str(folders[0]), str(lean), "--output", str(tmp_path / "report.html")]) == 0
    printed = capsys.readouterr().out
    (quality,) = [line for line in printed.splitlines() if line.startswith("| lean |") and "(" not in line][:1]
    assert quality.startswith("| lean |  |  |  | ")
    assert printed.count("No checkpoint_best.pt of lean: `fairseq-train DATA --save-dir RUN") == 1
    for file in ("generate-test.txt", "inference.json", "temperature.json"):
        assert printed.count(f"No {file} of lean: `hgkd score DATA RUN`") == 1
    assert "of base" not in printed
    written = (tmp_path / "report.html").read_text()
    Page(written)
    assert "No inference.json of lean" in written
    assert written.count("Reliability diagram of base") == 2
    assert written.count("Reliability diagram of lean") == 1


def test_nothing_beside_the_report_is_printed(folders, tmp_path):
    """No line of the log, of fairseq's or matplotlib's."""
    command = [sys.executable, "-m", "hgkd_fairseq.cli", "report", folders[0], "--output", tmp_path / "report.html"]
    done = subprocess.run(command, env=cl.environment(), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("| model |")


def test_reference_file(folders, tmp_path):
    """Text in the place of the references in the translations; as many lines as there are translations."""
    references = texts(folders[0])[1]
    other = [" ".join(reversed(line.split())) for line in references]
    (tmp_path / "test.en").write_text("\n".join(other) + "\n")
    report = tables.measure(runs.read_all(folders, tmp_path / "test.en"))
    expected = BLEU().corpus_score(texts(folders[0])[0], [other]).score
    assert report.quality.rows[0][1].text == f"{expected:.1f}"
    (tmp_path / "test.en").write_text("\n".join(other[:-1]) + "\n")
    with pytest.raises(UserError, match=r"has 64 translations and .* 63 lines; name the references"):
        runs.read_all(folders, tmp_path / "test.en")


def test_translations_of_another_checkpoint(folders, tmp_path):
    """`hgkd score --checkpoint NAME` leaves them in RUN/NAME: here each run's are the other's."""
    copies = [tmp_path / "one", tmp_path / "two"]
    for folder, other, copy in zip(folders, reversed(folders), copies, strict=True):
        shutil.copytree(folder, copy, symlinks=True)
        (copy / "best-bleu").mkdir()
        shutil.copy(other / "generate-test.txt", copy / "best-bleu")
        (copy / "generate-test.txt").unlink()
    there = tables.measure(runs.read_all(copies, translations="best-bleu"))
    plain = tables.measure(runs.read_all(folders))
    scores = [[cell.text for cell in row[1:4]] for row in plain.quality.rows]
    assert [[cell.text for cell in row[1:4]] for row in there.quality.rows] == scores[::-1] != scores
    assert [row[1:] for row in there.calibration.rows] == [row[1:] for row in plain.calibration.rows]
    assert not any("generate-test.txt" in note for note in there.quality.notes)
    mixed = "BLEU, chrF, TER: of the translations in RUN/best-bleu; all else of RUN, which may be another checkpoint."
    assert (mixed in there.quality.notes, mixed in plain.quality.notes) == (True, False)
    with pytest.raises(
        UserError, match=r"generate-test.txt does not exist; write it: hgkd score DATA \S+ --checkpoint last"
    ):
        runs.read_all(copies, translations="last")


def test_the_tokenizer_of_the_scores(folders, tmp_path):
    """That of `hgkd score`, where it scored them: also of runs whose translations were made by hand."""
    copies = [tmp_path / "one", tmp_path / "two"]
    for folder, copy in zip(folders, copies, strict=True):
        shutil.copytree(folder, copy, symlinks=True)
    change(copies[0], "scores.json", "|tok:13a|", "|tok:char|")
    (copies[1] / "scores.json").unlink()
    report = tables.measure(runs.read_all(copies))
    for folder, row in zip(folders, report.quality.rows, strict=True):
        translations, references = texts(folder)
        assert row[1].text == f"{BLEU(tokenize='char').corpus_score(translations, [references]).score:.1f}"
    assert "|tok:char|" in report.quality.notes[0]


def change(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))


REFUSED = {
    "no folder": (lambda run: shutil.rmtree(run), "is no folder; name the --save-dir"),
    "no run": (
        lambda run: [file.unlink() for file in run.iterdir() if file.is_file()],
        "is no run: it holds none of checkpoint_best.pt,",
    ),
    "sentence lost": (
        lambda run: (
            change(run, "generate-test.txt", "H-5\t", "X-5\t") or change(run, "generate-test.txt", "D-5\t", "X")
        ),
        r"has 63 translations of 64 sentences \(first one missing: 5\); run fairseq-generate again",
    ),
    "other test set": (
        lambda run: change(run, "generate-test.txt", "T-5\t", "T-5\tt1 "),
        "were translated from different test sets",
    ),
    "no translations": (lambda run: (run / "generate-test.txt").write_text("x\n"), "holds no translations"),
    "no scores": (lambda run: (run / "forced.json").write_text("{}"), "forced.json is no file of `hgkd calibration"),
    "no temperature": (lambda run: (run / "temperature.json").write_text("[]"), "temperature.json is no file of"),
    "another temperature": (
        lambda run: (run / "temperature.json").write_text('{"temperature": 9.5}'),
        "scaled.json was measured at temperature .* and .*temperature.json says 9.5; write scaled.json again",
    ),
    "other bins": (
        lambda run: change(run, "forced.json", "ECE|bins:20|", "ECE|bins:10|"),
        r"holds ECE\|bins:10\|.*; measure both in one way",
    ),
    "scores of another kind": (
        lambda run: shutil.copy(run / "inference.json", run / "forced.json"),
        "forced.json holds scores of `hgkd calibration inference`; write it again: hgkd score DATA RUN",
    ),
    "scores at a temperature": (
        lambda run: change(run, "forced.json", "|tok:bpe|version", "|tok:bpe|temp:2|version"),
        r"holds ECE\|.*\|temp:2\|.*; measure both in one way",
    ),
    "other tokenizer": (
        lambda run: change(run, "scores.json", "|tok:13a|", "|tok:char|"),
        "run was scored with --tokenize char and .*base with --tokenize 13a; score both with one",
    ),
    "no tokenizer": (
        lambda run: change(run, "scores.json", "|tok:13a|", "|tok:flores200|"),
        "tokenizer flores200, which",
    ),
    "sentences of another tokenizer": (
        lambda run: change(run, "inference.json", "quality:bleu|version", "quality:bleu|tok:char|version"),
        r"holds Spearman\|.*\|tok:char\|.*; measure both in one way",
    ),
    "other subset": (
        lambda run: change(run, "forced.json", '"subset": "test"', '"subset": "valid"'),
        r"\|subset:valid and .*\|subset:test; measure both in one way",
    ),
    "no checkpoint of training": (
        lambda run: (run / "checkpoint_last.pt").unlink() or torch.save({"model": {}}, run / "checkpoint_last.pt"),
        "is no fairseq checkpoint",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, folders, tmp_path, capsys):
    """One sentence, before a page is written."""
    harm, expected = REFUSED[case]
    run = tmp_path / "run"
    shutil.copytree(folders[1], run, symlinks=True)
    harm(run)
    assert cli.main(["report", str(folders[0]), str(run), "--output", str(tmp_path / "report.html")]) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hgkd: error: ")]
    assert len(errors) == 1
    assert re.search(expected, errors[0])
    assert not (tmp_path / "report.html").exists()


def test_refused_before_anything_is_read(folders, tmp_path, capsys):
    for arguments, expected in (
        ([folders[0], folders[0]], "a run is named twice"),
        ([tmp_path / str(number) for number in range(7)], "7 runs are too many for one report; give at most 6"),
    ):
        assert cli.main(["report", *map(str, arguments), "--output", str(tmp_path / "report.html")]) == 1
        assert expected in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["report", str(folders[0]), "--output", str(tmp_path / "gone" / "report.html")])
    assert "make it first" in capsys.readouterr().err


START = "2026-01-31 12:00:00 | INFO | "
SETTINGS = START + "fairseq_cli.train | {'_name': None, 'model': Namespace(arch='lstm', data='%s', lr=[0.5], seed=7)}\n"
VALID = START + "valid | epoch 001 | valid on 'valid' subset | loss %s | num_updates %s\n"
ODD_LOGS = {
    "diverged": (
        VALID % (4, 10) + VALID % ("nan", 20) + VALID % ("inf", 30),
        ["run diverged: its NLL on validation is no number from update 20 on."],
    ),
    "never a number": (VALID % ("nan", 20), ["run diverged: its NLL on validation is no number from update 20 on."]),
    "out of any axis": (VALID % (1e308, 1e14) + VALID % (-1e308, 2e14), ["No generate-test.txt of run"]),
    "of something else": (
        "Epoch 1: loss 5.0\n" * 3,
        ["Nothing of fairseq-train's in train.log of run: `fairseq-train"],
    ),
    "a log of hydra": (SETTINGS % "x" + "[2026-01-31 12:00:00,000][valid][INFO] - loss 5 | num_updates 9\n", []),
    "control characters": (SETTINGS % r"\x1b[31mx\u202ey\ud800", [r"fairseq-train '\x1b[31mx\u202ey\ud800'"]),
    "unknown parts": (
        SETTINGS.replace("lstm", r"of another\x1b") % "x",
        ["# fairseq-train, with options unknown here"],
    ),
    "empty": ("", ["Nothing of fairseq-train's in train.log of run"]),
}


@pytest.mark.parametrize("case", ODD_LOGS)
def test_odd_logs(case: str, tmp_path, capsys):
    """Reported as what they are; nothing of them steers a terminal or a page."""
    content, expected = ODD_LOGS[case]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/train.log").write_text(content)
    assert cli.main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    written = (tmp_path / "report.html").read_text()
    Page(written)
    shown = capsys.readouterr().out + html.unescape(written)
    for text in expected:
        assert text.replace("`", "") in shown.replace("`", "").replace("<code>", "").replace("</code>", "")
    assert not set(shown) & {"\x1b", "\u202e", "\0"}


def test_translations_of_nothing(tmp_path, capsys):
    """A model that ends every sentence at once: no words, scores of the end of sentence alone."""
    (tmp_path / "run").mkdir()
    lines = "".join(f"S-{i}\tx\nT-{i}\ta b\nH-{i}\t-0.5\t\nD-{i}\t-0.5\t\nP-{i}\t-1.0\n" for i in range(4))
    (tmp_path / "run/generate-test.txt").write_text(lines)
    scored = ["calibration", "inference", str(tmp_path / "run/generate-test.txt")]
    assert cli.main([*scored, "--json", str(tmp_path / "run/inference.json")]) == 0
    assert cli.main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")]) == 0
    assert "| run | 0.0 ± 0.0 | 0.0 ± 0.0 | 100.0 ± 0.0 |" in capsys.readouterr().out


def test_unlike_resamples_are_said(folders, tmp_path):
    """Scores of another seed: no difference of them, and a line that says why."""
    run = tmp_path / "run"
    shutil.copytree(folders[1], run, symlinks=True)
    change(run, "inference.json", '"seed": 1', '"seed": 2')
    report = tables.measure(runs.read_all([folders[0], run]))
    assert "inference" not in report.differences[1].header
    assert "forced" in report.differences[1].header
    (note,) = [note for note in report.calibration.notes if "resampled alike" in note]
    assert note.startswith("No difference in inference between base and run: inference.json was not resampled alike;")


def test_colours():
    """Black is the text's colour, white the ground's, and the runs' colours have names that the dark page changes."""
    assert page.figures.colour("#ffffff") == "var(--ground)"
    assert "100%" in page.figures.colour("#000000")
    assert "45%" in page.figures.colour("#8c8c8c")
    assert page.figures.colour("#0072b2") == "var(--run-2)"
    for number in range(1, 6):
        assert page.CSS.count(f"--run-{number}:") == 2
