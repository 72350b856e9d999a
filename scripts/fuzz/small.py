"""Fuzzing of the remaining readers: task options and extra state of checkpoints, binarised data, score files,
references, claims, records of a study and of `hgkd score`, HTML pages and sentencepiece models. fuzz.py runs them."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import io
import json
import random
import shutil
import string
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import folders
import structured
from checkpoints import bytes_changed
from fairseq.data import Dictionary
from fairseq.tasks import FairseqTask
from structured import as_json, contents, number_lists

from hgkd_fairseq.data.claims import Claim
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import generated, segments, steps
from hgkd_fairseq.plugin import binarised, training_state
from hgkd_fairseq.teacher import inputs, live

SCRIPTS = Path(__file__).parents[1]


def script(path: Path):
    """Import a script from its path and return it as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


align = script(SCRIPTS / "align_libreoffice.py")
run = script(SCRIPTS / "study" / "run.py")
encode_text = script(SCRIPTS / "encode_text.py")


# Checkpoints' options

TASK: dict[str, Any] = {
    "_name": "translation",
    "data": "bin",
    "source_lang": "de",
    "target_lang": "en",
    "langs": ["de", "en"],
    "lang_pairs": "de-en,en-de",
    "langtoks": {"main": ["src", "tgt"]},
    "langtoks_specs": ["main"],
    "encoder_langtok": "src",
    "decoder_langtok": True,
    "lang_tok_style": "multilingual",
    "lang_tok_replacing_bos_eos": False,
    "enable_lang_ids": False,
    "lang_dict": None,
    "fixed_dictionary": None,
    "source_dict": None,
    "prepend_bos": False,
    "extra_data": None,
}
NAMES = ("translation", "translation_multi_simple_epoch", "translation_from_pretrained_bart_with_teacher", 3, None, [])


