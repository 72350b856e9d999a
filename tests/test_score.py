"""Tests of `hgkd score`: its files against those of the single commands, what it recomputes, several checkpoints of a
run."""

import contextlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import command_line as cl
import pytest
import torch
from processes import full_disk
from sacrebleu.metrics import BLEU, CHRF

from hgkd_fairseq import cli
from hgkd_fairseq.calibration import temperature as calibration_temperature
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import steps
from hgkd_fairseq.evaluation.score import GENERATED, ScoreOptions, Scoring
from hgkd_fairseq.report import runs, tables

GENERATE = "--beam 2 --max-len-b 12"


@pytest.fixture
def run(student, tmp_path) -> Path:
    """Return the folder of a run as fairseq-train leaves it, not scored yet."""
    folder = tmp_path / "student"
    folder.mkdir()
    for name in ("checkpoint_best.pt", "checkpoint_last.pt"):
        shutil.copy(student.path(name), folder)
    (folder / "train.log").write_text(student.result.output)
    return folder


def scored(data: Path, run: Path, *options) -> int:
    return cli.main(["score", str(data), str(run), "--cpu", f"--generate={GENERATE}", *map(str, options)])


def written(run: Path) -> dict[str, int]:
    return {str(file.relative_to(run)): file.stat().st_mtime_ns for file in run.rglob("*") if file.is_file()}


def done_again(before: dict[str, int], run: Path) -> set[str]:
    always = {"scores.json", "translations.txt"}  # cheap, so that they are written by each call
    return {name for name, time in written(run).items() if before.get(name) != time} - always


def sentences(output: str) -> list[str]:
    return re.findall("^[STHDP]-.*$", output, re.MULTILINE)


def test_files_are_those_of_the_single_commands(data, run, student, tmp_path, capsys):
    assert scored(data, run) == 0
    shown = capsys.readouterr().out.splitlines()
    scores = json.loads((run / "scores.json").read_text())
    path = run / "checkpoint_best.pt"

    def single(file: str, *command) -> None:
        assert cli.main(["calibration", *map(str, command), "--json", str(tmp_path / file)]) == 0
        theirs, ours = (json.loads((folder / file).read_text()) for folder in (tmp_path, run))
        assert {**theirs, "command": "", "file": ""} == {**ours, "command": "", "file": ""}

    single("forced.json", "forced", data, "--path", path, "--cpu")
    single("temperature.json", "temperature", data, "--path", path, "--cpu")
    single("scaled.json", "forced", data, "--path", path, "--cpu", "--temperature", run / "temperature.json")
    degree = json.loads((run / "temperature.json").read_text())["temperature"]
    for folder, more in (("", ()), ("scaled", ("--temperature", degree))):
        options = (*GENERATE.split(), *more, "--cpu", *cl.USER_DIR, "--required-batch-size-multiple", 1)
        result = cl.fairseq("generate", data, "--path", path, "--max-tokens", 4000, *options)
        assert result.code == 0, result.output
        assert sentences((run / folder / "generate-test.txt").read_text()) == sentences(result.output)
    single("inference.json", "inference", run / "generate-test.txt")
    single("inference_scaled.json", "inference", run / "scaled" / "generate-test.txt")

    lines = (run / "generate-test.txt").read_text()
    hypotheses, references = (dict(re.findall(rf"^{key}-(\d+)\t(.*)$", lines, re.MULTILINE)) for key in "HT")
    texts = [hypotheses[str(i)].split("\t")[1] for i in range(64)]
    assert (run / "translations.txt").read_text().splitlines() == texts
    gold = [references[str(i)] for i in range(64)]
    assert scores["bleu"] == BLEU().corpus_score(texts, [gold]).score
    assert scores["chrf"] == CHRF().corpus_score(texts, [gold]).score
    valid = student.result.logs("valid")
    assert scores["valid_nll_best"] == min(row["nll_loss"] for row in valid)
    assert [point["updates"] for point in scores["curve"]] == [row["num_updates"] for row in valid]
    assert scores["teacher_share"] == student.result.logs("train")[-1]["teacher_share"]
    forced = json.loads((run / "forced.json").read_text())
    assert (scores["ece"], scores["nll"], scores["parameters"]) == (forced["ece"], forced["nll"], forced["parameters"])
    assert shown[0] == str(run)
    assert f"BLEU|{scores['signatures']['bleu']} = {scores['bleu']:.2f}" in shown
    assert any(line.startswith(f"{forced['signature']} = {100 * forced['ece']:.2f} %") for line in shown)
    # A report finds all files that it needs, and the settings of the search.
    found = runs.read(run, "student")
    assert found.missing == []
    assert found.generation.settings["beam"] == 2
    assert tables.measure([found]).quality.rows[0][1].text == f"{scores['bleu']:.1f}"


