"""Tests of the command ``hgkd``: user-dir, forced calibration, unusable options, interruptions."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import command_line as cl
import pytest
import torch

from hgkd_fairseq import cli
from hgkd_fairseq.criterions.hard_gate_kd import HardGateKDConfig
from hgkd_fairseq.teacher.config import TeacherConfig

ROOT = Path(__file__).parents[1]


def hgkd(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hgkd_fairseq.cli", *map(str, arguments)],
        cwd=ROOT, env=cl.environment(), capture_output=True, text=True, timeout=cl.TIMEOUT_S, check=False,
    )  # fmt: skip


def test_user_dir(capsys):
    assert cli.main(["user-dir"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "tasks").exists()


def by_hand(data: Path, model_paths: list[Path], subset: str) -> dict:
    """Compute teacher-forced scores from fairseq's own probabilities, one sentence at a time."""
    from fairseq import checkpoint_utils

    import hgkd_fairseq.tasks  # noqa: F401  fairseq reads its checkpoints with a new torch then

    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(path) for path in model_paths], arg_overrides={"data": str(data)}
    )
    task.load_dataset(subset)
    dataset = task.dataset(subset)
    confidences, corrects, nlls = [], [], []
    for index in range(len(dataset)):
        sample = dataset.collater([dataset[index]])
        probability = 0.0
        for model in models:
            model.eval()
            with torch.no_grad():
                output = model(**sample["net_input"])
                probability = probability + model.get_normalized_probs(output, log_probs=False)[0] / len(models)
        target = sample["target"][0]
        top, argmax = probability.max(dim=1)
        confidences += top.tolist()
        corrects += (argmax == target).tolist()
        nlls += (-probability.gather(1, target[:, None]).log2()).flatten().tolist()
    bins = [[0.0, 0] for _ in range(20)]
    for confidence, correct in zip(confidences, corrects, strict=True):
        cell = bins[max(math.ceil(confidence * 20), 1) - 1]
        cell[0] += confidence
        cell[1] += correct
    total = len(nlls)
    return {
        "ece": sum(abs(confidence - correct) for confidence, correct in bins) / total,
        "nll": sum(nlls) / total,
        "accuracy": sum(corrects) / total,
        "tokens": total,
    }


def test_the_options_of_training():
    """Every option of the task and the criterion is listed, with its default."""
    shown = " ".join(hgkd("options").stdout.split())
    for option, default in (("--gate", "token"), ("--teacher-temperature", "1.5"), ("--label-smoothing", "0.0")):
        assert shown.split(f" {option} ", 1)[1].split("(default: ", 1)[1].startswith(f"{default})")
    fields = [field for one in (TeacherConfig, HardGateKDConfig) for field in dataclasses.fields(one)]
    own = [field.name for field in fields if field.name != "_name" and not str(field.default).startswith("${")]
    assert [name for name in own if f" --{name.replace('_', '-')} " not in shown] == []
    assert " --max-update " not in shown  # fairseq's


