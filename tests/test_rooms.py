"""The rooms of the package: imports run downward, in no circle, and the mathematics needs no fairseq."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hgkd_fairseq"
# Each line may import those below it, and rooms of its own line as long as they do not import it back.
LEVELS = [
    {"cli", "doctor", "export", "methods", "report", "sequence_level", "tasks"},
    {"criterions", "evaluation"},
    {"data", "plugin", "sentence_weights", "teacher"},
    {"loss"},
    {"gates"},
    {"calibration"},
    {"arguments", "cache", "drawing", "errors", "files", "ranges"},
]
# What fairseq must find registered, whichever of these it comes to first.
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
    circles = sorted(f"{one} <-> {other}" for one, other in found if (other, one) in found and one < other)
    assert circles == []


@pytest.mark.parametrize("name", ["calibration", "gates", "loss"])
def test_the_mathematics_imports_no_fairseq(name: str):
    for file in (PACKAGE / name).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                assert not any(one.split(".")[0] == "fairseq" for one in names), file


def test_importing_the_mathematics_changes_nothing():
    """In a process of its own, where fairseq is installed: it is not even imported."""
    code = """
import sys
before = sys.excepthook
import hgkd_fairseq.calibration, hgkd_fairseq.gates, hgkd_fairseq.loss
from hgkd_fairseq.loss import gated_distillation
assert sys.excepthook is before
assert not any(name.split('.')[0] == 'fairseq' for name in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
