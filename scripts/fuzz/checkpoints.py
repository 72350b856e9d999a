"""Fuzzing of checkpoints: damaged, unusual and hostile files, which the loader must read or refuse with a UserError.

The module also contains the fuzzing loop (`fuzz`) and mutations of bytes that the other modules use.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import random
import re
import tempfile
import time
import traceback
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import OmegaConf
from torch._utils import _rebuild_tensor_v2

import hgkd_fairseq.tasks  # noqa: F401  replaces eval in fairseq by `literal`
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import checkpoints
from hgkd_fairseq.plugin.literals import literal

SLOWEST_S = 2.0
STRINGS = ("", "x", "${a}", "${oc.env:HOME}", "???", "\x1b[2J", "\ud800", "a" * 5000, "é", "True", "[1]", "print(1)")
NUMBERS = (0, 1, -1, 2**31, 2**63, 10**500, True, 0.5, float("nan"), float("inf"), -1e308, 1e-320)
PIECES = (*"[](){}*+-,:19a. ", "**", "0.5", "'a'", "None", "lambda")
ODD_OPTIONS = (None, [1], {"a": 1}, "lstm", "fconv", "[(4, 3)] * 9", 10**5, 3)


def state() -> dict[str, Any]:
    """Return a small checkpoint with the structure of those that fairseq-train saves."""
    options = {"data": "bin", "source_lang": "de", "target_lang": "en", "arch": "transformer", "encoder_layers": 1}
    options |= {"adam_betas": "(0.9, 0.98)", "lr": [0.1], "max_source_positions": 1024, "share_all_embeddings": True}
    counts = {"val": np.arange(4), "sum": np.arange(4.0), "count": 1, "round": None}
    return {
        "args": None,
        "cfg": {"model": Namespace(**options), "task": {"_name": "translation", **options}, "common": {"seed": 1}},
        "model": OrderedDict(w=torch.ones(3, 2), half=torch.ones(2).half(), version=torch.tensor([3])),
        "criterion": None,
        "optimizer_history": [{"optimizer_name": "A", "lr_scheduler_state": {"best": None}, "num_updates": 3}],
        "extra_state": {"train_iterator": {"epoch": 1}, "metrics": [("valid", [("_bleu_counts", counts)])]},
        "last_optimizer_state": {"state": {0: {"step": 1, "exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]},
    }


def odd(rng: random.Random, depth: int = 0) -> Any:
    """Return a random value that fairseq does not expect in a checkpoint."""
    kinds = ["string", "number", "tensor", "array", "none", "set", "bytes", "named"]
    kinds += [] if depth > 2 else ["list", "dict", "namespace", "deep"]
    kind = rng.choice(kinds)
    if kind == "string":
        return rng.choice(STRINGS)
    if kind == "number":
        return rng.choice(NUMBERS)
    if kind == "tensor":
        dtypes = (torch.float32, torch.float16, torch.bool, torch.int64, torch.complex64)
        tensor = torch.zeros([rng.randrange(3) for _ in range(rng.randrange(3))], dtype=rng.choice(dtypes))
        return rng.choice((tensor, tensor.to("meta"), tensor[None].expand(9, *tensor.shape), torch.eye(2).to_sparse()))
    if kind == "array":
        return np.zeros(rng.randrange(3), rng.choice(("i8", "O", "S3", "U2", "M8[s]", "c16", ">f4", [("a", "i4")])))
    if kind == "list":
        return rng.choice((list, tuple))(odd(rng, depth + 1) for _ in range(rng.randrange(4)))
    if kind in ("dict", "namespace"):
        found = {rng.choice(STRINGS): odd(rng, depth + 1) for _ in range(rng.randrange(4))}
        return found if kind == "dict" else Namespace(**found)
    if kind == "deep":
        value: Any = []
        for _ in range(rng.choice((10, 60, 200))):
            value = rng.choice((list, tuple))([value] * rng.choice((1, 2)))
        return value
    if kind == "named":  # objects that torch allows in a file, and a tensor subclass
        hooked = torch.nn.Parameter(torch.ones(2))
        counted = Counter(a=odd(rng, depth + 1)) if depth < 2 else Counter("a")
        return rng.choice((_rebuild_tensor_v2, codecs.encode, counted, torch.Size([1]), torch.int8, CPU, hooked))
    return {"none": None, "set": {1}, "bytes": b"a"}[kind]


CPU = torch.device("cpu")


def changed(value: Any, rng: random.Random) -> Any:
    """Return a copy of a nested value in which one random item is replaced, removed or renamed."""
    if isinstance(value, Namespace) and vars(value):
        return Namespace(**changed(vars(value), rng))
    if isinstance(value, dict) and value:
        found, key = value.copy(), rng.choice(list(value))
        chance = rng.random()
        if chance < 0.1:
            del found[key]
        elif chance < 0.2:
            found[rng.choice(STRINGS)] = found.pop(key)
        else:
            found[key] = odd(rng) if chance < 0.4 else changed(found[key], rng)
        return found
    if isinstance(value, list | tuple) and value:
        place = rng.randrange(len(value))
        found = [changed(item, rng) if index == place else item for index, item in enumerate(value)]
        return found if isinstance(value, list) else tuple(found)  # torch.Size accepts only integers
    return odd(rng)


def saved(content: Any, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """Return a copy with random bytes replaced, inserted, removed or repeated, or with its end truncated."""
    found = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 5, 30))):
        place = rng.randrange(len(found) + 1)
        length = rng.choice((1, 1, 4, 100))
        kind = rng.randrange(5)
        if kind == 0:
            found[place : place + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            found[place:place] = rng.randbytes(length)
        elif kind == 2:
            del found[place : place + length]
        elif kind == 3:
            found[place:place] = found[place : place + length]
        elif rng.random() < 0.2:
            del found[place:]
    return bytes(found)


def pickle_changed(content: bytes, rng: random.Random) -> bytes:
    """Mutate the bytes of data.pkl in a zip checkpoint, with valid checksums, so that they reach the unpickler."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(buffer, "w") as new:
        for entry in old.infolist():
            record = old.read(entry)
            new.writestr(entry.filename, bytes_changed(record, rng) if entry.filename.endswith(".pkl") else record)
    return buffer.getvalue()


