"""The command of fairseq that a log's settings come from: fairseq writes down the settings, not what was typed."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import shlex
from typing import Any

from fairseq import options
from fairseq.registry import REGISTRIES

PARSERS = {"fairseq-train": options.get_training_parser, "fairseq-generate": options.get_generation_parser}
# They decide which options there are.
CHOICES = ("arch", "task", *REGISTRIES)


def parse(program: str, arguments: list[str]) -> tuple[argparse.ArgumentParser, dict[str, Any]]:
    """fairseq's own parser, with the options of the task, architecture, ... in `arguments`, and what it makes of them.

    Raises:
        ValueError: this fairseq does not know them.
    """
    parser = PARSERS[program]()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # fairseq tells about its defaults
    try:
        with contextlib.redirect_stderr(io.StringIO()) as said:
            return parser, vars(options.parse_args_and_arch(parser, arguments))
    except SystemExit:
        raise ValueError(said.getvalue().strip()) from None
    except RuntimeError as error:
        raise ValueError(f"unknown architecture: {error}") from error
    finally:
        logging.disable(level)


def arguments_of(program: str, settings: dict[str, Any]) -> dict[str, str | None] | None:
    """The options, with their values, that give these settings: those that are not at their defaults, and the choices.
    None where this fairseq has not all that they name, such as an architecture of another plugin."""
    given: dict[str, str | None] = {}
    for name in CHOICES:
        if settings.get(name):
            given["--" + name.replace("_", "-")] = str(settings[name])
    if program == "fairseq-generate":
        given["--path"] = str(settings.get("path"))
    try:
        while True:
            # Parsed anew for each, because some defaults are values of others: --max-tokens-valid is --max-tokens.
            parser, parsed = parse(program, listed(settings, given))
            for action in parser._actions:  # argparse has no public way to ask for its options
                name, option = action.dest, max(action.option_strings, key=len, default="")
                differs = name in settings and settings[name] != parsed.get(name)
                if differs and option and option not in given and name not in (*CHOICES, "user_dir"):
                    given[option] = None if action.nargs == 0 else written(settings[name])
                    break
            else:
                break
    except ValueError:
        return None
    if settings.get("user_dir"):  # last: fairseq refuses to import a second folder of the same name
        given["--user-dir"] = settings["user_dir"]
    return given


def listed(settings: dict[str, Any], given: dict[str, str | None]) -> list[str]:
    arguments = [str(settings.get("data"))]
    for option, value in given.items():
        arguments += [option] if value is None else [option, value]
    return arguments


def command(program: str, settings: dict[str, Any]) -> str | None:
    """A command line that gives these settings; None as of :func:`arguments_of`."""
    given = arguments_of(program, settings)
    return None if given is None else shlex.join([program, *listed(settings, given)])


def written(value: Any) -> str:
    """A value as an option takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
