"""quickstart.sh's own messages; what it runs is tested piece by piece elsewhere."""

import os
import subprocess
from pathlib import Path

import pytest

QUICKSTART = Path(__file__).parents[2] / "scripts" / "quickstart.sh"


def quickstart(*arguments) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "HGKD_DATA"}
    return subprocess.run(
        ["bash", str(QUICKSTART), *map(str, arguments)],
        env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "status", "expected"),
    [
        (["--smok"], 2, "unknown argument --smok; known are --smoke, --dir DIR, --from FOLDER"),
        (["--dir"], 2, "--dir needs a folder"),
        (["--dir", "/nowhere/x:y"], 2, "fairseq takes a ':' for the end of a path; choose a folder without one"),
    ],
)
def test_usage(arguments, status, expected):
    done = quickstart(*arguments)
    assert done.returncode == status
    assert expected in done.stderr


def test_a_folder_without_data_names_the_remedy(tmp_path):
    """--from never falls back to a download: what the user named is what the user means."""
    (tmp_path / "empty").mkdir()
    done = quickstart("--smoke", "--dir", tmp_path / "run", "--from", tmp_path / "empty")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last == ("quickstart.sh: no data: name a folder with Multi30K's train.de.gz and so on in --from FOLDER")
