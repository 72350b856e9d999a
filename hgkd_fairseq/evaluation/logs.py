"""fairseq's own logs, of fairseq-train, fairseq-hydra-train and fairseq-generate: the settings that they begin with,
and the numbers that come after, in --log-format simple and json (tqdm writes simple where it is no terminal).

A log is data: what stands in it is read by the few rules below, whatever it is, and nothing of it is run.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgkd_fairseq import files

# A message of a logger, behind whatever a progress bar left on its line. Each takes time linear in the line's length.
FORMS = (
    re.compile(r"\| INFO \| (\S+) \| (.*)"),  # "2026-01-31 12:00:00 | INFO | valid | epoch ..."
    re.compile(r"^INFO:([^\s:]+):(.*)"),  # fairseq-generate: "INFO:fairseq_cli.generate:..."
    re.compile(
        r"^\[[^\]]*\]\[([^\]]*)\]\[INFO\] - (.*)"
    ),  # hydra: "[2026-01-31 12:00:00,000][valid][INFO] - epoch ..."
)
CURVES = ("nll_loss", "bleu", "ece")  # of validation
MOST_UPDATES = 1e15  # above it a float is no whole number that can be counted on


@dataclass
class Log:
    """What a log tells."""

    settings: dict[str, Any] = field(default_factory=dict)  # of the last start, by the options' names; see `value`
    # By name, ([updates], [value]): those of CURVES and, of training, teacher_share, many points an epoch where the log
    # has them, and epoch_share, the mean of each epoch. A value may be nan or infinite.
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.settings or self.curves)

    @property
    def diverged(self) -> int | None:
        """The update from which on no NLL on validation was a number; None where the last one is."""
        first = None
        for updates, value in zip(*self.curves.get("nll_loss", ([], [])), strict=True):
            first = None if math.isfinite(value) else updates if first is None else first
        return first

    @property
    def epochs(self) -> list[dict[str, float]]:
        """Of each validation: updates, NLL (bits) and ECE, and the teacher's share in the epoch that ends there. What
        is no number, or not logged, is left out."""
        names = {"valid_nll": "nll_loss", "valid_ece": "ece", "teacher_share": "epoch_share"}
        known = {key: dict(zip(*self.curves.get(name, ([], [])), strict=True)) for key, name in names.items()}
        found = []
        for updates in known["valid_nll"]:
            values = {key: curve.get(updates, math.nan) for key, curve in known.items()}
            found.append({"updates": updates} | {key: one for key, one in values.items() if math.isfinite(one)})
        return found


def read(file: Path) -> Log:
    """Read the log of a run and, where it was stopped and resumed, of its resumptions, one after the other.

    Raises:
        UserError: the file is no text, or cannot be read.
    """
    log, hint = Log(), "keep there what fairseq printed"
    files.refuse_irregular(file, hint)
    for line in files.read_lines(file, hint):
        found = next((found for form in FORMS if (found := form.search(line))), None)
        if found:
            take(log, found[1], found[2].rstrip())
    train = log.curves.get("train")
    shares = {"teacher_share": log.curves.get("train_inner", train), "epoch_share": train}
    curves = {name: log.curves.get(name) for name in CURVES} | shares
    return Log(log.settings, {name: curve for name, curve in curves.items() if curve})


def take(log: Log, tag: str, message: str) -> None:
    """Add what one message tells; `tag` is a logger's name, or that of a subset."""
    if message.startswith("{'_name'"):
        log.settings = settings(message) or log.settings
        return
    if tag in ("train", "train_inner"):
        numbers = numbers_of(tag, message)
        add(log, tag, numbers.get("num_updates"), numbers.get("teacher_share"))
    elif tag == str(log.settings.get("valid_subset", "valid")).split(",")[0]:  # the one that chooses the checkpoint
        numbers = numbers_of(tag, message)
        # fairseq's cross_entropy, whose loss it is, logs no nll_loss of its own.
        numbers.setdefault("nll_loss", numbers.get("loss"))
        for name in CURVES:
            add(log, name, numbers.get("num_updates"), numbers.get(name))


def add(log: Log, name: str, updates: float | None, value: float | None) -> None:
    if updates is None or value is None or not 0 <= updates < MOST_UPDATES:  # nan is in no interval
        return
    x, y = log.curves.setdefault(name, ([], []))
    while x and x[-1] >= updates:  # a run that was killed is resumed from an earlier update
        x.pop()
        y.pop()
    x.append(int(updates))
    y.append(value)


