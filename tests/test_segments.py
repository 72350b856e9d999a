"""Tests of sentence scores by external metrics: their files, the bootstrap, and where they are shown."""

import json
from pathlib import Path

import command_line as cl
import numpy as np
import pytest
from sacrebleu.metrics.base import Metric, Score
from sacrebleu.significance import PairedTest
from scipy.stats import spearmanr

from hgkd_fairseq import cli
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import compare, segments

COUNT = 40
OUTPUT = "".join(
    f"S-{i}\tw{i}\nT-{i}\tt{i} t{i + 1} the end of it\nH-{i}\t-0.5\tt{i} t{(i + 1) % (30 if i % 2 else 3)} the end\n"
    f"P-{i}\t-{i * 7 % COUNT / 10:.4f} -0.1000 -0.2000 -0.3000 -0.4000\n"
    for i in range(COUNT)
)  # fmt: skip


class Mean(Metric):
    """A metric of sacreBLEU whose hypotheses are numbers, so that sacreBLEU's own bootstrap can be run on scores."""

    def _extract_corpus_statistics(self, hypotheses, references):
        return [[float(one), 1.0] for one in hypotheses]

    def _aggregate_and_compute(self, stats):
        return self._compute_score_from_stats(np.array(stats).sum(0))

    def _compute_score_from_stats(self, stats):
        return Score("Mean", stats[0] / stats[1])

    def get_signature(self):
        self.num_refs = 1
        return super().get_signature()

    _preprocess_segment = _extract_reference_info = _compute_segment_statistics = None


def scores(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.1 * seed, 1, size=COUNT)


def written(folder: Path, seed: int) -> Path:
    file = folder / f"{seed}.txt"
    file.write_text("".join(f"{score}\n" for score in scores(seed)))
    return file


def test_the_bootstrap_is_sacrebleus():
    systems = [scores(seed) for seed in (0, 3, 9)]
    found = segments.paired_bootstrap(systems)
    _, theirs = PairedTest([(str(i), list(one)) for i, one in enumerate(systems)], {"m": Mean()}, None, "bs")()
    for one, other in zip(found, theirs["Mean"], strict=True):
        assert (one.mean, one.interval) == pytest.approx((other.score, other.ci), rel=1e-5)
        assert one.p == other.p_value
    assert found[0].p is None
    assert found[2].p < 0.05 < found[1].p
    assert [one.p for one in segments.paired_bootstrap([systems[0]] * 2)] == [None, 1]  # sacreBLEU gives 1 / 1001


def test_a_seed_that_is_no_number(monkeypatch):
    monkeypatch.setenv("SACREBLEU_SEED", "1e3")
    with pytest.raises(UserError, match="SACREBLEU_SEED=1e3: it is neither a whole number nor none"):
        segments.paired_bootstrap([scores(0), scores(3)])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0.1\n0.2\n", "x.txt ends after line 2 and test has 3 sentences; give a score for each"),
        ("0.1\n0.2\n0.3\n0.4\n", "x.txt ends after line 4 and test has 3 sentences"),
        ("0.1\nnan\n0.3\n", r"x.txt: line 2 is no finite number \(nan\)"),
        ("0.1\n0.2\ninf\n", r"x.txt: line 3 is no finite number \(inf\)"),
        ("COMET\n0.1\n0.2\n0.3\n", r"x.txt: line 1 is no finite number \(COMET\)"),
        ("0.1\n\n0.3\n", r"x.txt: line 2 is no finite number \(an empty line\)"),
        ("", "x.txt ends after line 0"),
        (None, r"x.txt does not exist; name a file of --segment-scores"),
    ],
)
def test_files_that_do_not_fit(text, expected, tmp_path):
    if text is not None:
        (tmp_path / "x.txt").write_text(text)
    with pytest.raises(UserError, match=expected):
        segments.read(str(tmp_path / "x.txt"), 3, "test")


def test_read(tmp_path):
    (tmp_path / "x.txt").write_text("-0.1\r\n 2e-3\n3")
    assert segments.read(str(tmp_path / "x.txt"), 3, "test").tolist() == [-0.1, 0.002, 3]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("comet.txt", "comet.txt is no NAME=FILE, as COMET=comet.txt"),
        ("=comet.txt", "is no NAME=FILE"),
        ("a|b=comet.txt", "is no NAME=FILE"),
        ("BLEU=comet.txt", "BLEU is computed here; give the scores in comet.txt another name"),
    ],
)
def test_values_of_the_option(given, expected, capsys):
    with pytest.raises(SystemExit):
        cli.main(["report", "run", "--segment-scores", given])
    assert expected in capsys.readouterr().err


def inference(folder: Path, *options) -> dict:
    folder.mkdir(exist_ok=True)
    (folder / "generate-test.txt").write_text(OUTPUT)
    file = folder / "inference.json"
    assert cli.main(["calibration", "inference", str(folder / "generate-test.txt"), "--json", str(file), *options]) == 0
    return json.loads(file.read_text())


