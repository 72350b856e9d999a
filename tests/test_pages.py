"""Tests of the documentation pages: links resolve, pages are short, and programs take the options of their commands."""

import argparse
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import command_line as cl
import pytest

from hgkd_fairseq import cli, plugin

ROOT = cl.ROOT
PAGES = {
    str(page.relative_to(ROOT)): page
    for folder in ("hgkd_fairseq", "scripts", "tests", "data-bin")
    for page in sorted((ROOT / folder).rglob("*.md"))
} | {"README.md": ROOT / "README.md"}
LONGEST = {"README.md": 150}
RESULTS = re.compile(r"scripts/\w+/results/\w[\w-]*/")  # pages written by a script
# What a shell block that no test runs may declare in its first line, "# needs ...".
NEEDS = ("data", "a network", "a GPU", "minutes")
TYPED = ("README.md", "hgkd_fairseq/CONTRIBUTING.md", "hgkd_fairseq/gates/README.md")


def blocks(page: str, language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^\1```$", PAGES[page].read_text(), flags=re.DOTALL | re.MULTILINE)
    return [re.sub(rf"(?m)^{indent}", "", text) for indent, text in found]


def needs(block: str) -> str | None:
    """Return what a shell block declares in a first line "# needs ...", or None."""
    found = re.match(r"# needs (.+)\n", block)
    return found[1] if found else None


def commands(block: str) -> list[list[str]]:
    """Return the words of each command of a shell block, with continuation lines joined."""
    lines = block.replace("\\\n", " ").replace("$(hgkd user-dir)", cl.USER_DIR[1]).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str):
    for file, _, section in re.findall(r"\]\((?!\w+:)([^)#\s]*)(#([^)\s]*))?\)", PAGES[page].read_text()):
        target = PAGES[page].parent / file if file else PAGES[page]
        assert target.exists(), file
        if section:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert section in map(anchor, headings), f"{file}#{section}"


@pytest.mark.parametrize("page", [page for page in PAGES if not RESULTS.match(page)])
def test_length(page: str):
    assert len(PAGES[page].read_text().splitlines()) <= LONGEST.get(page, 149)


def test_every_room_has_a_page():
    for room in (ROOT / "hgkd_fairseq").iterdir():
        if room.is_dir() and any(room.glob("*.py")) and room.name != "tasks":  # described on the page of criterions
            assert f"hgkd_fairseq/{room.name}/README.md" in PAGES


def test_table_of_gates():
    found = re.search(
        r"<!-- gates: .*? -->\n\n(.*?)\n\n<!-- end of gates -->",
        PAGES["hgkd_fairseq/gates/README.md"].read_text(),
        flags=re.DOTALL,
    )
    # In a new process, because other tests register gates.
    done = subprocess.run(
        [sys.executable, "-m", "hgkd_fairseq.cli", "gates", "--markdown"],
        cwd=ROOT, env=cl.environment(), capture_output=True, text=True, timeout=cl.TIMEOUT_S, check=True,
    )  # fmt: skip
    assert found[1] == done.stdout.strip(), "write the output of `hgkd gates --markdown` between the two comments"


def test_table_of_methods():
    written = (ROOT / "hgkd_fairseq" / "methods.toml").read_text()
    rows = [f"| {it['title']} | `{name}` | `{it['options']}` |" for name, it in tomllib.loads(written).items()]
    assert "\n" + "\n".join(rows) + "\n\n" in PAGES["hgkd_fairseq/METHODS.md"].read_text()


def test_tables_of_the_study():
    """Each row of the page's tables occurs in a table written by the study's script."""
    page = PAGES["scripts/study/results/README.md"]
    written = [line for file in page.parent.glob("*/tables.md") for line in file.read_text().splitlines()]
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) > 20
    assert set(rows) <= set(written)


def test_package_index_and_source_distribution(tmp_path: Path):
    """The description for a package index, which lacks the other files, has no relative links; the source distribution
    has all pages."""
    setup = [sys.executable, "setup.py", "--quiet"]
    shown = subprocess.run([*setup, "--long-description"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "A step of" in " ".join(shown.split())
    assert re.findall(r"\]\((?!https://)[^)]*\)", shown) == []
    assert "loss/ (`hgkd_fairseq/loss/README.md`)" in shown
    subprocess.run([*setup, "egg_info", "--egg-base", tmp_path], cwd=ROOT, capture_output=True, check=True)
    listed = (tmp_path / "hgkd_fairseq.egg-info" / "SOURCES.txt").read_text().splitlines()
    assert set(PAGES) <= set(listed)
    required = (tmp_path / "hgkd_fairseq.egg-info" / "requires.txt").read_text().splitlines()
    assert "scipy>=1.12" in required  # for calibration/corp.py; fairseq requires no version


def option_strings(parser: argparse.ArgumentParser) -> set[str]:
    found = set(parser._option_string_actions)  # argparse has no public function for it
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= set().union(*map(option_strings, action.choices.values()))
    return found


def fairseq_parser(program: str) -> argparse.ArgumentParser:
    from fairseq import options

    plugin.register()
    kind = program.removeprefix("fairseq-")
    kind = {"train": "training", "preprocess": "preprocessing", "generate": "generation"}.get(kind, kind)
    return getattr(options, f"get_{kind}_parser")()


@cache
def fairseq_options() -> set[str]:
    """Return the options of fairseq's programs, with the plugin's tasks and criterion and a transformer."""
    from fairseq import options

    found: set[str] = set()
    for program in ("generation", "preprocessing", "validation"):
        found |= option_strings(fairseq_parser(program))
    for task in ("translation", "translation_multi_simple_epoch", "translation_from_pretrained_bart"):
        parser = fairseq_parser("train")
        words = ["--task", f"{task}_with_teacher", "--criterion", "hard_gate_kd", "--arch", "transformer"]
        options.parse_args_and_arch(parser, ["data", *words, "--optimizer", "adam"])
        found |= option_strings(parser)
    return found


def script_options(file: Path) -> set[str]:
    """Return the options that occur in the code of a script, in its parser or its `case` statement."""
    sources = [file, *(file.parent.glob("common.sh") if file.suffix == ".sh" else ())]
    return set(re.findall(r'(?<![\w-])--[a-z][\w-]*(?=[" |)\]])', "".join(one.read_text() for one in sources)))


def check(words: list[str]) -> None:
    """Assert that the program of a command takes the command's options."""
    from fairseq import options

    program, *arguments = words
    if program == "hgkd":
        for word in arguments:
            Path(word).parent.mkdir(parents=True, exist_ok=True)  # the parser refuses an output without a folder
        cli.parser().parse_args(arguments)
    elif program == "fairseq-preprocess":
        fairseq_parser(program).parse_args(arguments)
    elif program in ("fairseq-train", "fairseq-generate"):
        options.parse_args_and_arch(fairseq_parser(program), arguments)
    elif program in ("bash", "python", "sbatch"):
        place = next(index for index, word in enumerate(arguments) if word.startswith("scripts/"))
        script, rest = ROOT / arguments[place], arguments[place + 1 :]
        assert script.is_file(), script
        if script.name == "slurm.sh":
            script = script.with_name(f"{rest[0]}.sh")
        cut = rest.index("--") if "--" in rest else len(rest)
        for known, given in ((script_options(script), rest[:cut]), (fairseq_options(), rest[cut + 1 :])):
            assert {word for word in given if word.startswith("--")} <= known
        for word in rest:
            assert not word.startswith("scripts/") or (ROOT / word).exists(), word
    else:
        raise AssertionError(f"no test knows the program {program}")


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "sh")])
def test_shell_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each shell block is run by `test_as_typed`, or declares what it needs and has options that its programs take."""
    monkeypatch.chdir(tmp_path)
    for block in blocks(page, "sh"):
        if needs(block) is None:
            assert page in TYPED, f'say what it takes in its first line: "# needs {NEEDS[0]}"\n{block}'
            continue
        assert needs(block).split(":")[0] in NEEDS
        for words in commands(block):
            check(words)


@pytest.mark.parametrize("page", PAGES)
def test_options_in_the_text(page: str):
    scripts = [file for file in (ROOT / "scripts").rglob("*") if file.suffix in (".py", ".sh")]
    known = fairseq_options() | option_strings(cli.parser()) | set().union(*map(script_options, scripts))
    known |= {"--user-dir", "--help", "--paired-bs"}  # the last one is sacrebleu's
    code = " ".join(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", PAGES[page].read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) <= known


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each Python block runs as it stands, except those that `test_as_typed` writes to files."""
    for block in blocks(page, "python"):
        if not re.match(r"# \S+\.py", block):
            (tmp_path / "block.py").write_text(block)
            runpy.run_path(str(tmp_path / "block.py"))


def prepare(page: str, folder: Path, data: Path, teacher: cl.Run) -> None:
    """Make what the page's commands use: the data, a teacher except for the main page, and the files that it shows."""
    (folder / "data-bin").mkdir()
    (folder / "data-bin" / "corpus").symlink_to(data)
    if page != "README.md":
        (folder / "runs" / "teacher").mkdir(parents=True)
        (folder / "runs" / "teacher" / "checkpoint_best.pt").symlink_to(teacher.path("checkpoint_best.pt"))
    for block in blocks(page, "python"):
        if file := re.match(r"# (\S+\.py)", block):
            (folder / file[1]).parent.mkdir(exist_ok=True)
            with (folder / file[1]).open("a") as output:
                output.write(block)


def type_commands(page: str, folder: Path) -> list[cl.Result]:
    """Run the commands of a page, with more options after their own that make training and search short and small."""
    short = (*cl.SIZE, *cl.LOGS, "--max-update", 4, *(("--warmup-updates", 1) if page == "README.md" else ()))
    results = []
    for words in [words for block in blocks(page, "sh") if needs(block) is None for words in commands(block)]:
        if words[0] == "hgkd":
            few = ["--generate", "--beam 2 --max-len-b 5"] if words[1] == "score" else []
            assert cli.main([*words[1:], *few]) == 0, words
            continue
        assert words[0] == "fairseq-train"
        results.append(cl.fairseq("train", *words[1:], *short, cwd=folder))
        assert results[-1].code == 0, results[-1].end()
    return results


@pytest.mark.parametrize("page", TYPED)
def test_as_typed(page: str, data: Path, teacher: cl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    prepare(page, tmp_path, data, teacher)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    results = type_commands(page, tmp_path)
    assert 0 <= results[-1].logs("train")[-1]["teacher_share"] <= 1
    if page == "README.md":
        assert "teacher" in (tmp_path / "report.html").read_text()
        assert "ECE" in (tmp_path / "runs" / "student" / "forced.json").read_text()
    elif "gates" in page:
        found = cl.load(tmp_path / "runs" / "margin" / "checkpoint_last.pt")["cfg"]["criterion"]
        assert (found["gate"], found["margin"]) == ("margin", 0.2)
