"""Reconstruction of fairseq's commands from the settings in its logs, which do not have the commands themselves.

Settings are untrusted data. They are compared with fairseq's defaults and printed, but never passed to its parser,
which would import what --user-dir names: the parser only gets names that are in fairseq's own registries.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import logging
import shlex
from typing import Any

from fairseq import options
from fairseq.models import ARCH_CONFIG_REGISTRY, ARCH_MODEL_REGISTRY
from fairseq.registry import REGISTRIES
from fairseq.tasks import TASK_REGISTRY

from hgkd_fairseq.errors import flag

PARSERS = {"fairseq-train": options.get_training_parser, "fairseq-generate": options.get_generation_parser}
# Settings that determine which options exist, with the registries of their values.
CHOICES = {"arch": ARCH_MODEL_REGISTRY, "task": TASK_REGISTRY} | {
    name: entry["registry"] for name, entry in REGISTRIES.items()
}
# Options to which fairseq's parse_args_and_arch assigns the value of another option if they are not given.
COPIES = {
    "batch_size_valid": "batch_size",
    "max_tokens_valid": "max_tokens",
    "update_epoch_batch_itr": "grouped_shuffling",
}
MOST_LAYERS = 10_000  # larger numbers are not passed to architectures, which may make lists of this length


@functools.lru_cache(maxsize=16)
def known(
    program: str, choices: tuple[tuple[str, str], ...]
) -> tuple[dict[str, argparse.Action], dict[str, Any]] | None:
    """Return fairseq's options and their defaults, both by name of the setting.

    Args:
        program: a key of PARSERS.
        choices: names and values of the CHOICES, such as task and architecture, whose options are included.

    Returns:
        The options, and their defaults without those that the function of the architecture sets; None if fairseq does
        not accept these choices.
    """
    arguments = ["DATA", *(f"--{name.replace('_', '-')}={choice}" for name, choice in choices)]
    if program == "fairseq-generate":
        arguments.append("--path=PATH")
    parser = PARSERS[program]()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # fairseq logs messages about its defaults
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options.parse_args_and_arch(parser, arguments)  # adds the options of the choices to the parser
            defaults = vars(parser.parse_args(arguments))
    except (Exception, SystemExit):
        return None
    finally:
        logging.disable(level)
    found = {action.dest: action for action in parser._actions}  # argparse has no public access to its options
    return found, defaults


def expected(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return all settings that result from `given` and the defaults, as fairseq derives some settings from others."""
    settings = {**defaults, **given}
    for name, other in COPIES.items():
        if settings.get(name) is None:
            settings[name] = settings.get(other)
    for name in ("fp16", "bf16"):
        settings[name] = settings.get(name) or settings.get(f"memory_efficient_{name}") or False
    settings["seed"] = 1 if settings.get("seed") is None else settings["seed"]
    sizes = {name: each for name, each in settings.items() if not (isinstance(each, int) and abs(each) > MOST_LAYERS)}
    namespace = argparse.Namespace(**sizes)
    # The function of an architecture may fail on inconsistent sizes; nothing more is derived then.
    with contextlib.suppress(Exception):
        ARCH_CONFIG_REGISTRY[settings["arch"]](namespace)
    return {**settings, **vars(namespace)}


def arguments_of(program: str, settings: dict[str, Any]) -> dict[str, str | None] | None:
    """Return the options that result in some settings: the choices, and those that are not at their defaults.

    Args:
        program: a key of PARSERS.
        settings: settings by name, from a log.

    Returns:
        The values of the options by option, None for flags; None instead of a dict if fairseq does not know a choice,
        such as an architecture of another plugin.
    """
    choices = {name: settings[name] for name in CHOICES if settings.get(name)}
    if program == "fairseq-generate":  # the architecture is in the checkpoint; the settings have a default
        choices.pop("arch", None)
    if not all(isinstance(choice, str) and choice in CHOICES[name] for name, choice in choices.items()):
        return None
    fairseqs = known(program, tuple(choices.items()))
    if fairseqs is None:
        return None
    actions, defaults = fairseqs
    found: dict[str, str | None] = {flag(name): choice for name, choice in choices.items()}
    if program == "fairseq-generate":
        found["--path"] = written(settings.get("path"))
    given: dict[str, Any] = {}
    changed = True
    while changed:  # repeat after each option, as defaults may depend on it: --max-tokens-valid is --max-tokens
        changed, wanted = False, expected(defaults, given)
        for name, action in actions.items():
            option = flag(name)
            if option not in action.option_strings:
                option = max(action.option_strings, key=len, default="")
            if not option or option in found or settings.get(name) is None or name in ("user_dir", "help"):
                continue
            if settings[name] != wanted.get(name):
                given[name] = settings[name]
                found[option] = None if action.nargs == 0 else written(settings[name])
                changed = True
                break
    if settings.get("user_dir"):
        found["--user-dir"] = written(settings["user_dir"])
    return found


def command(program: str, settings: dict[str, Any]) -> str | None:
    """Return a command line that results in some settings; None in the cases of :func:`arguments_of`."""
    found = arguments_of(program, settings)
    if found is None:
        return None
    data = written(settings.get("data"))
    words: list[str] = []
    for option, value in found.items():
        if value is not None and value.startswith("-"):  # argparse would take the value for an option
            words.append(f"{option}={value}")
        else:
            words += [option] if value is None else [option, value]
    return shlex.join([program, *words, "--", data] if data.startswith("-") else [program, data, *words])


def written(value: Any) -> str:
    """Return the text of a value as an argument of an option."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
