"""Tests of untrusted folders and files: pipes and devices are not read, links are not written through, and text does
not become markup."""

import contextlib
import html.parser
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hgkd_fairseq import files
from hgkd_fairseq.data.claims import Claim
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import logs
from hgkd_fairseq.plugin import one_training, training_state
from hgkd_fairseq.report import page, runs, tables
from hgkd_fairseq.teacher import inputs, live

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "scripts" / "fuzz"), str(ROOT / "scripts" / "study")]

import run as study_run  # noqa: E402
import study  # noqa: E402
from structured import GRID, RESULTS, as_toml  # noqa: E402


@contextlib.contextmanager
def in_time(seconds: int = 20) -> Iterator[None]:
    """Raise TimeoutError after `seconds`, so that a reader that blocks on a pipe does not block the tests."""

    def stop(*_):
        raise TimeoutError("it is waited for")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def shard(folder: Path) -> Path:
    """Make a folder of one shard and return the file of the shard."""

    def make(number: int, place: Path) -> int:
        (place / "text").write_text("x")
        return 1

    Shards.create(folder, {}, 1, 1).fill(make)
    return folder / "shard-00000" / "text"


def read_run(file: Path) -> None:
    (file.parent / "generate-test.txt").write_text("H-0\t-1\ta\n")
    runs.read(file.parent, "x")


# Functions that read a file, by the file's name.
READERS: dict[str, Callable[[Path], object]] = {
    "scores.json": lambda file: files.read_json(file),
    "train.log": lambda file: logs.read(file),
    "generate.log": read_run,
    "forced.json": read_run,
    "a.claim": lambda file: Claim(file).take(),
    "cell.json": lambda file: study.read_about(file.parent),
    "dict.txt": lambda file: inputs.languages({"lang_dict": str(file)}),
    "set/shard-00000/text": lambda file: Shards.open(file.parents[1]).files(0),
    "set/shard-00000.json": lambda file: Shards.open(file.parent).files(0),
    "set/manifest.json": lambda file: Shards.open(file.parent),
}


@pytest.mark.parametrize("kind", ["pipe", "link to a device"])
@pytest.mark.parametrize("name", READERS)
def test_what_has_no_end_is_not_read(name: str, kind: str, tmp_path: Path):
    file = tmp_path / name
    if name.startswith("set"):
        shard(tmp_path / "set")
        file.unlink()
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    with in_time(), pytest.raises((UserError, OSError)) as caught:
        READERS[name](file)
    assert str(file) in str(caught.value)
    assert "no regular file" in str(caught.value) or "no file" in str(caught.value)


# Links that are written to

MINE = "what the user has"
WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a training's lock": ("training.lock", lambda file: one_training.hold(str(file.parent))),
    "a checkpoint": ("checkpoint_last.pt.tmp", lambda file: one_training.hold(str(file.parent))),
    "a cell's lock": ("lock", lambda file: study_run.claim(file.parent)),
    "a cell's log": ("train.log", lambda file: files.appending(file)),
}


@pytest.mark.parametrize("name", WRITERS)
def test_no_link_is_written_through(name: str, tmp_path: Path):
    target, folder = tmp_path / "target", tmp_path / "run"
    target.write_text(MINE)
    folder.mkdir()
    file, write = WRITERS[name]
    (folder / file).symlink_to(target)
    with pytest.raises((UserError, OSError), match="link"):
        write(folder / file)
    assert target.read_text() == MINE
    (folder / file).unlink()
    with contextlib.closing(files.appending(folder / file)) as log:
        log.write("x\n")
    with contextlib.closing(files.appending(folder / file)) as log:  # appends
        log.write("y\n")
    assert (folder / file).read_text() == "x\ny\n"


@pytest.mark.parametrize("kind", ["pipe", "pipe that is read", "device", "dangling"])
def test_a_log_is_a_file(kind: str, tmp_path: Path):
    file = tmp_path / "train.log"
    reader = None
    if kind.startswith("pipe"):
        os.mkfifo(file)
        reader = os.open(file, os.O_RDONLY | os.O_NONBLOCK) if kind.endswith("read") else None
    else:
        file.symlink_to("/dev/null" if kind == "device" else tmp_path / "new")
    with in_time(), pytest.raises(OSError, match="remove it"):
        files.appending(file)
    assert not (tmp_path / "new").exists()
    if reader is not None:
        os.close(reader)


# Pages


class Parsed(html.parser.HTMLParser):
    def __init__(self, text: str):
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(name, value or "") for name, value in attributes]


EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onload='alert(1)",
    "</title></pre></style><svg onload=alert(1)>",
    "<a href='javascript:alert(1)'>x</a>",
    "]]><!--<iframe srcdoc=x>",
    "`<b>`<base href=//x>",
    "&lt;script&gt;",
    "$\\mathdefault{x}$ $_{",
    "\x1b]0;title\x07\x1b[2J",
    "\u202e\ud800",
]


