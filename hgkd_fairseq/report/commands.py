"""The command of fairseq that a log's settings come from: fairseq writes down the settings, not what was typed.

Settings are data of a file. They are compared with fairseq's defaults and printed, and never given to its parser, which
imports what --user-dir names: the parser sees names out of fairseq's own registries alone.
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
# They decide which options there are.
CHOICES = {"arch": ARCH_MODEL_REGISTRY, "task": TASK_REGISTRY} | {
    name: entry["registry"] for name, entry in REGISTRIES.items()
}
# fairseq's parse_args_and_arch gives these, where they are not given, the value of another option.
COPIES = {
    "batch_size_valid": "batch_size",
    "max_tokens_valid": "max_tokens",
    "update_epoch_batch_itr": "grouped_shuffling",
}
MOST_LAYERS = 10_000  # an architecture may make a list of as many; what is larger is no size to ask it about


@functools.lru_cache(maxsize=16)
def known(
    program: str, choices: tuple[tuple[str, str], ...]
) -> tuple[dict[str, argparse.Action], dict[str, Any]] | None:
    """fairseq's options by name, those of the chosen task, architecture, ... among them; their defaults, without those
    that the architecture's function adds. None where fairseq does not take these choices together."""
    arguments = ["DATA", *(f"--{name.replace('_', '-')}={choice}" for name, choice in choices)]
    if program == "fairseq-generate":
        arguments.append("--path=PATH")
    parser = PARSERS[program]()
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)  # fairseq tells about its defaults
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            options.parse_args_and_arch(parser, arguments)  # adds the options of what is chosen
            defaults = vars(parser.parse_args(arguments))
    except (Exception, SystemExit):
        return None
    finally:
        logging.disable(level)
    found = {action.dest: action for action in parser._actions}  # argparse has no public way to ask for its options
    return found, defaults


def expected(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """All settings where these are given and nothing else: fairseq derives some from others."""
    settings = {**defaults, **given}
    for name, other in COPIES.items():
        if settings.get(name) is None:
            settings[name] = settings.get(other)
    for name in ("fp16", "bf16"):
        settings[name] = settings.get(name) or settings.get(f"memory_efficient_{name}") or False
    settings["seed"] = 1 if settings.get("seed") is None else settings["seed"]
    sizes = {name: each for name, each in settings.items() if not (isinstance(each, int) and abs(each) > MOST_LAYERS)}
    namespace = argparse.Namespace(**sizes)
    # Of sizes that do not fit each other fairseq derives nothing.
    with contextlib.suppress(Exception):
        ARCH_CONFIG_REGISTRY[settings["arch"]](namespace)
    return {**settings, **vars(namespace)}


def arguments_of(program: str, settings: dict[str, Any]) -> dict[str, str | None] | None:
    """The options, with their values, that give these settings: those that are not at their defaults, and the choices.
    None where this fairseq has not all that they name, such as an architecture of another plugin."""
    choices = {name: settings[name] for name in CHOICES if settings.get(name)}
    if program == "fairseq-generate":  # the checkpoint knows its architecture; a default stands in the settings
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
    while changed:  # anew for each, because some defaults are values of others: --max-tokens-valid is --max-tokens
        changed, wanted = False, expected(defaults, given)
        for name, action in actions.items():
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
    """A command line that gives these settings; None as of :func:`arguments_of`."""
    found = arguments_of(program, settings)
    if found is None:
        return None
    data = written(settings.get("data"))
    words: list[str] = []
    for option, value in found.items():
        if value is not None and value.startswith("-"):  # it would be taken for an option
            words.append(f"{option}={value}")
        else:
            words += [option] if value is None else [option, value]
    return shlex.join([program, *words, "--", data] if data.startswith("-") else [program, data, *words])


def written(value: Any) -> str:
    """A value as an option takes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
