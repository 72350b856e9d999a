#!/usr/bin/env python3
"""Mutation testing: insert small faults into the code, one at a time, each of which should make a test fail.

    pip install mutmut==3.8.1  # into .venv, or an environment that sees it
    python scripts/mutants.py FOLDER [--sample N] [--seed S] [--table] [--survivors]

The script copies the checkout to FOLDER and runs mutmut there on gates, loss (without the kernels), sentence_weights
and calibration. Mutants of functions that run on import, or whose results are cached, are tested in separate processes,
because mutmut cannot change these functions in a running process. The script prints how many mutants of each module
were killed. If it is started again, it resumes.
"""

from __future__ import annotations

import argparse
import ast
import collections
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = ("hgkd_fairseq", "tests", "scripts", "setup.py", "README.md", "pyproject.toml")
# The subpackages that are mutated, and their tests that run in one process and take seconds.
TESTS = {
    "gates": ("tests/test_gates.py", "tests/test_cli.py"),
    "loss": (
        *("tests/loss/test_equations.py", "tests/loss/test_known_teachers.py"),
        *("tests/loss/test_gated_distillation.py", "tests/loss/test_properties.py"),
    ),
    "sentence_weights": (
        *("tests/test_instance_weights.py", "tests/fairseq_runs/test_refresh.py"),
        "tests/plugin/test_checkpoints.py",
    ),
    "calibration": ("tests/calibration",),
}
CONFIGURATION = """
[tool.mutmut]
source_paths = ["hgkd_fairseq"]
only_mutate = [{mutated}]
do_not_mutate = ["hgkd_fairseq/loss/native/*.py", "hgkd_fairseq/loss/triton/*.py"]
also_copy = ["scripts", "setup.py", "README.md"]
pytest_add_cli_args = ["-p", "no:cacheprovider", "-q", "-m", "not slow"]
pytest_add_cli_args_test_selection = [{tests}]
"""
# Functions that run on import, or whose results are cached: mutmut's child processes inherit the parent's results.
OF_THE_PARENT = (
    *("gates.registry.x_register_gate", "gates.registry.x_declared_parameters", "gates.registry.x_all_parameters"),
    *("loss.equations.x_register_divergence", "loss.rows.x_difference_of"),
)
KILLED, SURVIVED, UNTESTED = "killed", "survived", "no test"
# By mutmut's exit code: 5 and 33 are no tests, 34 is skipped. All others count as killed.
OUTCOMES = {0: SURVIVED, 5: UNTESTED, 33: UNTESTED, 34: UNTESTED}


def without_decorators(source: str) -> str:
    """Return an equivalent program in which `name = decorator(name)` below each function replaces its decorators.

    mutmut skips functions with decorators, which all gates have.
    """
    lines = source.splitlines()
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda function: function.lineno, reverse=True):
        texts = [ast.get_source_segment(source, decorator) or "" for decorator in node.decorator_list]
        if not texts or node.end_lineno is None or set(texts) & {"staticmethod", "classmethod"}:
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
    for room in TESTS:
        for module in (folder / "hgkd_fairseq" / room).glob("*.py"):
            module.write_text(without_decorators(module.read_text()))
    mutated = ", ".join(f'"hgkd_fairseq/{room}/*.py"' for room in TESTS)
    tests = ", ".join(f'"{test}"' for tests in TESTS.values() for test in tests)
    with (folder / "pyproject.toml").open("a") as file:
        file.write(CONFIGURATION.format(mutated=mutated, tests=tests))


def mutmut(folder: Path, *words: str) -> int:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-m", "mutmut", *words], cwd=folder, env=environment, check=False).returncode


def outcomes(folder: Path) -> dict[str, dict[str, int | None]]:
    """Return for each module the exit codes by mutant, None for a mutant that has not been tested."""
    found = {}
    for path in sorted((folder / "mutants").rglob("*.meta")):
        if codes := json.loads(path.read_text())["exit_code_by_key"]:
            found[str(path.relative_to(folder / "mutants").with_suffix(""))] = codes
    return found


def in_a_process_of_its_own(folder: Path, module: str, name: str) -> None:
    """Test one mutant in a new process and record the exit code in mutmut's file of the module."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MUTANT_UNDER_TEST": name}
    options = ("-x", "-q", "-p", "no:cacheprovider", "-m", "not slow")
    command = [sys.executable, "-m", "pytest", *options, *TESTS[module.split("/")[1]]]
    run = subprocess.run(command, cwd=folder / "mutants", env=environment, capture_output=True, check=False)
    meta = folder / "mutants" / f"{module}.meta"
    content = json.loads(meta.read_text())
    content["exit_code_by_key"][name] = run.returncode if run.returncode in OUTCOMES else 1
    meta.write_text(json.dumps(content, indent=4))
    print(f"{OUTCOMES.get(run.returncode, KILLED)} {name}", flush=True)


def table(folder: Path) -> str:
    rows = ["| module | mutants | killed | survived | no test | killed, % |", "|---|---|---|---|---|---|"]
    total: collections.Counter[str] = collections.Counter()

    def row(name: str, counts: collections.Counter[str]) -> str:
        tried = counts.total()
        figures = (tried, counts[KILLED], counts[SURVIVED], counts[UNTESTED], f"{100 * counts[KILLED] / tried:.1f}")
        return f"| {name} | {' | '.join(map(str, figures))} |"

    for module, codes in outcomes(folder).items():
        counts = collections.Counter(OUTCOMES.get(code, KILLED) for code in codes.values() if code is not None)
        if counts:
            rows.append(row(f"`{module.removeprefix('hgkd_fairseq/')}`", counts))
            total += counts
    return "\n".join([*rows, row("all", total)]) if total else "no mutant was tried"


def run(folder: Path, sample: int | None, seed: int) -> int:
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")  # an incomplete copy is discarded
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        prepare(partial)
        partial.rename(folder)
    # The first run generates all mutants, from which the sample is drawn.
    if not (folder / "mutants").exists() and (
        code := mutmut(folder, "run", "hgkd_fairseq.gates.hard.x_token__mutmut_1")
    ):
        return code
    drawn = random.Random(seed)
    wanted = {
        module: sorted(drawn.sample(sorted(codes), min(sample or len(codes), len(codes))))
        for module, codes in outcomes(folder).items()
    }
    names = [name for names in wanted.values() for name in names]
    apart = {name for name in names if any(f".{function}__mutmut" in name for function in OF_THE_PARENT)}
    if code := mutmut(folder, "run", "--max-children", "1", *[name for name in names if name not in apart]):
        return code
    for module, codes in outcomes(folder).items():
        for name in wanted[module]:
            if codes[name] == 33 or (name in apart and codes[name] is None):
                in_a_process_of_its_own(folder, module, name)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--sample", type=int, metavar="N", help="at most so many of each module, drawn (default: all)")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="of the draw (default: 1)")
    parser.add_argument("--table", action="store_true", help="run nothing, print the table")
    parser.add_argument("--survivors", action="store_true", help="run nothing, print the mutants that no test saw")
    args = parser.parse_args()
    if args.survivors:
        for codes in outcomes(args.folder).values():
            for name in (name for name, code in codes.items() if code in OUTCOMES):
                mutmut(args.folder, "show", name)
        return 0
    if not args.table and (code := run(args.folder, args.sample, args.seed)):
        return code
    print(table(args.folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