def tasks(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated options of a teacher's task endlessly.

    Names of folders and files in them are those of the test data, of devices or of nothing.
    """
    where = (str(folders.data()), "/dev/zero", "/proc/self/mem", "/dev/stdin", "/", "")
    made = contents(TASK, as_json, rng)
    while True:
        try:
            task = json.loads(next(made))
        except (ValueError, RecursionError):
            continue
        if isinstance(task, dict):
            task["_name"] = rng.choice(NAMES)
            for name, more in (("data", ""), ("lang_dict", "/dict.de.txt"), ("fixed_dictionary", "/dict.de.txt")):
                if rng.random() < (0.8 if name == "data" else 0.2):
                    task[name] = rng.choice(where) + more * (rng.random() < 0.8)
            yield as_json(task).encode()


@functools.cache
def dictionary() -> Dictionary:
    return Dictionary.load(str(folders.data() / "dict.de.txt"))


def from_json(path: str | Path) -> dict[str, Any]:
    """Read a part of a checkpoint from JSON.

    Raises:
        UserError: it is not a dict, which the checkpoint loader refuses as well.
    """
    try:
        found = json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is no JSON") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no dict")
    return found


def read_task(path: str | Path) -> None:
    """Check the options of a teacher's task and load its own dictionaries, as done before its model is built."""
    task = from_json(path)
    inputs.check_added("x.pt", task, {})
    live.own_dictionaries("x.pt", task, (dictionary(), dictionary()), ("de", "en"))


MEMORY: dict[str, Any] = {
    "Task": {"method": {"gate": "token", "teacher_source": "checkpoint"}, "updates": 3, "teacher": "x", "gate": {}},
    "train_iterator": {"epoch": 1},
    "ema": None,
}


def read_memory(path: str | Path) -> None:
    """Read the extra state of a checkpoint as a resumed training does."""
    extra = from_json(path)
    memory = training_state.memory_in(extra)
    held = training_state.method_of({"cfg": argparse.Namespace(criterion=CRITERION), "extra_state": extra})
    problem = training_state.differences({"gate": "token"}, held or {})
    assert isinstance(problem, str)
    state = training_state.TrainingState()
    state.resume(memory)
    state.progress(100)


CRITERION = argparse.Namespace(_name="hard_gate_kd", gate="token")

# Binarised data


def indices(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated .idx files (sizes and offsets of the sentences) endlessly."""
    yield from binaries(rng, "idx")


def identities(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated .bin files (token ids) endlessly."""
    yield from binaries(rng, "bin")


def binaries(rng: random.Random, kind: str) -> Iterator[bytes]:
    content = (folders.data() / f"train.de-en.de.{kind}").read_bytes()
    yield content
    while True:
        found = bytearray(content)
        for _ in range(rng.choice((0, 1, 1, 2))):  # overwrite whole integers
            size = rng.choice((1, 4, 8))
            place = rng.randrange(0, len(found) - size + 1)
            number = rng.choice((0, 1, 2, 255, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), rng.getrandbits(8 * size)))
            found[place : place + size] = (number % 2 ** (8 * size)).to_bytes(size, "little")
        yield bytes_changed(bytes(found), rng) if rng.random() < 0.4 else bytes(found)


def read_data(path: str | Path, kind: str = "idx") -> None:
    """Load a subset as training and the commands do, and check its token ids.

    Args:
        path: replacement for one of the files of the source side.
        kind: suffix of the file to replace: "idx" or "bin".
    """
    folder = Path(path).with_name("bin")
    if not folder.exists():
        shutil.copytree(folders.data(), folder)
    target = folder / f"train.de-en.de.{kind}"
    target.unlink(missing_ok=True)  # not overwritten, because it may still be memory-mapped
    shutil.copyfile(path, target)
    dataset = binarised.subset(task_on(str(folder)), "train")
    for number in range(len(dataset)):
        assert int(dataset[number]["source"].max()) < len(dictionary())


@functools.lru_cache(1)
def task_on(folder: str) -> FairseqTask:
    """Return a task on a folder; creating one takes three times as long as reading the data."""
    return binarised.translation_task(folder, "x", {"source_lang": "de", "target_lang": "en"})


def read_ids(path: str | Path) -> None:
    read_data(path, "bin")
    shutil.copyfile(folders.data() / "train.de-en.de.bin", Path(path).with_name("bin") / "train.de-en.de.bin")


# Lines


def read_segments(path: str | Path) -> None:
    assert len(segments.read(str(path), 2, "x")) == 2


def texts(rng: random.Random) -> Iterator[bytes]:
    letters = ("a", "é", "\n", "\r\n", "\r", "\u2028", "\x0c", "\x85", "\0", "\ufeff", "\U0001f600", "\n\n", " ")
    while True:
        content = "".join(rng.choices(letters, k=rng.randrange(12))).encode()
        yield bytes_changed(content, rng) if rng.random() < 0.3 else content


def read_references(path: str | Path) -> None:
    """Check that only line feeds separate references and that a last line without one counts."""
    content = Path(path).read_bytes()
    last = content != b"" and not content.endswith(b"\n")
    assert len(generated.read_references(path)) == content.count(b"\n") + last


# Records

OWNER = {"host": "x", "pid": 3, "started": "7", "token": "abc"}


def read_claim(path: str | Path) -> None:
    """Try to take an existing claim, as a process that fills shards does."""
    file = Path(path).with_name("shard-00000.claim")
    shutil.copyfile(path, file)
    claim = Claim(file, expires=1e9)
    if not claim.take():
        assert not claim.held()
    claim.release()


def read_scored(path: str | Path) -> None:
    """Resume from a record as `hgkd score` does after it was killed."""
    shutil.copyfile(path, Path(path).with_name(steps.RECORD))
    with contextlib.redirect_stderr(io.StringIO()):
        made = steps.Steps(Path(path).parent, "x").once("made", lambda file: file.write_text("x"), "y")
    assert made.read_text() == "x"


SCORED = {"made": ["0" * 64, "1" * 64], "forced.json": ["2" * 64, "3" * 64]}


def commands(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated cell.json files of the first cell of a grid endlessly."""
    with tempfile.TemporaryDirectory() as folder:
        about = grid(Path(folder)).cells()[0].description()
    quotes = ("fairseq-train 'x", 'hgkd "', "\\", "--user-dir $(hgkd user-dir)", "; rm x", "--generate=--beam 9")
    for content in contents(about, as_json, rng):
        yield content
        yield as_json({**about, "commands": rng.sample([*about["commands"], *quotes], rng.randrange(4))}).encode()


def read_commands(path: str | Path) -> None:
    """Check the cell.json of an existing cell as run.py does."""
    folder = Path(path).parent / "study"
    cell = grid(folder.parent).cells()[0]
    (folder / cell.folder).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, folder / cell.folder / "cell.json")
    run.check([cell], folder)


@functools.cache
def grid(folder: Path) -> structured.study.Grid:
    file = folder / "grid.toml"
    file.write_text(structured.as_toml(structured.GRID))
    return structured.study.Grid(file)


# Pages and models

TAGS = ("p", "span", "li", "script", "br", "h1", "td", "a", "div", "pre")
MARKS = ("<!--", "-->", "<![", "<![CDATA[", "]]>", "<!", "<?", "</", "/>")
MARKS += ("&#x110000;", "&#xd800;", "&amp", "&", "<", "\0")


def pages(rng: random.Random) -> Iterator[bytes]:
    while True:
        parts = []
        for _ in range(rng.randrange(12)):
            tag, kind = rng.choice(TAGS), rng.randrange(5)
            if kind < 2:
                name = rng.choice(('id="a"', "id=b", 'class="switchinline"', 'hidden class="MAC"', "hidden", "id", ""))
                parts.append(f"<{tag} {name}>")
            elif kind == 2:
                parts.append(f"</{tag}>")
            elif kind == 3:
                parts.append(rng.choice(MARKS) * rng.choice((1, 1, 3, 2000)))
            else:
                parts.append("".join(rng.choices(string.printable, k=rng.randrange(20))))
        content = "".join(parts).encode("utf-8", "surrogatepass")
        yield bytes_changed(content, rng) if rng.random() < 0.3 else content


def read_page(path: str | Path) -> None:
    try:
        found = align.read_page(Path(path))
    except SystemExit as error:  # the script exits with a one-line message
        raise UserError(str(error)) from None
    for text in found.values():
        align.split_sentences(text)


SENTENCES = ["ab abc", "b c d", "abcd ab", "ä 日本 e"]


@functools.cache
def sentencepiece_model() -> bytes:
    return encode_text.train_model(SENTENCES * 20, 24)


def sentencepiece_models(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated sentencepiece models endlessly.

    Most mutations affect only the beginning, which contains the pieces; the rest is mostly the normalisation table.
    """
    model = sentencepiece_model()
    yield model
    while True:
        size = rng.choice((500, 500, len(model)))
        yield bytes_changed(model[:size], rng) + model[size:]


def read_sentencepiece_model(path: str | Path) -> None:
    model = encode_text.Model(Path(path).read_bytes(), "x")
    for pieces in model.encode(SENTENCES):
        assert " ".join(pieces).split() == pieces
    encode_text.dictionary_lines(model.processor, Counter(), pad=True)


READERS: dict[str, tuple[Callable[[random.Random], Iterator[bytes]], Callable[[str | Path], None]]] = {
    "teacher-task": (tasks, read_task),
    "memory": (functools.partial(contents, MEMORY, as_json), read_memory),
    "data-index": (indices, read_data),
    "data-ids": (identities, read_ids),
    "segment-scores": (number_lists, read_segments),
    "references": (texts, read_references),
    "claim": (functools.partial(contents, OWNER, as_json), read_claim),
    "json-scored": (functools.partial(contents, SCORED, as_json), read_scored),
    "json-commands": (commands, read_commands),
    "html-page": (pages, read_page),
    "sentencepiece-model": (sentencepiece_models, read_sentencepiece_model),
}
