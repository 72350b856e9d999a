"""Fuzzing of folders with translations and teacher stores, which their readers must read or refuse with a UserError.

The recorded hashes are computed after the files are mutated, so that the readers see the mutated content and do not
merely refuse the hash, as with files that were crafted on purpose. fuzz.py runs the readers.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import bytes_changed
from fairseq.data import Dictionary, indexed_dataset
from structured import TURN, as_json, contents, number_lists
from text import NUMBERS, PIECES

from hgkd_fairseq import files
from hgkd_fairseq.data import translations
from hgkd_fairseq.data.filters import Filters
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.data.translations import FILE, Hypothesis
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import selection
from hgkd_fairseq.evaluation.distil_data import Choice, Chosen, distil, translated_data
from hgkd_fairseq.teacher.store import FORMAT, Store

SENTENCES = ("a b", "b c a", "c")
FIELDS = (*NUMBERS, *PIECES, "whole", "limit", "skipped", "0\t0", "\t", "</s>", "<pad>", "a " * 400)


def written(folder: Path, manifest: bytes, content: dict[str, bytes], rows: int) -> Path:
    """Write a folder with one shard, and with a matching record if the manifest is valid.

    Args:
        folder: folder to write; what it contained is removed.
        manifest: content of the manifest.
        content: content of the shard's files by name.
        rows: number of rows in the record.

    Returns:
        The folder.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "shard-00000").mkdir(parents=True)
    (folder / "manifest.json").write_bytes(manifest)
    for name, one in content.items():
        (folder / "shard-00000" / name).write_bytes(one)
    with contextlib.suppress(UserError):
        hashes = {name: files.sha256(folder / "shard-00000" / name) for name in content}
        record = {"manifest": Shards.open(folder).digest, "rows": rows, "files": hashes}
        (folder / "shard-00000.json").write_text(as_json(record))
    return folder


# Translations


@functools.cache
def data() -> Path:
    """Write binarised data of three sentences to a temporary folder, which is removed at exit; return the folder."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    dictionary = Dictionary()
    for piece in "abc":
        dictionary.add_symbol(piece)
    for language in ("de", "en"):
        dictionary.save(str(folder / f"dict.{language}.txt"))
        prefix = folder / f"train.de-en.{language}"
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
        for sentence in SENTENCES:
            builder.add_item(ids(dictionary, sentence))
        builder.finalize(f"{prefix}.idx")
    return folder


def ids(dictionary: Dictionary, sentence: str) -> torch.Tensor:
    return torch.tensor([*map(dictionary.index, sentence.split()), dictionary.eos()], dtype=torch.int32)


@functools.cache
def manifest() -> dict[str, Any]:
    about = {"kind": translations.KIND, "subset": "train", "source_lang": "de", "target_lang": "en", "teacher": ["x"]}
    return {**about, **translations.hashes(str(data()), "train"), "decoding": {"beam": 2}, "rows": 3, "shard_size": 3}


@functools.cache
def lines() -> list[str]:
    dictionary = Dictionary.load(str(data() / "dict.de.txt"))
    found = []
    for number, sentence in enumerate(SENTENCES):
        hypotheses = [Hypothesis(text.split(), -0.5, False) for text in ("c b", "a c")]
        one = translations.Translated(number, translations.hash_of(ids(dictionary, sentence)), hypotheses)
        found += list(translations.lines(one))
    return found


def tables(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated translations.tsv files of a shard endlessly."""
    yield "".join(lines()).encode()
    while True:
        rows = lines().copy()
        for _ in range(rng.choice((0, 1, 1, 2))):
            place, kind = rng.randrange(len(rows)), rng.randrange(6)
            columns = rows[place].removesuffix("\n").split("\t")
            if kind < 3:
                columns[rng.randrange(len(columns))] = rng.choice(FIELDS)
                rows[place] = "\t".join(columns) + "\n"
            elif kind == 3:
                rows.insert(rng.randrange(len(rows)), rows[place])
            elif kind == 4 and len(rows) > 1:
                del rows[place]
            else:
                rng.shuffle(rows)
        content = "".join(rows).encode("utf-8", "surrogatepass")
        yield bytes_changed(content, rng) if rng.random() < 0.3 else content


def read_translations(path: str | Path) -> None:
    """Process translations as `hgkd distil-data` does; write the data, which is slow, only for one input in 20."""
    folder = written(Path(path).with_name("set"), as_json(manifest()).encode(), {FILE: Path(path).read_bytes()}, 3)
    choice = Choice(filters=Filters(off=frozenset({"ratio", "unknown"})))
    if next(TURN) % 20 == 0:
        made = folder.with_name("made")
        shutil.rmtree(made, ignore_errors=True)
        distil(str(folder), str(data()), str(made), choice)
        return
    shards = translations.opened(str(folder), str(data()))
    chosen = Chosen(shards, *task(), choice)
    chosen.examine()
    assert len(list(chosen.rows())) <= 3
    chosen.summary(3)


