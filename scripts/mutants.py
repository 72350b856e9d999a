#!/usr/bin/env python3
"""Mutation tests: small faults put into the code one at a time; each should make a test fail.

    python -m venv --system-site-packages .mutants  # with the tests' environment, and: pip install mutmut==3.8.1
    python scripts/mutants.py FOLDER [--only 'hgkd_fairseq.gates*'] [--table]

Copies the checkout to FOLDER, runs mutmut there on gates, loss (without the kernels), sentence_weights and calibration,
and prints how many of the mutants of each module were killed. What survived: `mutmut results` and `mutmut show NAME` in
FOLDER. Started again, it goes on where it was. --table only prints.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("hgkd_fairseq", "tests", "scripts", "setup.py", "README.md", "pyproject.toml")
MUTATED = ("gates", "loss", "sentence_weights", "calibration")
CONFIGURATION = """
[tool.mutmut]
source_paths = ["hgkd_fairseq"]
only_mutate = [{mutated}]
do_not_mutate = ["hgkd_fairseq/loss/native/*.py", "hgkd_fairseq/loss/triton/*.py"]
also_copy = ["scripts", "setup.py", "README.md"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-q", "-m", "not slow", "--deselect", "{isolated}"]
pytest_add_cli_args_test_selection = [{tests}]
"""
# Tests in this process, of the mutated rooms; one starts a Python of its own that sees no mutmut.
TESTS = ("tests/test_gates.py", "tests/loss/test_gated_distillation.py", "tests/loss/test_known_teachers.py")
TESTS += ("tests/test_instance_weights.py", "tests/calibration")
ISOLATED = "tests/loss/test_gated_distillation.py::test_works_where_fairseq_is_not_installed"
KILLED, SURVIVED, UNTESTED = "killed", "survived", "no test"
OUTCOMES = {0: SURVIVED, 33: UNTESTED, 34: "skipped"}  # mutmut's exit codes; all others say that the tests failed


def without_decorators(source: str) -> str:
    """The same program with `name = decorator(name)` below each function that had decorators.

    mutmut leaves out functions with decorators, and so all gates.
    """
    lines = source.splitlines()
    for node in sorted(ast.walk(ast.parse(source)), key=lambda node: getattr(node, "lineno", 0), reverse=True):
        if not isinstance(node, ast.FunctionDef) or not node.decorator_list or node.end_lineno is None:
            continue
        texts = [ast.get_source_segment(source, decorator) or "" for decorator in node.decorator_list]
        if any(
            text.endswith(".setter") or "overload" in text or text in ("staticmethod", "classmethod") for text in texts
        ):
            continue
        indent = " " * node.col_offset
        called = node.name
        for text in reversed(texts):
            called = f"({text})({called})"
        lines.insert(node.end_lineno, f"{indent}{node.name} = {called}")
        first = min(decorator.lineno for decorator in node.decorator_list) - 1
        del lines[first : node.lineno - 1]
    return "\n".join(lines) + "\n"


def prepare(folder: Path) -> None:
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    for room in MUTATED:
        for module in (folder / "hgkd_fairseq" / room).glob("*.py"):
            module.write_text(without_decorators(module.read_text()))
    quoted = ", ".join(f'"hgkd_fairseq/{room}/*.py"' for room in MUTATED)
    tests = ", ".join(f'"{test}"' for test in TESTS)
    with (folder / "pyproject.toml").open("a") as file:
        file.write(CONFIGURATION.format(mutated=quoted, tests=tests, isolated=ISOLATED))


def table(folder: Path) -> str:
    total: collections.Counter[str] = collections.Counter()
    rows = ["| module | mutants | killed | survived | no test | killed, % |", "|---|---|---|---|---|---|"]

    def row(name: str, counts: collections.Counter[str]) -> str:
        tried = counts[KILLED] + counts[SURVIVED] + counts[UNTESTED]
        share = f"{100 * counts[KILLED] / tried:.1f}" if tried else ""
        return f"| {name} | {tried} | {counts[KILLED]} | {counts[SURVIVED]} | {counts[UNTESTED]} | {share} |"

    for path in sorted((folder / "mutants").rglob("*.meta")):
        codes = json.loads(path.read_text())["exit_code_by_key"]
        counts = collections.Counter(OUTCOMES.get(code, KILLED) for code in codes.values() if code is not None)
        if counts:
            rows.append(row(str(path.relative_to(folder / "mutants").with_suffix("")), counts))
            total += counts
    return "\n".join([*rows, row("all", total)])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME", help="mutants, as mutmut calls them; * stands for any"
    )
    parser.add_argument("--table", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.table:
        if not args.folder.exists():
            args.folder.mkdir(parents=True)
            prepare(args.folder)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "mutmut", "run", "--max-children", "1", *args.only]
        code = subprocess.run(command, cwd=args.folder, env=environment, check=False).returncode
        if code:
            return code
    print(table(args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