def test_what_is_done_again(data, run):
    """A second call recomputes nothing; after a file is truncated, that file and what depends on it; after the
    checkpoint is replaced, all measurements."""
    assert scored(data, run) == 0
    before = written(run)
    assert scored(data, run) == 0
    assert done_again(before, run) == set()
    whole = (run / "generate-test.txt").read_bytes()
    (run / "generate-test.txt").write_bytes(whole[:-50])
    before = written(run)
    assert scored(data, run) == 0
    assert done_again(before, run) == {"generate-test.txt", "generate.log", "scored.json"}
    assert (run / "generate-test.txt").read_bytes() == whole
    other = torch.load(run / "checkpoint_last.pt", weights_only=False)  # changed below: it may equal the best one
    for tensor in other["model"].values():
        tensor.mul_(0.9)
    torch.save(other, run / "checkpoint_best.pt")
    assert scored(data, run) == 0
    measured = {"forced.json", "inference.json", "temperature.json", "scaled.json", "inference_scaled.json"}
    assert measured <= done_again(before, run)


def weaken(source: Path, target: Path) -> None:
    checkpoint = torch.load(source, weights_only=False)
    for tensor in checkpoint["model"].values():
        tensor.mul_(0.5)
    torch.save(checkpoint, target)


def test_the_checkpoint_with_the_highest_bleu_on_validation(data, student, run):
    """BLEU of the candidates, which decides, equals that of fairseq-generate with greedy search. A weaker checkpoint of
    the same run has scores of its own."""
    shutil.copy(run / "checkpoint_last.pt", run / "checkpoint2.pt")
    weaken(run / "checkpoint_last.pt", run / "checkpoint1.pt")
    assert scored(data, run, "--checkpoint", "best-bleu") == 0
    found = json.loads((run / "best-bleu" / "candidates.json").read_text())
    assert set(found["bleu"]) == {"checkpoint1.pt", "checkpoint2.pt", "checkpoint_best.pt", "checkpoint_last.pt"}
    search = ("--gen-subset", "valid", "--max-len-b", 12, "--beam", 1, "--max-tokens", 4000, "--cpu", *cl.USER_DIR)
    for name in ("checkpoint1.pt", "checkpoint_last.pt"):
        result = cl.fairseq("generate", data, "--path", run / name, "--required-batch-size-multiple", 1, *search)
        rows = re.findall(r"^([TH])-(\d+)\t(?:-[\d.]+\t)?(.*)$", result.output, re.MULTILINE)
        gold, texts = ({number: text for kind, number, text in rows if kind == one} for one in "TH")
        bleu = BLEU().corpus_score([texts[number] for number in gold], [list(gold.values())]).score
        assert found["bleu"][name] == pytest.approx(bleu, abs=1e-9)
    assert found["bleu"][found["best"]] == max(found["bleu"].values()) > found["bleu"]["checkpoint1.pt"]
    assert scored(data, run, "--checkpoint", "best-bleu", "--checkpoint", "checkpoint1.pt") == 0
    best, weak = (json.loads((run / name / "scores.json").read_text()) for name in ("best-bleu", "1"))
    assert best["bleu"] > 0
    assert best["nll"] < weak["nll"]
    assert json.loads((run / "1" / "forced.json").read_text())["path"] == str(run / "checkpoint1.pt")


