"""Access to methods.toml, the table of distillation methods and their options of fairseq-train."""

from __future__ import annotations

import functools
import shlex
import tomllib
from pathlib import Path

from hgkd_fairseq.errors import UserError

TEACHER = "TEACHER"  # placeholder for the teacher's checkpoint


@functools.cache
def table() -> dict[str, dict[str, str]]:
    """Return the methods by name: "title", "options" of fairseq-train, which may contain TEACHER, and optionally "data"
    (see :func:`data`)."""
    return tomllib.loads(Path(__file__).with_name("methods.toml").read_text(encoding="utf-8"))


def options(name: str, teacher: str = TEACHER) -> list[str]:
    """Return the options of fairseq-train for a method.

    Args:
        name: name of the method.
        teacher: path of the teacher's checkpoint, which replaces the placeholder TEACHER.

    Raises:
        UserError: there is no such method.
    """
    return [teacher if word == TEACHER else word for word in shlex.split(found(name)["options"])]


def data(name: str) -> str:
    """Return the targets that a method is trained on: "" for the references, or which of the teacher's translations, as
    a value of `hgkd distil-data --select`.

    Raises:
        UserError: there is no such method.
    """
    return found(name).get("data", "")


def found(name: str) -> dict[str, str]:
    if name not in table():
        raise UserError(f"{name} is no method; known are: {', '.join(table())}")
    return table()[name]


def text() -> str:
    """Return a line for each method: name, title and options, separated by tabs."""
    return "\n".join(f"{name}\t{row['title']}\t{row['options']}" for name, row in table().items())
