"""A study as its grid file describes it: the data, and cells that are each one training run and its scores.

A grid is a .toml file, such as multi30k.toml in this folder; `hgkd methods` lists the methods. A study has one folder,
in which all commands run with relative paths, so that the folder can be moved. It contains:

    data.json  text/  data-bin/         the data (text/ may hold valid1.LANG, see prepare_data.sh)
    SETTING/METHOD/seed-N/              a cell: cell.json (signature, commands), train.log, checkpoints, score.log,
                                        the files of hgkd score, of which scores.json is written last
    teacher/NAME/seed-N/                the cell of a teacher; NAME is a size or one of [teachers]
    teacher/NAME/checkpoint.pt          a copy of the checkpoint that [teachers.NAME] gives as its path
"""

from __future__ import annotations

import argparse
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import hgkd_fairseq
from hgkd_fairseq import files, methods
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.files import Within

PRECISIONS = {"fp32": [], "bf16": ["--bf16"], "fp16": ["--fp16"]}
TEMPERATURE = 1.5  # the teacher's temperature in the paper on the hard gate (arXiv:2210.12427)
AUTO = "auto"  # the temperature that fits the teacher to the validation set
TAKEN = ("teacher", "text", "corpus", "data-bin", "data.json", "lock")  # reserved names in a study's folder
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


def option_string(value: Any) -> str | None:
    """A schema (see files.mismatch) for command line options."""
    if not isinstance(value, str) or "\0" in value:
        return "is not text"
    if len(value) > 10_000:
        return "is too long"
    try:
        shlex.split(value)
    except ValueError as error:
        return f"is no list of options: {error}"
    return None


def curve_points(value: Any) -> str | None:
    point = {"updates": Within(0), "valid_nll": NUMBER, "valid_ece": SHARE, "teacher_share?": SHARE}
    return files.mismatch(value, [point], "curve") or (None if value else "is empty")


def rule(value: Any) -> str | None:
    """A schema for a rule by which the checkpoint of a cell to score is chosen."""
    return None if value in ("best", "best-bleu", "last") else 'is none of "best", "best-bleu", "last"'


def degree(value: Any) -> str | None:
    """A schema for a temperature."""
    return None if value == AUTO else Within(0.01, 100, float)(value)


def degree_text(temperature: float | str) -> str:
    """Return a temperature as it is written on a command line."""
    return temperature if isinstance(temperature, str) else f"{temperature:g}"


def checkpoint(value: Any) -> str | None:
    """A schema for the choice of a teacher's checkpoint."""
    return None if value in ("best", "last") else 'is neither "best" nor "last"'


NUMBER = Within(-1e12, 1e12, float)
SHARE = Within(0, 1 + 1e-9, float)
SEED = Within(0, 2**32 - 1)
COUNT = Within(1)
GRID = {
    "data": {"corpus?": str, "text?": str, "pairs?": COUNT, "vocabulary?": Within(1, 2**31 - 1), "like?": str},
    "training": {"updates": COUNT, "precision": str, "options": option_string, "checkpoints?": [rule]},
    "sizes": {str: {"options": option_string}},
    "settings": {str: {"teacher": str, "student": str, "updates?": COUNT}},
    "teacher": {"method": str, "seed": SEED},
    "teachers?": {str: {"size?": str, "updates?": COUNT, "seeds?": [SEED], "checkpoint?": checkpoint, "path?": str}},
    "generation": {"options": option_string},
    "methods?": {str: {"options?": option_string, "of?": str, "title?": str}},
    "cells": [{"settings": [str], "methods": [str], "seeds": [SEED], "temperatures?": [degree]}],
}
# Schema of the keys of cell.json that are read again.
ABOUT = {
    "signature": str,
    "setting": str,
    "method": str,
    "title": str,
    "teacher": (str, None),
    "seed": SEED,
    "temperature": (NUMBER, str, None),
}
# Schema of scores.json.
SCORES = {
    **dict.fromkeys(("bleu", "brevity_penalty", "chrf", "lenpen", "lenpen_bleu", "lenpen_brevity_penalty"), NUMBER),
    **dict.fromkeys(("nll", "temperature", "scaled_nll", "valid_nll_best", "valid_nll_last", "minutes"), NUMBER),
    **dict.fromkeys(("ece", "inference_ece", "scaled_ece"), SHARE),
    "teacher_share": (SHARE, None),
    **dict.fromkeys(("best_updates", "last_updates", "parameters"), Within(0)),
    "curve": curve_points,
    "signatures": dict.fromkeys(("bleu", "chrf", "ece", "inference_ece"), str),
}