def test_rank_correlation_in_calibration(tmp_path, capsys):
    file = written(tmp_path, 1)
    found = inference(tmp_path / "run", "--segment-scores", f"COMET-22={file}")
    mean = [-(i * 7 % COUNT / 10 + 1) / 5 for i in range(COUNT)]
    assert found["spearman_mean_COMET-22"] == pytest.approx(spearmanr(mean, scores(1)).statistic)
    assert found["spearman_sum_COMET-22"] == pytest.approx(found["spearman_mean_COMET-22"])  # all have one length
    assert abs(found["spearman_mean_chrf"]) < 0.9
    text = "Spearman|mode:inference|unit:sentence|logprob:mean|quality:COMET-22|version:0.1.0 = "
    assert text in capsys.readouterr().out
    (row,) = [row for row in found["scores"] if row["key"] == "spearman_mean_COMET-22"]
    assert row["low"] < row["value"] < row["high"]


def test_report(tmp_path, capsys):
    """The report shows a column per metric with differences from the first run, and the measured rank correlations."""
    runs = [tmp_path / name for name in ("one", "other")]
    files = [written(tmp_path, seed) for seed in (0, 9)]
    for run, file in zip(runs, files, strict=True):
        inference(run, "--replicates", "20", "--segment-scores", f"COMET={file}")
    capsys.readouterr()
    output = ["--output", str(tmp_path / "report.html")]
    given = [word for file in files for word in ("--segment-scores", f"COMET={file}")]
    assert cli.main(["report", *map(str, runs), *output, *given]) == 0
    printed = capsys.readouterr().out
    found = segments.paired_bootstrap([scores(0), scores(9)])
    assert "| model | COMET | COMET − one |" in printed
    assert f"| one | {found[0].mean:.4f} ± {found[0].interval:.4f} |  |" in printed
    difference = found[1].mean - found[0].mean
    assert (
        f"| other | {found[1].mean:.4f} ± {found[1].interval:.4f} | **+{difference:.4f}** p = {found[1].p:.3f} |"
        in printed
    )
    assert f"`mean|bs:1000|seed:12345`, with BLEU's resamples. {segments.ONE_TAIL}." in printed
    assert "| model | Spearman, BLEU | Spearman, chrF | Spearman, COMET |" in printed
    page = (tmp_path / "report.html").read_text()
    assert f"<b>{found[0].mean:.4f}</b>" in page
    assert "<h2>Scores of other metrics</h2>" in page

    short = tmp_path / "short.txt"
    short.write_text("1\n" * (COUNT - 1))
    (tmp_path / "report.html").unlink()
    for options, expected in (
        (given[:2], "--segment-scores COMET=... is given 1 times for 2 (one, other); give it once for each"),
        (
            [*given[:2], "--segment-scores", f"COMET={short}"],
            "short.txt ends after line 39 and generate-test.txt of one",
        ),
    ):
        assert cli.main(["report", *map(str, runs), *output, *options]) == 1
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "report.html").exists()


def test_compare(data, plain: cl.Run, tmp_path, capsys, monkeypatch):
    """Scores are shown with BLEU and with p of the difference from the first model; files that do not fit are refused
    before anything is translated."""
    model = str(plain.path("checkpoint_best.pt"))
    given = []
    values = []
    for seed in (1, 2):
        values.append(np.random.default_rng(seed).normal(seed, 1, size=64))
        (tmp_path / f"{seed}.txt").write_text("".join(f"{value}\n" for value in values[-1]))
        given += ["--segment-scores", f"COMET={tmp_path / f'{seed}.txt'}"]
    arguments = ["compare", str(data), model, model, "--cpu", "--repeats", "1", "--max-len-b", "5", "--beam", "1"]
    assert cli.main([*arguments, *given, "--tokenize", "char"]) == 0
    printed = capsys.readouterr().out
    assert "|tok:char|" in printed
    found = segments.paired_bootstrap(values)
    assert "| model | BLEU | COMET | ECE, % |" in printed
    assert f"| {found[0].mean:.4f} ± {found[0].interval:.4f} | " in printed
    assert f"| {found[1].mean:.4f} ± {found[1].interval:.4f}, p = {found[1].p:.3f} | " in printed
    assert "COMET `mean|bs:1000|seed:12345`, p of the difference from the first model. sacreBLEU's paired" in printed

    monkeypatch.setattr(compare, "translate_all", lambda *_: pytest.fail("translated"))
    (tmp_path / "2.txt").write_text("1\n" * 63)
    for options, expected in (
        (given, "2.txt ends after line 63 and subset test has 64 sentences"),
        (given[:2], f"is given 1 times for 2 ({model}, {model})"),
    ):
        assert cli.main([*arguments, *options]) == 1
        assert expected in capsys.readouterr().err