@functools.cache
def task() -> tuple:
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    content = "".join(lines()).encode()
    return translated_data(str(data()), Shards.open(written(folder, as_json(manifest()).encode(), {FILE: content}, 3)))


def read_manifest(path: str | Path) -> None:
    content = {FILE: "".join(lines()).encode()}
    folder = written(Path(path).with_name("set"), Path(path).read_bytes(), content, 3)
    assert len(list(translations.read(translations.opened(str(folder))))) == 3


def read_record(path: str | Path) -> None:
    content = {FILE: "".join(lines()).encode()}
    folder = written(Path(path).with_name("set"), as_json(manifest()).encode(), content, 3)
    (folder / "shard-00000.json").write_bytes(Path(path).read_bytes())
    assert len(list(translations.read(translations.opened(str(folder))))) == 3


@functools.cache
def record() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        content = {FILE: "".join(lines()).encode()}
        folder = written(Path(place) / "set", as_json(manifest()).encode(), content, 3)
        return json.loads((folder / "shard-00000.json").read_text())


def read_scores(path: str | Path) -> None:
    """Select hypotheses by the scores in a file, as `hgkd distil-data --select scores:FILE` does."""
    select = selection.ByFile(str(path))
    hypothesis = Hypothesis(["a"], -0.5, False)
    for number in range(2):
        assert select(number, [hypothesis, hypothesis]) in (0, 1)
    select.end()


# A teacher's store


def bytes_of(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


WEIGHT = bytes_of(np.ones((7, 2), np.float32))
ARRAYS = {
    "keys.npy": bytes_of(np.array([3, 4], np.uint64)),
    "offsets.npy": bytes_of(np.array([0, 2, 3])),
    "gold.npy": bytes_of(np.ones((3, 3), np.float32)),
    "hidden-0.npy": bytes_of(np.ones((3, 2), np.float32)),
}
STORE: dict[str, Any] = {
    "format": FORMAT,
    "kind": "hidden",
    "dtype": "fp32",
    "temperature": 1.5,
    "draws": 0,
    "folds": 0,
    "vocabulary": 7,
    "languages": ["de", "en"],
    "dictionaries": ["x", "y"],
    "teacher": "z",
    "heads": {},
    "members": 1,
    "parts": [{"name": "train", "folder": 0, "first": 0, "sentences": 2, "data": "x"}],
    "rows": 2,
    "shard_size": 2,
}


def read_store(path: str | Path, layer: bytes = WEIGHT) -> None:
    """Read a store as a training with `--teacher-store` does.

    Args:
        path: file with the manifest of the store.
        layer: content of the file with the weight of the teacher's output layer.
    """
    folder = written(Path(path).with_name("set"), Path(path).read_bytes(), ARRAYS, 2)
    (folder / "member-0.weight.npy").write_bytes(layer)
    store = Store(str(folder))
    if store.kind == "hidden":
        store.head(0)
    store.part("train", 0)
    sentences = [store.sentence(number)[1] for number in range(2)]
    store.batch(sentences, torch.tensor([[True, True], [True, False]]))


@functools.cache
def store() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / "x").write_bytes(WEIGHT)
        return {**STORE, "heads": {"member-0.weight.npy": files.sha256(Path(place) / "x")}}


def arrays(rng: random.Random) -> Iterator[bytes]:
    """Generate valid, unusual and mutated .npy files endlessly."""
    odd = [np.ones(shape, kind) for shape in ((7, 2), (7,), (0, 2), (2, 7), ()) for kind in ("f4", "f8", "i8", "S2")]
    odd.append(np.array([{}, None], dtype=object))
    while True:
        content = rng.choice((WEIGHT, WEIGHT, bytes_of(rng.choice(odd))))
        yield bytes_changed(content, rng) if rng.random() < 0.6 else content


def read_layer(path: str | Path) -> None:
    """Read a store in which the file is the weight of the teacher's output layer."""
    layer = Path(path).read_bytes()
    digest = files.sha256(path)
    manifest = Path(path).with_name("manifest")
    manifest.write_text(as_json({**STORE, "heads": {"member-0.weight.npy": digest}}))
    read_store(manifest, layer)


READERS: dict[str, tuple[Callable[[random.Random], Iterator[bytes]], Callable[[str | Path], None]]] = {
    "translations": (tables, read_translations),
    "translations-manifest": (lambda rng: contents(manifest(), as_json, rng), read_manifest),
    "translations-record": (lambda rng: contents(record(), as_json, rng), read_record),
    "scores": (number_lists, read_scores),
    "store-manifest": (lambda rng: contents(store(), as_json, rng), read_store),
    "store-layer": (arrays, read_layer),
}