def test_checkpoints_of_one_run(data, student, tmp_path, capsys):
    """The scores of best, last and any other checkpoint of a run are kept side by side and can be reported together."""
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(student.path("checkpoint_last.pt"), run)
    weaken(run / "checkpoint_last.pt", run / "checkpoint_best.pt")
    (run / "train.log").write_text(student.result.output)
    shutil.copy(run / "checkpoint_last.pt", run / "checkpoint.best_bleu_20.5.pt")
    names = ("best", "last", "checkpoint.best_bleu_20.5.pt")
    assert scored(data, run, *[word for name in names for word in ("--checkpoint", name)]) == 0
    folders = [run, run / "last", run / "best_bleu_20.5"]
    shown = capsys.readouterr().out.splitlines()
    assert [line for line in shown if "|" not in line and ":" not in line] == list(map(str, folders))
    scores = [json.loads((folder / "scores.json").read_text()) for folder in folders]
    assert scores[1] == scores[2]
    # The last two have the same weights: the files of the first of them are copied.
    for name in ("forced.json", "temperature.json", "generate-test.txt", "generate.log", "scaled/generate-test.txt"):
        one, other, copy = ((folder / name).read_bytes() for folder in folders)
        assert one != other == copy
    assert json.loads((folders[2] / "forced.json").read_text())["path"] == str(run / "checkpoint_last.pt")
    before = written(run)
    assert scored(data, run, "--checkpoint", names[2]) == 0  # alone; it is up to date
    assert {Path(name).name for name in done_again(before, run)} == {"scores.json", "translations.txt"}
    assert cli.main(["report", *map(str, folders), "--output", str(run / "report.html")]) == 0


DECIDED = "which hgkd score decides itself; drop it"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--generate=--beams 5"],
            "--generate '--beams 5' is not for fairseq-generate: unrecognized arguments: --beams 5",
        ),
        (["--generate=--beam '5"], "--generate '--beam '5' is not for fairseq-generate: No closing quotation"),
        (["--generate=--path x"], f"--generate '--path x' sets --path, {DECIDED}"),
        (["--generate=--beam 2 --gen-subset=valid"], f"sets --gen-subset, {DECIDED}"),
        (["--generate=--results-path x"], f"sets --results-path, {DECIDED}"),
        (["--generate=--temperature 2"], f"sets --temperature, {DECIDED}"),
        (["--generate=--nbest 2"], f"sets --nbest, {DECIDED}"),
        (["--generate=--prefix-size 2"], f"sets --prefix-size, {DECIDED}"),
        (["--generate=--beam 0"], "--generate '--beam 0': --beam 0 finds nothing; give 1"),
        (["--generate=--sacrebleu"], f"sets --sacrebleu, {DECIDED}"),
        (["--generate=--remove-bpe"], f"sets --post-process, {DECIDED}"),
        (["--generate=-s en -t de"], f"sets --source-lang, {DECIDED}"),
        (["--generate=--num-shards 2"], f"sets --num-shards, {DECIDED}"),
        (
            ["--checkpoint", "best", "--checkpoint", "worst"],
            "worst does not exist; --checkpoint is best, best-bleu, last",
        ),
        (["--checkpoint", "checkpoint.pt"], "--checkpoint checkpoint.pt: its scores would be written over others in"),
        (["--checkpoint", "checkpoint_scaled.pt"], "would be written over others in .*scaled; rename it"),
        (["--checkpoint", "checkpoint.lenpen.pt"], "would be written over others in .*lenpen; rename it"),
        (["--checkpoint", "best-bleu.pt"], "would be written over others in .*best-bleu; rename it"),
        (["--checkpoint", "scaled/checkpoint.pt"], "would be written over others in .*scaled; rename it"),
        (
            ["--reference", "{tmp}/short"],
            "short has 1 lines and the test set in .* 64 sentences; name the text .* with --reference",
        ),
    ],
)
def test_what_is_refused(options, expected, data, run, tmp_path, capsys, monkeypatch):
    """Options that cannot be used are refused before the first checkpoint is scored."""
    monkeypatch.setattr(Scoring, "score", lambda *_: pytest.fail("scored"))
    (tmp_path / "short").write_text("one line\n")
    assert scored(data, run, *(word.format(tmp=tmp_path) for word in options)) == 1
    assert re.search(f"^hgkd: error: .*{expected}", capsys.readouterr().err, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "checkpoint", "expected"),
    [
        ("gone", "best", "gone/checkpoint_best.pt does not exist"),
        ("gone", "best-bleu", "gone holds no checkpoint of fairseq-train"),
        ("bytes", "best", "train.log is no text"),
    ],
)
def test_the_second_run_is_refused(name, checkpoint, expected, data, run, tmp_path, capsys, monkeypatch):
    """A second run that cannot be scored is refused before the first one is scored."""
    monkeypatch.setattr(Scoring, "score", lambda *_: pytest.fail("scored"))
    (tmp_path / "bytes").mkdir()
    shutil.copy(run / "checkpoint_best.pt", tmp_path / "bytes")
    (tmp_path / "bytes" / "train.log").write_bytes(b"\xff\xfe")
    words = ["score", str(data), str(run), str(tmp_path / name), "--cpu", "--checkpoint", checkpoint]
    assert cli.main(words) == 1
    assert re.search(f"^hgkd: error: .*{expected}", capsys.readouterr().err, re.MULTILINE)


