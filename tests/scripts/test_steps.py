"""What quickstart, recipes and data scripts share: folders to work in, records of what is finished, a lock."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

STEPS = Path(__file__).parents[2] / "scripts" / "steps.sh"


def bash(code: str, folder: Path) -> subprocess.CompletedProcess:
    script = f"set -euo pipefail; source {STEPS}; PYTHON={sys.executable}\n{code}"
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_a_record_is_of_the_content(tmp_path):
    """A file that is cut short, changed, empty or gone is not what was recorded; nor is one of a like name."""
    run = tmp_path / "run"
    run.mkdir()
    for name in ("forced.json", "scaled_forced.json"):
        (run / name).write_text(name)

    def recorded(*names: str) -> bool:
        return bash(f"recorded run {' '.join(names)}", tmp_path).returncode == 0

    assert not recorded("forced.json")
    assert bash("record run scaled_forced.json", tmp_path).returncode == 0
    assert recorded("scaled_forced.json")
    assert not recorded("forced.json")
    with open(run / "recorded", "a") as file:  # killed while it wrote
        file.write("0123")
    assert bash("record run forced.json", tmp_path).returncode == 0
    assert bash("record run forced.json", tmp_path).returncode == 0
    assert recorded("forced.json", "scaled_forced.json")
    for content in ("forced.jso", "forced.jsoN", ""):
        (run / "forced.json").write_text(content)
        assert not recorded("forced.json", "scaled_forced.json")
    (run / "forced.json").unlink()
    assert not recorded("scaled_forced.json", "forced.json")
    (run / "recorded").write_text("")
    assert not recorded("scaled_forced.json")


def test_a_folder_that_two_make_at_once(tmp_path):
    """The second one says so. Its work folder is left to the next call, or removed if that would not find it."""
    code = 'work_folder out; touch "$partial/x"; finish out'
    assert bash(code, tmp_path).returncode == 0
    for begin, left in (("", ["out", "out.partial"]), ("mkdir -p out.partial; ", ["out", "out.partial"])):
        second = bash(begin + code, tmp_path)
        assert second.returncode == 1
        assert "another run has made out meanwhile; start again" in second.stderr
        assert sorted(one.name for one in tmp_path.iterdir()) == left
        shutil.rmtree(tmp_path / "out.partial")
    assert bash(code, tmp_path).returncode == 1
    assert bash("rm -r out; work_folder out; finish out", tmp_path).returncode == 0
    assert [one.name for one in tmp_path.iterdir()] == ["out"]
    assert [one.name for one in (tmp_path / "out").iterdir()] == ["x"]


def test_settings_are_compared_with_those_of_the_run(tmp_path):
    """A teacher by what it is, and not by its path; one that is not there yet says nothing."""
    (tmp_path / "run").mkdir()
    (tmp_path / "a b.pt").write_text("one")
    asked = "begun_otherwise run \"$(echo --lr 1; hashes 'a b.pt:gone.pt')\""
    assert bash(asked, tmp_path).returncode == 1  # none was begun
    code = "printf '%s\\n' \"$(echo --lr 1; hashes 'a b.pt:gone.pt')\" >run/settings"
    assert bash(code, tmp_path).returncode == 0
    assert len((tmp_path / "run/settings").read_text().splitlines()) == 2
    assert bash(asked, tmp_path).returncode == 1
    assert bash(asked.replace("--lr 1", "--lr 2"), tmp_path).returncode == 0
    (tmp_path / "a b.pt").write_text("another")
    assert bash(asked, tmp_path).returncode == 0


def test_a_lock_is_that_of_what_was_left_running(tmp_path):
    """And names its owner; it ends with the last of them."""
    left = bash("lock .; sleep 60 >/dev/null 2>&1 & echo $!", tmp_path)
    pid = int(left.stdout)
    try:
        second = bash("lock . || exit 7; echo works", tmp_path)
        assert (second.returncode, second.stdout) == (7, "")
        assert second.stderr == f". is being worked on by process {pid} (sleep): wait until it has ended, or end it\n"
    finally:
        os.kill(pid, 9)
    assert bash("lock . && unlock && lock . && echo works", tmp_path).stdout == "works\n"


@pytest.mark.parametrize("kind", ["none", "ours", "folder", "file", "link"])
def test_folders_to_work_in(kind, tmp_path):
    """Ours is used again; what somebody else has under the name stays as it is."""
    partial = tmp_path / "out.partial"
    (tmp_path / "elsewhere").mkdir()
    if kind == "ours":
        assert bash("work_folder out; touch $partial/download", tmp_path).returncode == 0
    elif kind == "folder":
        partial.mkdir()
    elif kind == "file":
        partial.write_text("mine")
    elif kind == "link":
        partial.symlink_to("elsewhere")
    done = bash("umask 027; work_folder out; touch $partial/text; ls $partial; finish out; stat -c %a out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        *(["download"] if kind == "ours" else []),
        "text",
        "755" if kind == "ours" else "750",
    ]
    assert os.path.lexists(partial) == (kind in ("folder", "file", "link"))
    assert not list((tmp_path / "elsewhere").iterdir())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == done.stdout.split()[:-1]


@pytest.mark.parametrize(
    ("text", "value"), [("08", "8"), ("0", "0"), ("007", "7"), ("1234567890", ""), ("-1", ""), ("1a", ""), ("", "")]
)
def test_whole_numbers(text, value, tmp_path):
    done = bash(f"whole_number '{text}' || true", tmp_path)
    assert done.stdout.strip() == value