def run_of(text: str, folder: Path, signature: str) -> runs.Run:
    """Return a run with `text` as its name and in its logged options and its scores."""
    folder.mkdir()
    settings = {"_name": None, "task": {"_name": "translation", "data": text}, "common": {"user_dir": text, "seed": 7}}
    settings["model"] = {"_name": "transformer", "arch": text}
    lines = [f"fairseq_cli.train | {settings!r}"]
    lines += [f'valid | {{"valid_nll_loss": "{number}", "valid_num_updates": "{number}"}}' for number in (3, 2)]
    content = "".join(f"2026-01-31 12:00:00 | INFO | {line}\n" for line in lines)
    (folder / "train.log").write_text(content, encoding="utf-8", errors="replace")
    log = logs.read(folder / "train.log")
    assert log.settings["data"] == text  # repr() escapes what cannot be encoded
    own = [{**one, "signature": signature} for one in RESULTS["scores"]]
    scores = {**RESULTS, "command": text, "path": text, "subset": signature, "signature": signature, "scores": own}
    return runs.Run(folder, text, log=log, forced=scores)


def test_nothing_of_a_run_becomes_markup(tmp_path: Path):
    texts = [one + other for one, other in zip(EVIL[::2], EVIL[1::2], strict=True)]  # 6 runs, a page's maximum
    report = tables.measure([run_of(text, tmp_path / str(number), texts[0]) for number, text in enumerate(texts)])
    made = page.html(report)
    made.encode()
    parsed = Parsed(made)
    assert not parsed.tags & {"script", "img", "iframe", "a", "base", "object", "embed", "link", "form"}
    for name, value in parsed.attributes:
        assert not name.startswith("on"), name
        assert name not in ("src", "srcdoc", "action", "formaction")
        assert name != "href" or value.startswith("#")
        assert "javascript:" not in value or name == "aria-label"
    assert "\x1b" not in made
    assert "\x1b" not in report.markdown()


# Numbers, depth, quotations


ODD_NUMBERS = ["1e999", "-1e999", "NaN", "Infinity", "9" * 5000, "True", "1_0", "0x1"]
ODD_NUMBERS += ["[" * 100000, '{"a":' * 100000, '"\\ud800"', "\ufeff1"]


@pytest.mark.parametrize("text", ODD_NUMBERS, ids=range(len(ODD_NUMBERS)))
def test_a_number_of_json_is_a_number(text: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json is no file of JSON"):
        files.read_json(tmp_path / "a.json", float)


def test_a_claim_nested_too_deep_is_nobodys(tmp_path: Path):
    for text in ("[" * 100000, '{"a":' * 100000, "", "\xff", "1e999", "null"):
        (tmp_path / "a.claim").write_text(text, encoding="latin-1")
        assert Claim(tmp_path / "a.claim").take() is False


def test_commands_of_a_cell_that_cannot_be_split(tmp_path: Path):
    (tmp_path / "grid.toml").write_text(as_toml(GRID))
    cell = study.Grid(tmp_path / "grid.toml").cells()[0]
    (tmp_path / cell.folder).mkdir(parents=True)
    about = cell.description()
    (tmp_path / cell.folder / "cell.json").write_text(json.dumps(about))
    study_run.check([cell], tmp_path)
    (tmp_path / cell.folder / "cell.json").write_text(json.dumps({**about, "commands": ["fairseq-train 'x"]}))
    with pytest.raises(UserError, match=r"cell\.json holds commands that are none"):
        study_run.check([cell], tmp_path)


@pytest.mark.parametrize(
    ("option", "value"),
    [("langtoks", [1]), ("langtoks", {"main": 3}), ("langs", 3), ("lang_pairs", {"a": 1}), ("data", 3), ("_name", [1])],
)
def test_options_of_a_teachers_task_of_another_type(option: str, value: object):
    task = {"_name": "translation_multi_simple_epoch", option: value}
    with pytest.raises(UserError, match=f"of the options of a checkpoint's task {option}"):
        inputs.check_added("x.pt", task, {})
    with pytest.raises(UserError, match=option):
        live.own_dictionaries("x.pt", task, (None, None), ("de", "en"))


@pytest.mark.parametrize("value", ["3", -1, 2**70, True, [3], torch.ones(1), None, float("nan")])
def test_progress_of_a_checkpoint_is_a_number(value: object):
    state = training_state.TrainingState()
    state.resume({"updates": value, "fitted_temperature": value, "gate": {}})
    assert (state.updates, state.fitted_temperature) == (None, None)
    assert state.progress(9) == 0
    state.resume({"updates": 3, "fitted_temperature": 1.5})
    assert (state.progress(9), state.fitted_temperature) == (1 / 3, 1.5)