def test_folders_of_checkpoints(data, run, tmp_path):
    """Scores of a checkpoint in a subfolder, such as an averaged one, go there; others go to a folder of its name."""
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/average3").mkdir()
    for name, folder in {"average3/checkpoint.pt": "average3", "checkpoint_7_100.pt": "7_100", "x.pt": "x"}.items():
        shutil.copy(run / "checkpoint_best.pt", tmp_path / "run" / name)
        assert Scoring(str(data), tmp_path / "run", name, ScoreOptions()).folder == tmp_path / "run" / folder


def test_the_choice_by_bleu_is_made_again(data, run, tmp_path, monkeypatch):
    """The checkpoint is chosen again for other options of fairseq-generate or another tokenizer of BLEU."""
    shutil.copytree(run, tmp_path / "run")
    asked = []
    monkeypatch.setattr(Scoring, "valid_bleu", lambda one, *_: asked.append(one.path.name) or float(len(asked)))
    plain = ScoreOptions()
    others = [ScoreOptions(generate="--beam 5 --lenpen 2"), ScoreOptions(tokenize="none")]
    for how, made in ((plain, True), (plain, False), (others[0], True), (others[1], True)):
        asked.clear()
        one = Scoring(str(data), tmp_path / "run", "best-bleu", how)
        one.once = steps.Steps(one.folder, *one.known).once
        assert one.best_by_bleu().name == one.candidates[-1].name
        assert asked == [path.name for path in one.candidates if made]


def test_two_checkpoints_of_one_folder(data, student, tmp_path, capsys):
    for name in ("checkpoint7.pt", "checkpoint_7.pt"):
        shutil.copy(student.path("checkpoint_last.pt"), tmp_path / name)
    assert scored(data, tmp_path, "--checkpoint", "checkpoint7.pt", "--checkpoint", "checkpoint_7.pt") == 1
    assert f"checkpoint_7.pt would be written to {tmp_path / '7'}; rename one" in capsys.readouterr().err


def test_scores_of_a_checkpoint_that_was_replaced_are_not_copied(data, student, tmp_path):
    """A training replaces both checkpoints after the first one was scored."""
    names = ("best", "last")
    for name in names:
        shutil.copy(student.path("checkpoint_last.pt"), tmp_path / f"checkpoint_{name}.pt")
    best = Scoring(str(data), tmp_path, "best", ScoreOptions(generate=GENERATE, cpu=True))
    best.score(None)
    for name in names:
        weaken(student.path("checkpoint_last.pt"), tmp_path / f"checkpoint_{name}.pt")
    last = Scoring(str(data), tmp_path, "last", ScoreOptions(generate=GENERATE, cpu=True))
    last.score(None, [best])
    nll = [json.loads((folder / "scores.json").read_text())["nll"] for folder in (tmp_path, tmp_path / "last")]
    assert nll[0] < nll[1]


def test_a_checkpoint_that_is_replaced_while_it_is_scored(data, student, run, monkeypatch, capsys):
    """Its scores would be of two models; the next call scores it again, even if the first one is there again."""
    translate = Scoring.translate
    shutil.copy2(run / "checkpoint_best.pt", run / "first")

    def replace(one, *words) -> None:
        weaken(student.path("checkpoint_last.pt"), run / "checkpoint_best.pt")
        translate(one, *words)

    with monkeypatch.context() as patched:
        patched.setattr(Scoring, "translate", replace)
        assert scored(data, run) == 1
    assert "checkpoint_best.pt was replaced or removed while it was scored; score it when" in capsys.readouterr().err
    assert not (run / "scores.json").exists()
    (run / "first").replace(run / "checkpoint_best.pt")
    before = written(run)
    assert scored(data, run) == 0
    assert {"forced.json", "temperature.json", "generate-test.txt"} <= done_again(before, run)


