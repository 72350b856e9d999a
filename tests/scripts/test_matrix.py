"""matrix.sh without a network: what it takes, and that a row that cannot be made does not end it."""

import subprocess
from pathlib import Path

import pytest
from command_line import ROOT, environment


def matrix(*arguments) -> subprocess.CompletedProcess:
    command = ["bash", ROOT / "scripts" / "matrix.sh", *map(str, arguments)]
    env = environment() | {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": "/dev/null"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


def test_a_row_that_is_not_installed_is_a_line(tmp_path: Path):
    (tmp_path / "mine" / "venv").mkdir(parents=True)  # which is not the script's
    rows = ("3.1", "torch==2.13.0", "fairseq", "3.11", "torch==2.13.0", "fairseq")
    done = matrix("--dir", tmp_path, *rows)
    assert done.returncode == 0
    first, second = done.stdout.splitlines()
    assert first == "| 3.1 | torch==2.13.0 | fairseq | no such Python here |"
    assert second.startswith("| 3.11 | torch==2.13.0 | fairseq | ")
    assert "is not installed: ERROR: " in second or second.endswith("no such Python here |")
    assert list(tmp_path.glob("*/venv")) == [tmp_path / "mine" / "venv"]


@pytest.mark.parametrize(
    "given", [("3.11", "torch"), ("--unknown",), ("--dir",), ("--packages", "/proc/none")], ids=str
)
def test_bad_arguments(given: tuple):
    done = matrix(*given)
    assert done.returncode == 2
    assert done.stderr.startswith("matrix.sh: ")
    assert not done.stdout


def test_help():
    done = matrix("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: matrix.sh")
