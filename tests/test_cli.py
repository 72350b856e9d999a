"""The command ``hgkd``: doctor, user-dir, forced calibration."""

import json
import math
import subprocess
import sys
from pathlib import Path

import command_line as cl
import pytest
import torch

from hgkd_fairseq import cli, doctor

ROOT = Path(__file__).parents[1]


def hgkd(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "hgkd_fairseq.cli", *map(str, arguments)],
        cwd=ROOT, env=cl.environment(), capture_output=True, text=True, timeout=cl.TIMEOUT_S, check=False,
    )  # fmt: skip


def test_user_dir(capsys):
    assert cli.main(["user-dir"]) == 0
    assert (Path(capsys.readouterr().out.strip()) / "compat.py").exists()


def test_doctor_passes_here(capsys):
    assert doctor.report() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS)
    assert all(line.startswith("ok ") for line in lines)


def test_doctor_without_a_gpu(monkeypatch):
    """A torch that is built for CUDA trains on the CPU as well."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.cuda() == "none: torch is built for CUDA 12.8 and sees no GPU; give fairseq --cpu"


def test_doctor_says_what_fails_and_goes_on(monkeypatch, capsys):
    def broken():
        raise doctor.Problem("9.9 is too new; pip install ve-fairseq==0.12.3")

    def crashed():
        raise RuntimeError("no such symbol")

    checks = [("fairseq", broken), ("loss", crashed), ("Python", doctor.python)]
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.report() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL  fairseq       9.9 is too new; pip install ve-fairseq==0.12.3"
    assert lines[1] == "FAIL  loss          RuntimeError: no such symbol"
    assert lines[2].startswith("ok    Python")


def by_hand(data: Path, model_paths: list[Path], subset: str) -> dict:
    """Teacher-forced scores straight from fairseq's own probabilities, one sentence at a time."""
    from fairseq import checkpoint_utils

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


@pytest.mark.parametrize("members", [1, 2])
def test_forced_calibration_by_hand(data, teacher, plain, tmp_path, members):
    """One model and an ensemble, plain fairseq's checkpoints, with the language pair left to fairseq."""
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


def test_forced_calibration_refuses(data, plain, tmp_path):
    other, unknown = tmp_path / "other", tmp_path / "unknown"
    for folder in (other, unknown):
        folder.mkdir()
        for language in ("de", "en"):
            (folder / f"dict.{language}.txt").write_text("a 1\nb 1\n")
    (other / "test.de-en.de.idx").touch()  # fairseq reads the languages from such a name
    checkpoint = plain.path("checkpoint_best.pt")
    torch.save({"model": {}}, tmp_path / "no_model.pt")
    cases = [
        ((data, "--path", tmp_path / "gone.pt"), "gone.pt does not exist; name a fairseq checkpoint"),
        ((data, "--path", tmp_path / "no_model.pt"), "no fairseq checkpoint"),
        ((tmp_path / "no_data", "--path", checkpoint), "is no folder"),
        ((data, "--path", checkpoint, "--gen-subset", "dev"), "no subset dev"),
        ((unknown, "--path", checkpoint), "Could not infer language pair"),
        ((other, "--path", checkpoint), "does not fit the dictionaries"),
    ]
    for arguments, expected in cases:
        done = hgkd("calibration", "forced", *arguments)
        errors = [line for line in done.stderr.splitlines() if line.startswith("hgkd: error: ")]
        assert done.returncode == 1
        assert len(errors) == 1, done.stderr[-2000:]
        assert expected in errors[0]
        assert "Traceback" not in done.stderr