@pytest.mark.parametrize("members", [1, 2])
def test_forced_calibration_by_hand(data, teacher, plain, tmp_path, members):
    """Scores of one model and of an ensemble, with the language pair inferred by fairseq, equal those of `by_hand`."""
    paths = [teacher.path("checkpoint_best.pt"), plain.path("checkpoint_best.pt")][:members]
    done = hgkd(
        "calibration", "forced", data, "--path", ":".join(map(str, paths)), "--gen-subset", "valid", "--cpu",
        "--max-tokens", 300, "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    scores = json.loads((tmp_path / "scores.json").read_text())
    for name, expected in by_hand(data, paths, "valid").items():
        assert scores[name] == pytest.approx(expected, rel=1e-4), name
    assert f"ECE|bins:20|mode:forced|eos:yes|tok:bpe|version:0.1.0 = {100 * scores['ece']:.2f} %" in done.stdout


def test_forced_calibration_refuses(data, plain, tmp_path, capsys):
    other, unknown = tmp_path / "other", tmp_path / "unknown"
    for folder in (other, unknown):
        folder.mkdir()
        for language in ("de", "en"):
            (folder / f"dict.{language}.txt").write_text("a 1\nb 1\n")
    (other / "test.de-en.de.idx").touch()  # fairseq infers the languages from such a file name
    checkpoint = plain.path("checkpoint_best.pt")
    torch.save({"model": {}}, tmp_path / "no_model.pt")
    cases = [
        ((data, "--path", tmp_path / "gone.pt"), "gone.pt does not exist; name a fairseq checkpoint"),
        ((data, "--path", tmp_path / "no_model.pt"), "no fairseq checkpoint"),
        ((tmp_path / "no_data", "--path", checkpoint), "is no folder"),
        ((data, "--path", checkpoint, "--gen-subset", "dev"), "no subset dev"),
        ((unknown, "--path", checkpoint), "Could not infer language pair"),
        ((other, "--path", checkpoint), "and that of the data differ: "),
    ]
    for arguments, expected in cases:
        assert cli.main(["calibration", "forced", *map(str, arguments)]) == 1
        printed = capsys.readouterr().err
        errors = [line for line in printed.splitlines() if line.startswith("hgkd: error: ")]
        assert len(errors) == 1, printed[-2000:]
        assert expected in errors[0]
        assert "Traceback" not in printed


GENERATED = "T-0\tx\nH-0\t-1\tx\nP-0\t-1 -1\n"


def refused(capsys, *arguments) -> str:
    """Run a command that must fail and return the last line of stderr, its error message."""
    try:
        status = cli.main(list(map(str, arguments)))
    except SystemExit as end:
        status = end.code
    lines = capsys.readouterr().err.splitlines()
    assert status in (1, 2), lines
    assert re.match(r"hgkd[a-z0-9 ]*: error: ", lines[-1]), lines
    return lines[-1]


MODEL = ("calibration", "forced", "data", "--path", "x")
COMPARE = ("compare", "data", "x")
SCORE = ("score", "data", "run")
HUGE = "9" * 5000


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        (MODEL, "--bins", ("0", "-1", "100000000", "1.5", "x", "nan", "", HUGE)),
        (MODEL, "--min-count", ("0", "-1", HUGE)),
        (MODEL, "--replicates", ("-5", "100000000", "1e3", HUGE)),
        (MODEL, "--seed", ("-1", "x", HUGE)),
        (MODEL, "--max-tokens", ("0", "-1", HUGE)),
        (MODEL, "--temperature", ("0", "-1", "1e39", "1e-320", "1e-40", "nan", "inf", "-inf", "x", HUGE)),
        (MODEL, "--json", ("", "gone/x.json", ".", "x" * 300)),
        (MODEL, "--tokens", ("", "gone/x.tsv", ".", "x.csv")),
        (("calibration", "diagram", "x.json"), "--output", ("", "gone/x.svg", ".", "x.gif", "x")),
        (("report", "run"), "--output", ("", "gone/x.html", ".")),
        (("report", "run"), "--reference", ("",)),
        (SCORE, "--reference", ("",)),
        (SCORE, "--checkpoint", ("",)),
        (SCORE, "--tokenize", ("", "x")),
        (COMPARE, "--tokenize", ("", "x")),
        (("calibration", "inference", "x"), "--tokenize", ("", "x")),
        (SCORE, "--generate", ("--beam '5", "--beam x", "--beams 5")),
        (COMPARE, "--beam", ("0", "-1", "100000", "x")),
        (COMPARE, "--lenpen", ("nan", "inf", "1e308", "-1e308", "x")),
        (COMPARE, "--max-len-a", ("nan", "inf", "-1", "1e308")),
        (COMPARE, "--max-len-b", ("-5", "1.5", "0", HUGE)),
        (COMPARE, "--repeats", ("0", "-1", HUGE)),
        (COMPARE, "--max-tokens", ("0", HUGE)),
        (("export", "x", "y"), "--ctranslate2", ("", "gone/x", ".")),
        (("weights", "x"), "--output", ("", "gone/x", ".")),
        (("weights", "x"), "--plot", ("", "gone/x.svg", "x.gif")),
    ],
)
def test_every_option_is_checked(command, option, values, tmp_path, monkeypatch, capsys):
    """A bad value is refused with a message that names the option, before any input is read: none of them exists."""
    monkeypatch.chdir(tmp_path)
    for value in values:
        assert option in refused(capsys, *command, f"{option}={value}"), value
    assert not list(tmp_path.iterdir())


