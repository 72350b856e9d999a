"""The table of methods, methods.toml: what each adds to a training."""

from __future__ import annotations

import functools
import shlex
import tomllib
from pathlib import Path

from hgkd_fairseq.errors import UserError

TEACHER = "TEACHER"  # stands for the teacher's checkpoint


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """By name a method's "title", its "options" of fairseq-train, which may hold TEACHER, and perhaps its "data"."""
    return tomllib.loads(Path(__file__).with_name("methods.toml").read_text(encoding="utf-8"))


def options(name: str, teacher: str = TEACHER) -> list[str]:
    """The options of a method, with the checkpoint `teacher`.

    Raises:
        UserError: there is no such method.
    """
    return [teacher if word == TEACHER else word for word in shlex.split(found(name)["options"])]


def data(name: str) -> str:
    """What a method is trained on: "" for the references, or which of the teacher's translations, as
    `hgkd distil-data --select` has it.

    Raises:
        UserError: there is no such method.
    """
    return found(name).get("data", "")


def found(name: str) -> dict[str, str]:
    if name not in table():
        raise UserError(f"{name} is no method; known are: {', '.join(table())}")
    return table()[name]


def text() -> str:
    """A line for each method: name, title and options with tabs between them."""
    return "\n".join(f"{name}\t{row['title']}\t{row['options']}" for name, row in table().items())