def read_scores(folder: Path) -> dict[str, Any]:
    """Return the scores of a finished cell.

    Raises:
        UserError: scores.json is missing, damaged or incomplete.
    """
    return files.read_json(
        folder / "scores.json", SCORES, "file of `hgkd score` on a finished cell; remove it, and run.py scores it again"
    )


def diverged(folder: Path) -> int | None:
    """Return the update since which the validation NLL is not finite; None if the last is finite or none is logged."""
    from hgkd_fairseq.evaluation import logs

    return logs.read(folder / "train.log").diverged if (folder / "train.log").exists() else None


def read_about(folder: Path, **more: Any) -> dict[str, Any]:
    """Return the content of a cell's cell.json. `more` are schemas of further required keys.

    Raises:
        UserError: the file is missing, damaged or incomplete.
    """
    what = f"file of run.py; remove {folder} to run the cell again"
    return files.read_json(folder / "cell.json", {**ABOUT, **more}, what)


@dataclass(frozen=True)
class Cell:
    """One training run and its scores."""

    folder: str  # relative to the study's folder, such as same/hkd-t/seed-1
    setting: str
    method: str  # name of a method of `hgkd methods` or of the grid's [methods]
    title: str  # title of the method
    seed: int
    temperature: float | str | None  # of the teacher, or "auto"; None: no teacher, or the method fixes it
    updates: int
    signature: str
    train: list[str] = field(hash=False)  # arguments of fairseq-train
    score: list[str] = field(hash=False)  # arguments of hgkd score
    teachers: tuple[str, ...] = ()  # folders of its teachers' cells, which must be finished before
    # Arguments of hgkd translate and hgkd distil-data; empty if it is not trained on its teacher's translations.
    translate: list[str] = field(default_factory=list, hash=False)
    distil: list[str] = field(default_factory=list, hash=False)

    @property
    def commands(self) -> list[str]:
        """Commands of training and scoring, for documentation, to run in the study's folder after those of `making`."""
        return [
            f"fairseq-train {shlex.join(self.train)} --user-dir $(hgkd user-dir)",
            f"hgkd score {shlex.join(self.score)}",
        ]

    @property
    def making(self) -> list[str]:
        """Commands that make the training data, if these are translations of the teacher."""
        return [f"hgkd {shlex.join(words)}" for words in (self.translate, self.distil) if words]

    def description(self) -> dict[str, Any]:
        """Return the content of cell.json."""
        return {
            "signature": self.signature,
            "setting": self.setting,
            "method": self.method,
            "title": self.title,
            "teacher": ":".join(self.teachers) or None,
            "seed": self.seed,
            "temperature": self.temperature,
            "updates": self.updates,
            "commands": self.commands,
            "making": self.making,
        }


