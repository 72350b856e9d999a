"""Tests of the imports between subpackages: they run downward, none is mutual, and the mathematics needs no fairseq."""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hgkd_fairseq"
# A subpackage or module may import those of lower lines, and those of its own line that do not import it.
LEVELS = [
    {"cli", "doctor", "export", "methods", "report", "sequence_level", "tasks"},
    {"criterions", "evaluation"},
    {"data", "plugin", "sentence_weights", "teacher"},
    {"loss"},
    {"gates"},
    {"calibration"},
    {"arguments", "cache", "drawing", "errors", "files", "ranges"},
]
# Upward imports that are allowed, because they register the tasks and the criterion with fairseq.
REGISTRATION = {("plugin", "tasks"), ("criterions", "tasks")}


def rooms_imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            deeper = [f"{node.module}.{alias.name}" for alias in node.names] if node.module == PACKAGE.name else []
            names = deeper or [node.module]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == PACKAGE.name and len(parts) > 1 and not parts[1].startswith("__"):
                yield parts[1]


def room(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def edges() -> set[tuple[str, str]]:
    found = {(room(file), other) for file in PACKAGE.rglob("*.py") for other in rooms_imported(file)}
    return {(one, other) for one, other in found if one not in (other, "__init__")} - REGISTRATION


def test_every_room_has_its_place():
    there = {room(file) for file in PACKAGE.rglob("*.py")} - {"__init__"}
    assert there == set().union(*LEVELS)


def test_imports_run_downward_and_in_no_circle():
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    found = edges()
    upward = sorted(f"{one} -> {other}" for one, other in found if level[other] < level[one])
    assert upward == []
    graph = graphlib.TopologicalSorter()
    for one, other in found:
        graph.add(one, other)
    graph.prepare()  # raises CycleError with the rooms of a circle


@pytest.mark.parametrize("name", ["calibration", "gates", "loss"])
def test_the_mathematics_imports_no_fairseq(name: str):
    for file in (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(one.split(".")[0] == "fairseq" for one in names), file


WITHOUT_FAIRSEQ = """
import importlib.abc, sys

asked = []
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("fairseq", "fairseq_cli", "hydra", "omegaconf"):
            asked.append(name)
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
before = sys.excepthook

import torch
from hgkd_fairseq.calibration import CalibrationHistogram, FineHistogram, SentenceBootstrap
from hgkd_fairseq.calibration.scores import Predictions, Settings
from hgkd_fairseq.gates import GATES, GateWeights, register_gate
from hgkd_fairseq.loss import IMPLEMENTATIONS, gated_distillation, unusable

@register_gate("margin", equation="g_t = 1[log p_t > log q_t + 0.1]; data 1 - g_t, teacher g_t", source="mine")
def margin(statistics):
    teacher = (statistics.student_logprob - statistics.teacher_logprob > 0.1).float()
    return GateWeights(data=1 - teacher, teacher=teacher)

torch.manual_seed(1)
hidden, weight, bias = torch.randn(4, 6, 16), torch.randn(50, 16), torch.randn(50)
teacher = torch.randn(4, 6, 8), torch.randn(50, 8)
target = torch.randint(2, 50, (4, 6))
target[0, 3:] = 1
assert {"token", "sentence", "always", "margin"} <= set(GATES)
for gate in ("token", "sentence", "always", "margin"):
    expected = None
    for implementation in IMPLEMENTATIONS[1:]:
        if unusable(implementation, "cpu"):
            continue
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight, bias)]
        out = gated_distillation(
            *leaves[:2], *teacher, target, gate=gate, student_bias=leaves[2], top1=True, implementation=implementation
        )
        (out.loss / out.tokens).backward()
        found = [out.loss.detach(), out.teacher_share, *[leaf.grad for leaf in leaves]]
        expected = expected or found  # of "eager"
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=1e-4, atol=1e-5)
    assert implementation != "eager" and expected[2].abs().sum() > 0

kept = out.tokens_mask
sentence = torch.arange(4)[:, None].expand(4, 6)[kept]
confidence, correct = out.confidence[kept].clamp(max=1), out.correct[kept]
histogram, fine, predictions = CalibrationHistogram(20), FineHistogram(), Predictions(Settings(replicates=10))
for each in (histogram, fine):
    each.update(confidence, correct)
predictions.update(sentence, confidence, correct)
scores = {score.key: score.value for score in predictions.scores()}
assert abs(scores["ece"] - histogram.ece()) < 1e-12 and scores["smooth_ece"] == fine.smooth_ece() > 0
assert sys.excepthook is before
assert asked == [], asked
assert not any(name.partition(".")[0] == "fairseq" for name in sys.modules)
"""


def test_the_mathematics_works_without_fairseq():
    """Losses and gradients of every implementation, gates (one of them a user's) and calibration work in a process
    where fairseq cannot be imported, do not try to import it, and leave sys.excepthook as it was."""
    command = [sys.executable, "-c", WITHOUT_FAIRSEQ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