def numbers_of(tag: str, message: str) -> dict[str, Any]:
    """The numbers of a line of fairseq's progress bar, by name.

    simple: epoch 001 | valid on 'valid' subset | loss 5.3 | num_updates 9; within an epoch: epoch 001:  5 / 9 loss=5.3,
    ppl=39, num_updates=5.
    json: {"epoch": 1, "valid_loss": "5.3", "valid_num_updates": "9"}.
    """
    if message.startswith("{"):
        try:
            pairs: Any = json.loads(message, parse_int=float).items()
        except (ValueError, RecursionError):  # cut short when the run was killed, or no line of fairseq's
            return {}
    else:
        words = message.replace("=", " ").split()
        pairs = ((name, value.rstrip(",")) for name, value in itertools.pairwise(words))
    numbers: dict[str, Any] = {}
    for name, value in pairs:
        try:
            numbers[name.removeprefix(f"{tag}_")] = float(value)
        except (TypeError, ValueError):
            continue
    return numbers


def settings(message: str) -> dict[str, Any] | None:
    """The settings of fairseq's first message, the repr of its configuration, by option; None of one that is cut short.

    A configuration has groups (common, dataset, ...), or is a Namespace of all options where the command line was used.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            tokens = tokenized(message)
            groups = value(next(tokens), tokens)
        if next(tokens, None) is not None or not isinstance(groups, dict):
            return None
    except (ValueError, SyntaxError, StopIteration):
        return None
    flat: dict[str, Any] = {}
    for name, group in groups.items():
        if isinstance(group, dict):
            # The group of a model, a task or a criterion is named by its choice: 'task': {'_name': 'translation', ...}.
            choice = group.get("_name")
            if isinstance(choice, str):
                flat.setdefault("arch" if name == "model" else name, choice)
            own = {key: each for key, each in group.items() if not isinstance(each, dict) and key != "_name"}
            # Under hydra an option that is another group's is written as a reference: '${dataset.max_tokens}'.
            flat |= {key: each for key, each in own.items() if key not in flat and not str(each).startswith("${")}
    return flat


TOKEN = re.compile(
    r"""\s*([a-zA-Z]{0,2}(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|[\[\](){},:=]|[^\s\[\](){},:='"]+)""", flags=re.DOTALL
)
CLOSING = {"{": "}", "[": "]", "(": ")"}
CONSTANTS = {"None": None, "True": True, "False": False}
DEEPEST = 20  # a configuration has groups in groups at most


def tokenized(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if not found:
            raise ValueError(f"no value at {place}")
        yield found[1]
        place = found.end()


def value(token: str, tokens: Iterator[str], depth: int = 0) -> Any:
    """What the repr of plain data says, from `token` on: None, bool, int, float, str, lists (sets too) and tuples
    of them and dicts by str. What is none of these is its own text, such as a choice, which stands without quotes:
    previous-epoch.

    Raises:
        ValueError, SyntaxError, StopIteration: it is no such text.
    """
    if depth > DEEPEST:
        raise ValueError("too deep")
    if token in CLOSING:
        return collection(CLOSING[token], tokens, depth)
    if token[-1] in "'\"":
        text = ast.literal_eval(token)
        return text if isinstance(text, str) else token
    if token in "}]),:=":
        raise ValueError("a value is missing")
    if token == "Namespace":
        if next(tokens) != "(":
            raise ValueError("no Namespace")
        return collection(")", tokens, depth)
    if token in CONSTANTS:
        return CONSTANTS[token]
    if re.fullmatch(r"-?\d{1,20}", token):
        return int(token)
    try:
        return float(token)
    except ValueError:
        return token


def collection(closing: str, tokens: Iterator[str], depth: int) -> Any:
    """The rest of a dict, a Namespace, a list, a tuple or a set, behind its opening bracket."""
    items: list = []
    named: dict[str, Any] = {}
    token = next(tokens)
    while token != closing:
        item = value(token, tokens, depth + 1)
        token = next(tokens)
        if token in (":", "="):
            named[str(item)] = value(next(tokens), tokens, depth + 1)
            token = next(tokens)
        else:
            items.append(item)
        if token == ",":
            token = next(tokens)
        elif token != closing:
            raise ValueError("no comma")
    if closing == ")" and items:
        return tuple(items)
    return items if items or closing == "]" else named


class LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise


@contextlib.contextmanager
def logged(file: Path) -> Iterator[None]:
    """What fairseq logs, its settings first, goes to a file; hydra's warnings of fairseq's ways to nobody.

    Raises:
        OSError: the disk is full, say, of which logging itself would only print call stacks.
    """
    handler = LogFile(file, "w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s | %(levelname)s | %(name)s | %(message)s"))
    root = logging.getLogger()
    level, handlers = root.level, root.handlers
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        root.setLevel(level)
        root.handlers = handlers
        handler.close()
