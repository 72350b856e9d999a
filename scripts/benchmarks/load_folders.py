"""The parts of load.py that write or read a folder or file with one entry per pair: a teacher store, translations, and
the output of fairseq-generate."""

from __future__ import annotations

import functools
import logging
import shutil
from pathlib import Path

import numpy as np
import torch
from fairseq.tasks import FairseqTask
from load_pairs import Run, batches_of, loaded, make_corpus

from hgkd_fairseq import plugin
from hgkd_fairseq.data import translations
from hgkd_fairseq.data.filters import Filters
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.data.translations import Hypothesis, Translated, hash_of
from hgkd_fairseq.evaluation import distil_data, inference
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.teacher import store, stored

SHARD = 4096  # sentences per shard of a store
SHARD_OF_TRANSLATIONS = 10_000  # sentences per shard of translations


def store_of(folder: Path, pairs: int) -> tuple[FairseqTask, Path]:
    return loaded(folder, pairs), folder / f"store-{pairs}"


def store_written(folder: Path, pairs: int) -> Run:
    """Write a store of kind "gold" as `hgkd store` does, but without a teacher: all its values are 0."""
    task, output = store_of(folder, pairs)
    dataset = task.dataset("train")
    shutil.rmtree(output, ignore_errors=True)

    def run() -> None:
        keys = np.array([store.key(dataset.src[i], dataset.tgt[i]) for i in range(pairs)], np.uint64)
        manifest = {
            "format": store.FORMAT, "kind": "gold", "dtype": "fp32", "temperature": 1.5, "draws": 0, "folds": 0,
            "vocabulary": len(task.target_dictionary), "languages": ["de", "en"], "teacher": "none", "heads": {},
            "dictionaries": [stored.dictionary_hash(task.target_dictionary)] * 2, "members": 1,
            "parts": [store.Part("train", 0, 0, pairs, "")._asdict()],
        }  # fmt: skip
        shards = Shards.create(output, manifest, pairs, SHARD)

        def make(shard: int, target: Path) -> int:
            numbers = shards.numbers(shard)
            lengths = [int(dataset.tgt_sizes[number]) for number in numbers]
            store.save(target, "keys", keys[numbers.start : numbers.stop])
            store.save(target, "offsets", store.ends(lengths))
            store.save(target, "gold", np.zeros((sum(lengths), 3), np.float32))
            return len(numbers)

        shards.fill(make)

    return run


def store_read(folder: Path, pairs: int) -> Run:
    task, output = store_of(folder, pairs)
    if not output.exists():
        store_written(folder, pairs)()
    dataset = task.dataset("train")

    def run() -> None:
        teacher = stored.StoredTeacher(str(output), task.source_dictionary, task.target_dictionary)
        teacher.attach("train", 0, dataset)
        for batch in batches_of(task).next_epoch_itr(shuffle=True):
            teacher.signal(batch, torch.device("cpu"), torch.float32)

    return run


def translated(folder: Path, pairs: int) -> tuple[Path, Path, Run]:
    """Return the data folder, the output folder, and the function that writes translations to the latter.

    The translations are the references, with made-up scores.
    """
    data, output = make_corpus(folder, "corpus", pairs), folder / f"translated-{pairs}"
    plugin.register()
    logging.disable(logging.INFO)
    task = binarised.translation_task(str(data), "load.py", {"source_lang": "de", "target_lang": "en"})
    task.load_dataset("train")
    dataset, symbols = task.dataset("train"), task.target_dictionary.symbols

    def run() -> None:
        manifest = {"kind": translations.KIND, "subset": "train", "source_lang": "de", "target_lang": "en"}
        manifest |= translations.hashes(str(data), "train")
        shards = Shards.create(output, manifest, pairs, SHARD_OF_TRANSLATIONS)

        def make(shard: int, target: Path) -> int:
            found = []
            for number in shards.numbers(shard):
                pieces = [symbols[index] for index in dataset.tgt[number].tolist()[:-1]]
                hypothesis = Hypothesis(pieces, -(number % 7), False)
                found.append(Translated(number, hash_of(dataset.src[number]), [hypothesis]))
            translations.write(target, found)
            return len(found)

        shards.fill(make)

    return data, output, run


def translations_written(folder: Path, pairs: int) -> Run:
    _, output, write = translated(folder, pairs)
    shutil.rmtree(output, ignore_errors=True)
    return write


def distilled_data(folder: Path, pairs: int) -> Run:
    data, output, write = translated(folder, pairs)
    if not output.exists():
        write()
    made = folder / f"distilled-{pairs}"
    shutil.rmtree(made, ignore_errors=True)
    filters = Filters(off=frozenset({"backward", "long"}), worst_score=0.01)
    choice = distil_data.Choice(filters=filters, mix_original=0.1)
    return functools.partial(distil_data.distil, str(output), str(data), str(made), choice)


def generated(folder: Path, pairs: int) -> Run:
    """Run `hgkd calibration inference` on a synthetic output of fairseq-generate in which about 90 % of the tokens are
    right."""
    task, file = loaded(folder, pairs), folder / f"generated-{pairs}.txt"
    symbols, rng = task.target_dictionary.symbols, np.random.default_rng(1)
    with file.open("w") as out:
        for number in range(pairs):
            ids = task.dataset("train").tgt[number].numpy()[:100]
            said = np.where(rng.random(len(ids) - 1) < 0.9, ids[:-1], 4)
            scores = " ".join(f"{value:.4f}" for value in -rng.exponential(0.3, len(ids)))
            out.write(f"T-{number}\t{' '.join(symbols[i] for i in ids[:-1])}\n")
            out.write(f"H-{number}\t-0.3\t{' '.join(symbols[i] for i in said)}\nP-{number}\t{scores}\n")
    return lambda: inference.evaluate(str(file))
