"""Label noise: which targets are shuffled, that all stay, and what is refused."""

import contextlib
import importlib.util
import io
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "study" / "add_label_noise.py"
LINES = [f"target {number}" for number in range(200)]


def run(*arguments) -> subprocess.CompletedProcess:
    """The script in this process, which has the package's imports behind it."""
    spec = importlib.util.spec_from_file_location("add_label_noise", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    command = [str(argument) for argument in arguments]
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            code = script.main(command)
        except SystemExit as exit:
            code = exit.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), errors.getvalue())


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "train.de").write_text("".join(f"Quelle {number}\n" for number in range(200)))
    (folder / "train.en").write_text("".join(f"{line}\n" for line in LINES))
    (folder / "valid.en").write_text("valid\n")
    return folder


def read(folder: Path) -> tuple[list[str], list[int]]:
    numbers = [int(line) for line in (folder / "noisy.txt").read_text().splitlines()]
    return (folder / "train.en").read_text().splitlines(), numbers


def test_a_share_of_the_targets_changes_places(text: Path, tmp_path: Path):
    done = run(text, tmp_path / "noisy", "--noise-share", 0.3)
    assert done.returncode == 0, done.stderr
    assert "60 of 200 targets belong to other sources" in done.stdout
    lines, numbers = read(tmp_path / "noisy")
    assert numbers == [number for number in range(200) if lines[number] != LINES[number]]
    assert len(numbers) == 60
    assert sorted(lines) == sorted(LINES)
    for name in ("train.de", "valid.en"):
        assert (tmp_path / "noisy" / name).read_text() == (text / name).read_text()


def test_copies_of_the_sources(text: Path, tmp_path: Path):
    done = run(text, tmp_path / "noisy", "--noise-share", 0.3, "--kind", "copy")
    assert done.returncode == 0, done.stderr
    assert "60 of 200 targets are copies of their sources" in done.stdout
    lines, numbers = read(tmp_path / "noisy")
    assert len(numbers) == 60
    assert lines == [f"Quelle {at}" if at in numbers else LINES[at] for at in range(200)]
    (text / "train.fr").write_text("".join("x\n" for _ in LINES))
    refused = run(text, tmp_path / "other", "--kind", "copy")
    assert refused.returncode == 2
    assert "has train. of 3 languages; it needs two" in refused.stderr


def test_seeds(text: Path, tmp_path: Path):
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        assert run(text, tmp_path / name, "--seed", seed).returncode == 0
    assert read(tmp_path / "one") == read(tmp_path / "again")
    assert read(tmp_path / "one")[1] != read(tmp_path / "other")[1]


def test_clean_pairs_are_set_aside(text: Path, tmp_path: Path):
    done = run(text, tmp_path / "noisy", "--noise-share", 0.5, "--clean", 50)
    assert done.returncode == 0, done.stderr
    assert "75 of 150 targets" in done.stdout
    lines, numbers = read(tmp_path / "noisy")
    assert sorted(lines) == sorted(LINES[:150])
    assert numbers == [number for number in range(150) if lines[number] != LINES[number]]
    assert (tmp_path / "noisy/valid1.en").read_text().splitlines() == LINES[150:]
    for name, rows in (("train", range(150)), ("valid1", range(150, 200))):
        assert (tmp_path / f"noisy/{name}.de").read_text().splitlines() == [f"Quelle {number}" for number in rows]


@pytest.mark.parametrize("share", [0, 0.005])
def test_too_few_to_change_places(text: Path, tmp_path: Path, share: float):
    assert run(text, tmp_path / "noisy", "--noise-share", share).returncode == 0
    assert read(tmp_path / "noisy") == (LINES, [])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--noise-share", 1.5), "1.5 is no share; it must be between 0 and 1"),
        (("--clean", 200), "--clean 200: {text}/train.en has 200 lines; some must stay to be trained on"),
        (("--target", "fr"), "train.fr does not exist; give a folder with train.fr, or another --target"),
    ],
)
def test_refused(text: Path, tmp_path: Path, given: tuple, expected: str):
    done = run(text, tmp_path / "noisy", *given)
    assert done.returncode == 2
    assert expected.format(text=text) in done.stderr
    assert not (tmp_path / "noisy").exists()


def test_nothing_is_overwritten(text: Path):
    done = run(text, text)
    assert done.returncode == 2
    assert "exists; give the name of a new folder" in done.stderr


def test_a_line_ends_at_its_line_feed(text: Path, tmp_path: Path):
    """A carriage return, a form feed or U+2028 within a line of one side shifts no pair."""
    odd = [f"a\rb\x0cc\u2028d\x85e {number}" if number % 3 == 0 else line for number, line in enumerate(LINES)]
    (text / "train.en").write_bytes("".join(f"{line}\n" for line in odd).encode())
    done = run(text, tmp_path / "noisy", "--noise-share", 0.5, "--clean", 50)
    assert done.returncode == 0, done.stderr
    numbers = [int(line) for line in (tmp_path / "noisy/noisy.txt").read_text().split()]
    found = {name: (tmp_path / "noisy" / name).read_bytes().decode().split("\n") for name in ("train.en", "valid1.en")}
    assert [number for number in range(150) if found["train.en"][number] != odd[number]] == numbers
    assert found["valid1.en"] == [*odd[150:], ""]
    assert (tmp_path / "noisy/valid1.de").read_text().split("\n")[0] == "Quelle 150"


@pytest.mark.parametrize("name", ["train.de", "train.en"])
def test_sides_of_different_length_are_refused(name: str, text: Path, tmp_path: Path):
    with (text / name).open("a") as file:
        file.write("one more\n")
    done = run(text, tmp_path / "noisy")
    assert done.returncode == 2
    assert "train.en has" in done.stderr
    assert "train.de" in done.stderr
    assert "give a pair on each line" in done.stderr
    assert not (tmp_path / "noisy").exists()
