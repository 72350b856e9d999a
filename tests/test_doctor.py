"""Tests of ``hgkd doctor``: each problem is found and reported in one line."""

import os
import subprocess
import sys
from functools import partial
from importlib import metadata
from types import SimpleNamespace

import command_line as cl
import pytest
import torch
from fairseq import criterions

from hgkd_fairseq import doctor, loss
from hgkd_fairseq.loss import cpu_rows


def test_doctor_passes_here(capsys):
    assert doctor.report() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS)
    assert all(line.startswith("ok ") for line in lines)


def test_doctor_names_the_fork_of_fairseq(monkeypatch):
    from hgkd_fairseq.plugin import compat

    installed = f"ve-fairseq {metadata.version('ve-fairseq')}"
    assert doctor.fairseq() == installed
    monkeypatch.setitem(compat.APPLIED, "fairseq.trainer.train_step", False)
    with pytest.raises(doctor.Problem) as problem:
        doctor.fairseq()
    expected = f"{installed}, which is not as the plugin's patches expect: fairseq.trainer.train_step; pip install"
    assert str(problem.value).startswith(expected)


def test_doctor_finds_two_distributions_of_fairseq(monkeypatch):
    """Installing the plugin's requirements where another fork is installed puts two forks into the same folder."""
    both = {"fairseq": ["torch", "ve-fairseq", "torch"]}  # torch stands for another installed distribution
    monkeypatch.setattr(doctor, "packages_distributions", lambda: both)
    with pytest.raises(doctor.Problem) as problem:
        doctor.fairseq()
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "ve-fairseq"))
    remedy = "pip uninstall torch ve-fairseq, then pip install ve-fairseq==0.12.3"
    assert str(problem.value) == f"{versions}: one is written over the other; {remedy}"


@pytest.mark.parametrize("broken", ["torch", "fairseq"])
def test_doctor_says_in_one_line_what_fails(broken, tmp_path):
    """An old torch, and a fairseq that cannot be imported, are reported once; checks that need them are skipped.

    Each is a fake package, which a new process finds before the installed one.
    """
    (tmp_path / broken).mkdir()
    content = {"torch": "__version__ = '2.5.1'", "fairseq": "raise ValueError('mutable default\\n  is not allowed')"}
    (tmp_path / broken / "__init__.py").write_text(content[broken])
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{cl.ROOT}"}
    command = [sys.executable, "-c", "import sys; from hgkd_fairseq import cli; sys.exit(cli.main(['doctor']))"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    (failed,) = [line for line in lines if line.startswith("FAIL")]
    assert failed.startswith(f"FAIL  {broken:14}")
    expected = {"torch": "2.5.1 would run code hidden in a checkpoint", "fairseq": "is not allowed); pip uninstall"}
    assert expected[broken] in failed
    needing = ["fairseq", "plugin", "CUDA", "loss"] if broken == "torch" else ["plugin"]
    assert [line.split()[1] for line in lines if line.startswith("--")] == needing
    assert done.stderr == ""


def a_wrong_loss(*_, implementation: str) -> SimpleNamespace:
    return SimpleNamespace(loss=torch.tensor(2.0 if implementation == "chunked" else 1.0))


WRONG = {
    "Python": (doctor, "sys", SimpleNamespace(version_info=(3, 13)), doctor.python, "are for 3.11 and 3.12"),
    "no torch": (doctor, "find_spec", lambda name: None, doctor.torch, "not installed; pip install torch"),
    "no fairseq": (doctor, "find_spec", lambda name: None, doctor.fairseq, "not installed; pip install ve-fairseq"),
    "no package": (
        doctor,
        "distribution",
        lambda name: metadata.distribution("none"),
        partial(doctor.installed, "sacrebleu"),
        "pip install sacrebleu",
    ),
    "registry": (criterions, "CRITERION_REGISTRY", {}, doctor.registration, "is not registered"),
    "no compiler": (
        cpu_rows,
        "usable",
        lambda device: "there is no C compiler (cc, gcc)",
        doctor.loss_implementations,
        "install a C compiler",
    ),
    "a wrong kernel": (
        cpu_rows,
        "usable",
        lambda device: "the row kernel differs",
        doctor.loss_implementations,
        "slower than it could be: the row kernel differs$",
    ),
    "a loss": (
        loss,
        "gated_distillation",
        a_wrong_loss,
        doctor.loss_implementations,
        r"chunked gives 2\.0, eager 1\.0",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_doctor_finds(name, monkeypatch):
    place, attribute, value, check, expected = WRONG[name]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(place, attribute, value)
    with pytest.raises(doctor.Problem, match=expected):
        check()


def test_doctor_without_a_gpu(monkeypatch):
    """A CUDA build of torch without a GPU is no problem: it trains on the CPU as well."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert doctor.cuda() == "none: torch is built for CUDA 12.8 and sees no GPU; give fairseq --cpu"
    monkeypatch.setattr(torch.version, "cuda", None)
    assert doctor.cuda() == "none: this torch is built for the CPU"


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