class Grid:
    """A grid file, which is checked when it is read.

    Args:
        file: the .toml file.
        precision: one of PRECISIONS, in place of that of the grid.

    Raises:
        UserError: the file is missing or is not a valid grid.
    """

    def __init__(self, file: Path, precision: str | None = None):
        self.file = file
        self.table = read_toml(file)
        for section in ("data", "training", "sizes", "settings", "teacher", "generation", "cells"):
            if section not in self.table:
                raise UserError(f"{file} has no section [{section}]; multi30k.toml shows all of them")
        found = files.mismatch(self.table, GRID)
        if found:
            raise UserError(f"{file}: {found}; multi30k.toml shows where it belongs")
        self.data: dict[str, Any] = self.table["data"]
        if ("corpus" in self.data) == ("text" in self.data):
            raise UserError(f"{file}: [data] needs either corpus, a name that get_data.sh knows, or text, a folder")
        if ("vocabulary" in self.data) == ("like" in self.data):
            raise UserError(
                f"{file}: [data] needs either vocabulary, a number of pieces, or like, prepared data with its own"
            )
        for name, teacher in self.table.get("teachers", {}).items():
            if ("size" in teacher) == ("path" in teacher) or ("path" in teacher and len(teacher) > 1):
                raise UserError(
                    f"{file}: [teachers.{name}] needs size, of one to train, or path alone, a checkpoint to take"
                )
        for kind in ("sizes", "settings", "teachers"):
            if kind not in self.table:
                continue
            for name in self.table[kind]:
                if not re.fullmatch(NAME, name) or name in TAKEN:
                    raise UserError(f"{file}: [{kind}.{name}]: it becomes a folder's name; take other letters")
        for block in self.table["cells"]:
            for temperature in block.get("temperatures", []):
                # Folder names have 6 digits of it, so that two temperatures could share a folder.
                if temperature != AUTO and float(f"{temperature:g}") != temperature:
                    raise UserError(f"{file}: temperatures {temperature!r}: give at most 6 digits")
        own = self.table["training"]["precision"]
        if own not in PRECISIONS:
            raise UserError(f"{file}: [training] precision {own!r}: it must be one of {', '.join(PRECISIONS)}")
        self.table["training"]["precision"] = precision or own
        for name in self.table.get("methods", {}):
            self.method(name)

    def cells(self) -> list[Cell]:
        """Return all cells, without duplicates. Teachers precede their students, and the cells of each block of the
        grid are ordered by seed.

        Raises:
            UserError: the grid names an unknown setting, method or size, or a teacher's method needs a teacher.
        """
        found: dict[str, Cell] = {}
        for block in self.table["cells"]:
            for cell in self.block(block):
                for teacher in cell.teachers:
                    found.setdefault(teacher, self.teacher(*Path(teacher).parts[1:]))
                found.setdefault(cell.folder, cell)
        return list(found.values())

    def block(self, block: dict[str, Any]) -> Iterator[Cell]:
        for seed in block["seeds"]:
            for temperature in block.get("temperatures", [TEMPERATURE]):
                for setting in block["settings"]:
                    sizes = self.known("settings", setting)
                    for method in block["methods"]:
                        yield self.cell(setting, method, seed, temperature, sizes["student"], sizes["teacher"])

    def taken(self) -> dict[str, str]:
        """Return the paths of teachers' checkpoints that the grid gives, by name. The study uses copies (`copy_of`)."""
        teachers = self.table.get("teachers", {})
        return {name: str(Path(own["path"]).absolute()) for name, own in teachers.items() if "path" in own}

    def trained_as(self, teacher: str) -> str:
        """Return the name of the cell that trains a teacher: its size, or the first of [teachers] trained equally."""
        size, updates, *_ = self.teachers(teacher)
        if updates is None:
            return size
        trained = [one for one in self.table["teachers"] if one not in self.taken()]
        return next(one for one in trained if self.teachers(one)[:2] == (size, updates))

    def known(self, kind: str, name: str) -> dict[str, Any]:
        table = methods.table() if kind == "methods" else self.table[kind]
        if name not in table:
            raise UserError(f"{self.file} names {name}, which is none of the {kind}: {', '.join(table)}")
        return table[name]

    def method(self, name: str) -> tuple[str, list[str], str | None]:
        """Return the title, the options and the targets (see `methods.data`) of a method of `hgkd methods`, or of a
        variant that the grid defines: [methods.NAME] adds options to the method NAME, or to the one given by `of`.
        """
        own = self.table.get("methods", {}).get(name, {})
        known = own.get("of", name)
        title = own.get("title", name if "of" in own else self.known("methods", known)["title"])
        self.known("methods", known)
        return title, [*methods.options(known), *shlex.split(own.get("options", ""))], methods.data(known)

    def teacher(self, name: str, seed: str) -> Cell:
        size, updates, *_ = self.teachers(name)
        number = int(seed.removeprefix("seed-"))
        return self.cell("teacher", self.table["teacher"]["method"], number, None, size, None, name, updates)

    def teachers(self, name: str) -> tuple[str, int | None, list[int], str]:
        """Return size, updates, seeds and choice of checkpoint of the teachers [teachers.NAME], or of a size.

        Raises:
            UserError: there are neither such teachers nor such a size.
        """
        seeds = [self.table["teacher"]["seed"]]
        own = self.table.get("teachers", {}).get(name)
        if own is None:
            self.known("sizes", name)
            return name, None, seeds, "best"
        return own["size"], own.get("updates"), own.get("seeds", seeds), own.get("checkpoint", "best")

    def cell(self, setting, name, seed, temperature, size, teacher, own_name=None, own_updates=None) -> Cell:
        """Return a cell. `own_name` and `own_updates` are given for a teacher's cell only: its name and its updates."""
        title, options, select = self.method(name)
        training = self.table["training"]
        updates = own_updates or self.table["settings"].get(setting, {}).get("updates", training["updates"])
        taught: tuple[str, ...] = ()
        path, made = "", ""  # the teachers' checkpoints, and the folder of their translations
        if select or "--teacher-path" in options:
            if teacher is None:
                raise UserError(f"{self.file}: [teacher] method {name} needs a teacher itself; take base")
            made = f"teacher/{teacher}"
            if teacher in self.taken():
                path = copy_of(teacher)
            else:
                _, _, seeds, which = self.teachers(teacher)
                # Teachers that differ only in the choice of the checkpoint share a cell.
                taught = tuple(f"teacher/{self.trained_as(teacher)}/seed-{one}" for one in seeds)
                path = ":".join(f"{folder}/checkpoint_{which}.pt" for folder in taught)
                made = taught[0] if len(taught) == 1 and which == "best" else made
        if "--teacher-path" not in options:
            temperature = None
        else:
            options = [path if word == methods.TEACHER else word for word in options]
            if AUTO in options:  # the grid sets the temperature
                place = options.index(AUTO)
                del options[place - 1 : place + 1]
                options += ["--teacher-temperature", degree_text(temperature)]
            else:
                temperature = None
        variant = name
        if temperature not in (None, TEMPERATURE):
            variant += f"-tau-{degree_text(temperature)}"
        folder = f"teacher/{own_name}/seed-{seed}" if setting == "teacher" else f"{setting}/{variant}/seed-{seed}"
        data, translate, distil = "data-bin", [], []
        search = self.table["generation"]["options"]
        if select:
            data = f"{made}/data-bin-{select}"
            translate = ["translate", "data-bin", "--teacher-path", path, "--output", f"{made}/translations"]
            translate += ["--nbest", beam_of(search), *shlex.split(search)]
            distil = ["distil-data", f"{made}/translations", "data-bin", "--output", data, "--select", select]
        rules = [] if setting == "teacher" else training.get("checkpoints", [])
        train = [
            *(data, "--save-dir", folder, "--task", "translation_with_teacher", "--criterion", "hard_gate_kd"),
            *options,
            *shlex.split(self.known("sizes", size)["options"]),
            *shlex.split(training["options"]),
            *PRECISIONS[training["precision"]],
            *("--max-update", str(updates), "--seed", str(seed)),
            # No sentence is dropped; batches are made in the main process, which leaves a core to another cell.
            *("--required-batch-size-multiple", "1", "--num-workers", "0"),
            # Plain cross-entropy is comparable across methods.
            *("--best-checkpoint-metric", "nll_loss", *([] if "best-bleu" in rules else ["--no-epoch-checkpoints"])),
            *("--no-progress-bar", "--log-format", "json"),
        ]
        generation = f"--generate={search}"
        score = ["data-bin", folder, "--reference", "text/test.en", "--own-lenpen", generation]
        # The best by NLL last: if its scores exist, so do all others.
        score += [word for one in sorted(rules, key="best".__eq__) for word in ("--checkpoint", one)]
        parts = {
            "setting": setting,
            "method": variant,
            "size": size,
            "teacher": teacher if path else None,
            "temp": temperature,
            "seed": seed,
            "updates": updates,
            "precision": training["precision"],
            "pairs": self.data.get("pairs", "all"),
            "vocabulary": self.data.get("vocabulary"),
        }
        signature = "|".join(f"{key}:{value}" for key, value in parts.items() if value is not None)
        return Cell(
            folder, setting, name, title, seed, temperature, updates, signature, train, score, taught, translate, distil
        )


def beam_of(search: str) -> str:
    """Return the beam size from options of fairseq-generate, which is the number of translations to choose from."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--beam", default="5")
    return parser.parse_known_args(shlex.split(search))[0].beam


def read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(files.read_text(file, "name a grid; scripts/study/multi30k.toml is one"))
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is no TOML: {error}") from None


def copy_of(teacher: str) -> str:
    """Return the path in the study's folder of the copy of a teacher's checkpoint."""
    return f"teacher/{teacher}/checkpoint.pt"


def user_dir() -> str:
    return str(Path(hgkd_fairseq.__file__).parent)