def cases(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated checkpoint files endlessly."""
    formats = [saved(state(), zipped) for zipped in (True, False)]
    while True:
        kind = rng.randrange(5)
        if kind == 0:
            yield bytes_changed(rng.choice(formats), rng)
        elif kind == 1:
            yield pickle_changed(formats[0], rng)
        elif kind == 2:
            yield bytes_changed(formats[1], rng)
        else:
            content = state()
            for _ in range(rng.choice((1, 1, 2, 4))):
                content = changed(content, rng)
            try:
                yield saved(content, zipped=rng.random() < 0.7)
            except (RuntimeError, NotImplementedError, UnicodeEncodeError):  # torch cannot save every value
                continue


def read(path: str | Path) -> None:
    """Load a checkpoint as the commands do before they build its model.

    Raises:
        UserError: the file is not a valid checkpoint.
        AssertionError: the loaded state is not plain (:func:`check_plain`).
    """
    checkpoints.read(path, model=False)
    found = checkpoints.read(path, {"data": "x"})
    check_plain(found.state)
    found.options("task")
    found.options("model")


LEAVES = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)


def check_plain(state: Any) -> None:
    """Check that a state contains, at any depth, only plain tensors, literal values and plain containers.

    Raises:
        AssertionError: the state contains anything else.
    """
    seen: set[int] = set()
    left = [state]
    while left:
        value = left.pop()
        if type(value) in LEAVES or id(value) in seen:
            continue
        seen.add(id(value))
        if OmegaConf.is_config(value):
            value = OmegaConf.to_container(value, resolve=False, enum_to_str=True)
        if isinstance(value, torch.Tensor):
            assert type(value) is torch.Tensor, type(value)
            assert not value.requires_grad
            assert not value._backward_hooks
            assert not vars(value), vars(value)
            assert (value.device.type, value.layout, value.is_quantized) == ("cpu", torch.strided, False)
        elif type(value) in (dict, OrderedDict, Counter):
            left += [*value.keys(), *value.values()]
            left += [vars(value)] if type(value) is not dict and vars(value) else []
        elif type(value) is Namespace:
            left.append(vars(value))
        else:
            assert type(value) in (list, tuple, set), type(value)
            left += value


@functools.cache
def transformer() -> tuple[TranslationTask, dict[str, Any]]:
    """Return a translation task and the checkpoint of a small model with random weights for it."""
    dictionary = Dictionary()
    for name in "abc":
        dictionary.add_symbol(name)
    task = TranslationTask(TranslationConfig(), dictionary, dictionary)
    parts = {"layers": 1, "attention_heads": 1, "embed_dim": 4, "ffn_embed_dim": 4}
    sizes = {f"{side}_{part}": size for side in ("encoder", "decoder") for part, size in parts.items()}
    options = Namespace(arch="transformer", _name="transformer", **sizes)
    model = models.build_model(options, task)  # adds the defaults to the options
    return task, {**state(), "cfg": {**state()["cfg"], "model": options}, "model": model.state_dict()}


def transformers(rng: random.Random) -> Iterator[bytes]:
    """Generate checkpoints of a small model with unexpected option values endlessly."""
    _, found = transformer()
    while True:
        options = vars(found["cfg"]["model"]).copy()
        for name in rng.sample(list(options), rng.choice((1, 1, 1, 2, 4))):
            options[name] = rng.choice((*STRINGS, *NUMBERS, *ODD_OPTIONS))
        with contextlib.suppress(RuntimeError, UnicodeEncodeError):  # torch cannot save every value
            yield saved({**found, "cfg": {**found["cfg"], "model": Namespace(**options)}}, zipped=True)


def build(path: str | Path) -> None:
    """Load a checkpoint and build its model, as the commands do.

    Raises:
        UserError: the file is not a valid checkpoint, or its options do not fit its weights.
    """
    task, _ = transformer()
    checkpoints.build(checkpoints.read(path), task)


def literals(rng: random.Random) -> Iterator[bytes]:
    """Generate random option values endlessly."""
    while True:
        yield "".join(rng.choices(PIECES, k=rng.randrange(1, 40))).encode()


def read_literal(path: str | Path) -> None:
    literal(Path(path).read_text(errors="replace"))


DIGITS = re.compile(rb"\d+")
HUGE = (b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"NaN", b"18446744073709551616", b"0x1", b"1_0", b"-0", b"00")


def spliced(content: bytes, corpus: list[bytes], rng: random.Random) -> bytes:
    """Mutate an input as bytes, independent of its format.

    Append the end of another input, replace a decimal number, flip bits, or apply :func:`bytes_changed`.

    Args:
        content: input to mutate.
        corpus: other inputs to take parts from; may be empty.
        rng: random generator.
    """
    kind = rng.randrange(4)
    if kind == 0 and corpus:
        other = rng.choice(corpus)
        start, end = rng.randrange(len(other) + 1), rng.randrange(len(content) + 1)
        return content[:end] + other[start:]
    if kind == 1 and (found := list(DIGITS.finditer(content[:20000]))):
        one = rng.choice(found)
        return content[: one.start()] + rng.choice(HUGE) + content[one.end() :]
    if kind == 2 and content:
        flipped = bytearray(content)
        for _ in range(rng.choice((1, 1, 8))):
            flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    return bytes_changed(content, rng)


def fuzz(inputs: int, seed: int, make=cases, reader=read) -> tuple[Counter, float]:
    """Run a reader on generated inputs; on average one input in six is also mutated by :func:`spliced`.

    Args:
        inputs: number of inputs.
        seed: seed of the inputs.
        make: generator of inputs from a random generator.
        reader: function that reads a file by its path.

    Returns:
        Counts by outcome and the CPU seconds of the slowest input. The outcomes are "read", "refused" (a UserError),
        "not printable" (a refusal whose message has unprintable characters), and the type and message of any other
        exception.
    """
    counts: Counter = Counter()
    slowest = 0.0
    rng, corpus = random.Random(-seed - 1), []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "input"
        for number, content in zip(range(inputs), make(random.Random(seed)), strict=False):
            if number < 50 and len(content) < 100_000:
                corpus.append(content)
            path.write_bytes(spliced(content, corpus, rng) if number and rng.random() < 1 / 6 else content)
            start = time.process_time()
            try:
                reader(path)
                counts["read"] += 1
            except UserError as error:
                counts["refused" if str(error).isprintable() else "not printable"] += 1
            except Exception as error:
                counts[f"{type(error).__name__}: {error}"[:200]] += 1
                traceback.print_exc()
            slowest = max(slowest, time.process_time() - start)
    return counts, slowest