EXPORT = ("export", "x", "y")
TO_CTRANSLATE2 = (*EXPORT, "--ctranslate2", "z")
STORE = ("store", "data", "--teacher-path", "x", "--output", "y", "--kind")


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        (
            ("methods",),
            ["--teacher", "x"],
            "--teacher CKPT is of one method; name it: hgkd methods NAME --teacher CKPT",
        ),
        (("methods",), ["--data"], "--data is of one method; name it: hgkd methods NAME --data"),
        (
            ("methods", "hkd-t"),
            ["--teacher", "x", "--data"],
            "--teacher is for the options, which --data does not print",
        ),
        ((*STORE, "gold"), ["--dtype", "bf16"], "--dtype is for --kind hidden, and this is gold; drop it"),
        ((*STORE, "topk"), ["--draws", "3"], "--draws is for --kind sampled, and this is topk; drop it"),
        *(
            (EXPORT, words, f"{words[0]} is of the CTranslate2 model, or of its comparison: add --ctranslate2 DIR")
            for words in (
                *(["--quantization", "int8"], ["--data", "x"], ["--no-comparison"], ["--reference", "x"]),
                *(["--tokenize", "zh"], ["--beam", "3"], ["--lenpen", "2"], ["--max-len-a", "2"], ["--max-len-b", "9"]),
                *(["--repeats", "2"], ["--gen-subset", "valid"], ["--max-tokens", "9"], ["--cpu"]),
            )
        ),
        (TO_CTRANSLATE2, ["--no-comparison", "--beam", "3"], "--beam is of the comparison, and --no-comparison leaves"),
        (TO_CTRANSLATE2, ["--no-comparison", "--cpu"], "--cpu is of the comparison, and --no-comparison leaves it out"),
    ],
)
def test_options_that_nothing_would_look_at(command, options, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert expected in refused(capsys, *command, *options)
    assert not list(tmp_path.iterdir())


def test_a_dash_is_no_name_of_an_output(capsys):
    assert "argument --json: no name of an output; a file of that name is ./-" in refused(capsys, *MODEL, "--json", "-")


def test_bins_and_replicates_together(capsys):
    assert "--bins 10000 x --replicates 100000" in refused(capsys, *MODEL, "--bins", 10000, "--replicates", 100000)


def test_a_temperature_of_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for text in ("{", "[]", "{}", '{"temperature": "1.5"}', '{"temperature": 0}', '{"temperature": %s}' % ("9" * 400)):
        Path("t.json").write_text(text)
        found = refused(capsys, *MODEL, "--temperature", "t.json")
        assert "--temperature t.json is neither a number nor a file of it: t.json is no file of" in found


@pytest.mark.parametrize(
    ("command", "output"),
    [
        (("calibration", "inference", "in"), ("--json", "in")),
        (("calibration", "inference", "in"), ("--tokens", "link.tsv")),
        (("calibration", "inference", "other", "--reference", "in"), ("--json", "./in")),
        (("calibration", "forced", "data", "--path", "other:in"), ("--json", "in")),
        (("calibration", "forced", "data", "--path", "in", "--temperature", "in"), ("--json", "hard")),
        (("calibration", "forced", "data", "--path", "x"), ("--json", "data/dict.de.txt")),
        (("calibration", "temperature", "data", "--path", "in"), ("--json", "in")),
        (("calibration", "diagram", "other", "in.svg"), ("--output", "in.svg")),
        (("report", "data"), ("--output", "data/forced.json")),
        (("report", "data", "--reference", "in"), ("--output", "in")),
        (("weights", "in"), ("--output", "in")),
        (("weights", "x", "--compare", "in.svg"), ("--plot", "in.svg")),
    ],
)
def test_an_input_is_not_written_over(command, output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    for name in ("in", "in.svg", "other", "data/dict.de.txt", "data/forced.json"):
        Path(name).write_text("mine")
    Path("link.tsv").symlink_to("in")
    Path("hard").hardlink_to("in")
    assert f"{output[1]} is read by this command and would be written over" in refused(capsys, *command, *output)
    assert {path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == {"mine"}


def test_two_outputs_of_one_name(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("generate.txt").write_text(GENERATED)
    run = ("calibration", "inference", "generate.txt", "--replicates", 0)
    assert "x.tsv is named for two outputs" in refused(capsys, *run, "--json", "x.tsv", "--tokens", "./x.tsv")
    # A report in the folder of its run and scores next to the translations are no inputs: the next call replaces them.
    Path("run").mkdir()
    shutil.copy("generate.txt", "run/generate-test.txt")
    for _ in range(2):
        assert cli.main([*map(str, run), "--json", "run/inference.json"]) == 0
        assert cli.main(["report", "run", "--output", "run/report.html"]) == 0


def test_closed_and_full_standard_output(tmp_path):
    """A closed pipe (`hgkd ... | head`) and a full disk end with a one-line message, without a traceback at exit."""
    command = ["-m", "hgkd_fairseq.cli", "gates"]
    environment = {name: value for name, value in cl.environment().items() if name != "PYTHONUNBUFFERED"}
    reading, writing = os.pipe()
    os.close(reading)
    with open("/dev/full", "w") as full:
        closed = "standard output was closed"
        for output, unbuffered, reason in (
            (writing, [], closed), (writing, ["-u"], closed), (full, ["-u"], "No space left on device")
        ):  # fmt: skip
            done = subprocess.run(
                [sys.executable, *unbuffered, *command], cwd=ROOT, env=environment,
                stdout=output, stderr=subprocess.PIPE, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == 1
            assert "Traceback" not in done.stderr
            assert reason in done.stderr.splitlines()[-1]
    os.close(writing)


def test_debug_shows_the_traceback(tmp_path, capsys):
    for debug in ((), ("--debug",)):
        assert cli.main(["calibration", "inference", str(tmp_path), *debug]) == 1
        error = capsys.readouterr().err
        assert ("Traceback" in error) == bool(debug)
        assert error.splitlines()[-1].startswith(f"hgkd: error: {tmp_path} cannot be read: Is a directory")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_while_it_reads(number, status, tmp_path, monkeypatch):
    """SIGINT and SIGTERM set the usual exit status and leave neither a traceback nor temporary files."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores SIGINT
        os.dup2(os.open("err", os.O_WRONLY | os.O_CREAT), 2)
        sys.stderr = open(2, "w")  # noqa: SIM115
        code: object = None
        try:
            code = cli.main(["calibration", "inference", "pipe", "--tokens", "t.tsv", "--json", "t.json"])
        except SystemExit as end:
            code = end.code
        finally:
            os._exit(code if isinstance(code, int) else 99)
    with open("pipe", "w"):  # open() returns once the command reads
        time.sleep(0.5)
        os.kill(pid, number)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == status
    assert "Traceback" not in Path("err").read_text()
    assert sorted(os.listdir()) == ["err", "pipe"]
