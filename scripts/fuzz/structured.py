"""Fuzzing of JSON files, grids of studies, lists of numbers and tables of sentence weights, which their readers must
read or refuse with a UserError. fuzz.py runs them."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoints import bytes_changed, odd, saved, state

from hgkd_fairseq import drawing, files
from hgkd_fairseq.evaluation import results, temperature
from hgkd_fairseq.report import diagram, runs, tables
from hgkd_fairseq.sentence_weights import table as weight_table

sys.path.insert(0, str(Path(__file__).parents[1] / "study"))

import study

NUMBERS = (0, 1, -1, 3, 0.5, -0.0, 1e308, -1e308, 1e-320, 2**31, 2**63, 10**400, float("nan"), float("inf"), True)
TEXTS = (
    "",
    "x",
    "base",
    "hkd-t",
    "big",
    "same",
    "../../x",
    "/",
    ".",
    "\0",
    "\ud800",
    "\x1b[2J",
    "é",
    "a" * 9000,
    "'",
    "$_{",
)
BARS = {"count": [2, 0], "confidence": [1.5, 0], "correct": [1, 0], "low": [0.1, 0], "high": [0.9, 1]}
RESULTS: dict[str, Any] = {
    "mode": "forced",
    "path": "x.pt",
    "subset": "test",
    "temperature": 1.0,
    "tokens": 2,
    "sentences": 1,
    "parameters": 3,
    "ece": 0.25,
    "ece_without_eos": None,
    "nll": 1.5,
    "signature": "ECE|bins:2",
    "bins": 2,
    "min_count": 1,
    "replicates": 3,
    "seed": 1,
    "scores": [
        {"key": key, "signature": f"{key}|bins:2", "value": 0.25, "low": 0.1, "high": None, "unit": "%"}
        for key in ("ece", "ece_without_eos", "nll")
    ],
    "histograms": {"eos:yes": BARS, "eos:no": BARS},
    "resampled_ece": {"eos:yes": [0.25, None, 0.5], "eos:no": [None, None, None]},
    "command": "hgkd calibration forced bin",
}
SCORES: dict[str, Any] = {
    **dict.fromkeys(("bleu", "brevity_penalty", "chrf", "lenpen", "lenpen_bleu", "lenpen_brevity_penalty"), 1.0),
    **dict.fromkeys(("nll", "temperature", "scaled_nll", "valid_nll_best", "valid_nll_last", "minutes"), 1.5),
    **dict.fromkeys(("ece", "inference_ece", "scaled_ece", "teacher_share"), 0.1),
    **dict.fromkeys(("best_updates", "last_updates", "parameters"), 3),
    "curve": [{"updates": 1, "valid_nll": 1.0, "valid_ece": 0.1, "teacher_share": 0.5}],
    "signatures": dict.fromkeys(("bleu", "chrf", "ece", "inference_ece"), "a|b"),
}
ABOUT: dict[str, Any] = {
    "signature": "setting:same|seed:1",
    "setting": "same",
    "method": "base",
    "title": "Base",
    "teacher": None,
    "seed": 1,
    "temperature": 1.5,
    "commands": ["fairseq-train x"],
}
GRID: dict[str, Any] = {
    "data": {"text": "text", "vocabulary": 60, "pairs": 3},
    "training": {"updates": 4, "precision": "fp32", "options": "--arch x"},
    "sizes": {"big": {"options": "--encoder-layers 1"}, "small": {"options": ""}},
    "settings": {
        "same": {"teacher": "big", "student": "big"},
        "less": {"teacher": "big", "student": "small", "updates": 2},
    },
    "teacher": {"method": "base", "seed": 0},
    "generation": {"options": "--beam 1"},
    "methods": {"hkd-t": {"options": "--gate-on argmax"}},
    "cells": [{"settings": ["same", "less"], "methods": ["base", "hkd-t"], "seeds": [1, 2], "temperatures": [1.5, 2]}],
}


def odd_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(4 if depth > 2 else 7)
    if kind == 0:
        return rng.choice(TEXTS)
    if kind == 1:
        return rng.choice(NUMBERS)
    if kind == 2:
        return rng.choice((None, True, False))
    if kind == 3:
        return rng.choice(([], {}))
    if kind == 4:
        return [odd_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 5:
        return {rng.choice(TEXTS): odd_value(rng, depth + 1) for _ in range(rng.randrange(4))}
    value: Any = 1
    for _ in range(rng.choice((5, 50, 300))):
        value = [value] if rng.random() < 0.5 else {"a": value}
    return value


def changed(value: Any, rng: random.Random) -> Any:
    """Return a copy of a nested value in which one random item is replaced, removed, repeated or renamed."""
    found = copy.copy(value)
    if isinstance(value, dict) and value and rng.random() < 0.95:
        key, chance = rng.choice(list(value)), rng.random()
        if chance < 0.1:
            del found[key]
        elif chance < 0.2:
            found[rng.choice(TEXTS)] = found.pop(key)
        else:
            found[key] = odd_value(rng) if chance < 0.4 else changed(value[key], rng)
        return found
    if isinstance(value, list) and value and rng.random() < 0.95:
        place, chance = rng.randrange(len(value)), rng.random()
        if chance < 0.1:
            del found[place]
        elif chance < 0.2:
            found.insert(place, value[place])
        else:
            found[place] = changed(value[place], rng)
        return found
    return odd_value(rng)


def as_json(value: Any) -> str:
    return json.dumps(value)


def as_toml(value: Any, inline: bool = False) -> str:
    """Return a value as TOML; values that TOML cannot represent are written as in Python, which is invalid TOML."""
    if isinstance(value, dict) and not inline:
        return "".join(f"{as_toml(key, True)} = {as_toml(one, True)}\n" for key, one in value.items())
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_toml(key, True)} = {as_toml(one, True)}" for key, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(as_toml(one, True) for one in value) + "]"
    if isinstance(value, str):
        return json.dumps(value)
    return {True: "true", False: "false"}.get(value, repr(value)) if isinstance(value, bool) else repr(value)


def contents(sample: Any, write: Callable[[Any], str], rng: random.Random) -> Iterator[bytes]:
    """Generate files with mutations of a sample endlessly, after one with the sample itself.

    Args:
        sample: value to mutate.
        write: function that formats a value, :func:`as_json` or :func:`as_toml`. The formatted text is sometimes
            mutated as well.
        rng: random generator.
    """
    yield write(sample).encode()
    while True:
        value = sample
        for _ in range(rng.choice((0, 1, 1, 1, 2, 5))):
            value = changed(value, rng)
        if not isinstance(value, dict) and write is as_toml:
            continue
        content = write(value).encode("utf-8", "surrogatepass")
        if rng.random() < 0.05:
            content = content.replace(b"[", b"[" * rng.choice((1, 900, 100000)), 1)
        yield bytes_changed(content, rng) if rng.random() < 0.35 else content


TURN = itertools.count()


@functools.cache
def axes() -> list:
    return list(drawing.figure_class()(figsize=(3, 4)).subplots(2, 1))


def read_drawn(path: str | Path) -> None:
    """Process results as `hgkd calibration diagram` does; write the figure, which is slow, only for one file in 200."""
    found = files.read_json(path, results.DRAWN, results.WHAT)
    results.check_bars(path, found)
    which = ("eos:yes", "eos:no")[next(TURN) % 2]
    if found["bins"] <= 10 and next(TURN) % 10 == 0:
        for place in axes():
            place.clear()
        diagram.reliability(axes()[0], [found], ["x"], which)
        diagram.confidences(axes()[1], [found], which)
    if found["bins"] <= 10 and next(TURN) % 200 == 0:
        diagram.draw([str(path)], f"{path}.svg", None, which)


def read_results(path: str | Path) -> None:
    """Process forced.json as `hgkd report` does, except for the figures."""
    found = results.read(path)
    if found["mode"] != "forced":  # refused by runs.read
        return
    run = runs.Run(Path("run"), "run", forced=found)
    other = runs.Run(Path("other"), "other", forced=copy.deepcopy(RESULTS))
    for pair in ([run, other], [other, run]):
        tables.measure(pair).markdown().encode("utf-8", "backslashreplace")


def read_temperature(path: str | Path) -> None:
    temperature.read(str(path))


def read_cell_scores(path: str | Path) -> None:
    """Read scores.json of a cell as the study does; the link gives the file the name that the study expects."""
    link = Path(path).with_name("scores.json")
    link.unlink(missing_ok=True)
    link.hardlink_to(path)
    study.read_scores(link.parent)


def read_cell(path: str | Path) -> None:
    link = Path(path).with_name("cell.json")
    link.unlink(missing_ok=True)
    link.hardlink_to(path)
    study.read_about(link.parent, commands=[str])


def read_grid(path: str | Path) -> None:
    """Read a grid and describe its cells as `run.py --dry-run` does."""
    for cell in study.Grid(Path(path)).cells():
        assert ".." not in Path(cell.folder).parts
        assert not Path(cell.folder).is_absolute()
        json.dumps([cell.description(), cell.commands], allow_nan=False)


def number_lists(rng: random.Random) -> Iterator[bytes]:
    words = (
        "0",
        "7",
        "12",
        "-1",
        "1.5",
        "x",
        "1e3",
        "٣",
        "9" * 18,
        "9" * 19,
        "9" * 5000,
        "nan",
        "0x1",
        "1_0",
        "\u2028",
        "",
    )
    while True:
        content = "\n".join(rng.choices(words[: rng.choice((3, len(words)))], k=rng.randrange(6))).encode()
        yield bytes_changed(content, rng) if rng.random() < 0.3 else content


def read_numbers(path: str | Path) -> None:
    weight_table.numbers(str(path))


def weight_tables(rng: random.Random) -> Iterator[bytes]:
    """Generate mutated checkpoints of a training with `--gate instance` endlessly."""
    while True:
        one = torch.rand(rng.choice((0, 1, 5)))
        table: dict[str, Any] = {"data": one, "teacher": 1 - one, "held_out": one > 0.7, "epoch": torch.tensor(1)}
        memory: dict[str, Any] = {"gate": table}
        content = state()
        for _ in range(rng.choice((0, 1, 1, 2))):
            name, kind = rng.choice(list(table)), rng.randrange(6)
            if kind == 0:
                del table[name]
                break
            if kind == 1:
                table[name] = odd(rng)
            elif kind == 2:
                table[name] = torch.full((len(one),), rng.choice((float("nan"), float("inf"), -1.0, 1e38, 0.0)))
            elif kind == 3:
                table[name] = torch.zeros(rng.randrange(7), dtype=rng.choice((torch.int64, torch.bool, torch.half)))
            elif kind == 4:
                memory["gate"] = odd(rng)
            else:
                table["learned"] = rng.choice((one > 0.5, odd(rng)))
        content["extra_state"]["TranslationWithTeacherTask"] = memory if rng.random() < 0.95 else odd(rng)
        try:
            yield saved(content, zipped=rng.random() < 0.7)
        except (RuntimeError, NotImplementedError, UnicodeEncodeError):  # torch cannot save every value
            continue


def read_weights(path: str | Path) -> None:
    """Write the table of weights as `hgkd weights` does; write the figure, which is slow, only for one file in 200."""
    plot = f"{path}.svg" if next(TURN) % 200 == 0 else None
    weight_table.report(str(path), f"{path}.tsv", None, plot)


READERS: dict[str, tuple[Callable[[random.Random], Iterator[bytes]], Callable[[str | Path], None]]] = {
    "json-diagram": (functools.partial(contents, RESULTS, as_json), read_drawn),
    "json-report": (functools.partial(contents, RESULTS, as_json), read_results),
    "json-temperature": (functools.partial(contents, {"temperature": 1.5, "command": "x"}, as_json), read_temperature),
    "json-scores": (functools.partial(contents, SCORES, as_json), read_cell_scores),
    "json-cell": (functools.partial(contents, ABOUT, as_json), read_cell),
    "toml-grid": (functools.partial(contents, GRID, as_toml), read_grid),
    "numbers": (number_lists, read_numbers),
    "weights": (weight_tables, read_weights),
}