def test_the_share_of_the_teacher_is_the_last_that_is_known(data, run, tmp_path):
    """The share is None if none is logged; for a run stopped before its last log line it is the previous epoch's."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    lines = (run / "train.log").read_text().splitlines(keepends=True)
    shares = [point["teacher_share"] for point in Scoring(str(data), folder, "best", ScoreOptions()).curve]
    of_training = [place for place, line in enumerate(lines) if " | train | " in line]
    for left_out, expected in ((of_training[-1:], shares[-2]), (of_training, None)):
        kept = [line for place, line in enumerate(lines) if place not in left_out]
        (folder / "train.log").write_text("".join(kept))
        one = Scoring(str(data), folder, "best", ScoreOptions())
        assert len(one.curve) == len(shares)
        assert one.training()["teacher_share"] == expected


def test_another_tokenizer(data, run, tmp_path, capsys):
    """--tokenize applies to BLEU, to the BLEU of sentences and to the report; nothing else is recomputed."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    assert scored(data, folder) == 0
    before = written(folder)
    assert scored(data, folder, "--tokenize", "char") == 0
    assert done_again(before, folder) == {"inference.json", "inference_scaled.json", "scored.json"}
    found = json.loads((folder / "scores.json").read_text())
    report = tables.measure([runs.read(folder, "student")])
    assert "|tok:char|" in found["signatures"]["bleu"]
    assert (report.quality.rows[0][1].text, "|tok:char|" in report.quality.notes[0]) == (f"{found['bleu']:.1f}", True)
    assert "|quality:bleu|tok:char|version:" in (folder / "inference.json").read_text()


def test_a_model_that_has_no_best_temperature(data, run, monkeypatch, capsys):
    """Scores that need no temperature are written, and those at a previous temperature are removed."""
    assert scored(data, run) == 0
    assert runs.read(run, "student").missing == []
    monkeypatch.setattr(calibration_temperature, "HIGHEST", 1.0000001)
    (run / "scored.json").unlink()
    assert scored(data, run) == 0
    assert "scored without a temperature: the NLL of subset valid falls" in capsys.readouterr().err
    found = runs.read(run, "student")
    assert found.missing == ["temperature.json", "scaled.json", "inference_scaled.json"]
    assert json.loads((run / "scores.json").read_text())["temperature"] is None


def test_an_exported_checkpoint(data, run, tmp_path):
    """It does not hold the training time, which is then unknown."""
    folder = tmp_path / "exported"
    folder.mkdir()
    exported = ["export", str(run / "checkpoint_best.pt"), str(folder / "checkpoint_best.pt")]
    assert cli.main(exported) == 0
    assert scored(data, folder) == 0
    assert json.loads((folder / "scores.json").read_text())["minutes"] is None
    assert runs.read(folder, "student").minutes is None


def test_a_search_that_fairseq_cannot_do(data, run, capsys):
    """The message names the option that asked for it."""
    assert cli.main(["score", str(data), str(run), "--cpu", "--generate=--beam 2 --max-len-a 0 --max-len-b 0"]) == 1
    told = capsys.readouterr().err
    assert "checkpoint_best.pt: fairseq-generate, with --generate '--beam 2 --max-len-a 0 --max-len-b 0': unf" in told


def test_one_that_scores_a_folder(tmp_path):
    """A second process is refused while the first one is alive, as it would overwrite files that the first reads."""
    (tmp_path / "run").mkdir()
    ready, tell = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            steps.Steps(tmp_path / "run", 1).once("a", lambda file: (os.write(tell, b"x"), time.sleep(60)))
        os._exit(1)
    try:
        assert os.read(ready, 1) == b"x"
        with pytest.raises(UserError, match=rf"{tmp_path}/run is being scored by process {child} on .*; wait until"):
            steps.Steps(tmp_path / "run", 1).once("a", Path.touch)
        assert os.listdir(tmp_path / "run") == [steps.LOCK]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert steps.Steps(tmp_path / "run", 1).once("a", Path.touch).read_bytes() == b""


def test_a_full_disk_keeps_the_translations_that_are_there(data, run, monkeypatch, capsys):
    """If the translations of another search do not fit the disk, those of the previous search and its scores stay."""
    names = (GENERATED, "translations.txt", "scores.json", "inference.json")
    assert scored(data, run) == 0
    before = {name: (run / name).read_bytes() for name in names}
    words = ["score", str(data), str(run), "--cpu", "--generate=--beam 1"]
    with full_disk(len(before[GENERATED]) // 2):
        assert cli.main(words) == 1
    assert f"{run / GENERATED} cannot be written: File too large" in capsys.readouterr().err
    assert {name: (run / name).read_bytes() for name in names} == before
