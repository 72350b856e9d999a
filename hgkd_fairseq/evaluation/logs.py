"""Reader of the logs of fairseq-train, fairseq-hydra-train and fairseq-generate: the settings at their beginning, and
the numbers that follow, in --log-format simple or json (tqdm writes simple if it is not on a terminal).

A log is untrusted data: it is parsed by the rules below, and nothing in it is executed.
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

# Forms of a logged message, which may follow the output of a progress bar on its line. Matching takes time linear in
# the length of the line.
FORMS = (
    re.compile(r"\| INFO \| (\S+) \| (.*)"),  # "2026-01-31 12:00:00 | INFO | valid | epoch ..."
    re.compile(r"^INFO:([^\s:]+):(.*)"),  # fairseq-generate: "INFO:fairseq_cli.generate:..."
    re.compile(
        r"^\[[^\]]*\]\[([^\]]*)\]\[INFO\] - (.*)"
    ),  # hydra: "[2026-01-31 12:00:00,000][valid][INFO] - epoch ..."
)
CURVES = ("nll_loss", "bleu", "ece")  # logged in validation
MOST_UPDATES = 1e15  # numbers of updates below it are exact as a float


@dataclass
class Log:
    """The content of a log."""

    settings: dict[str, Any] = field(default_factory=dict)  # of the last start, by option name; see `value`
    # By name, ([updates], [values]): the CURVES of validation and, of training, teacher_share (several points per epoch
    # if they were logged) and epoch_share (the mean of each epoch). A value may be NaN or infinite.
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)

    @property
    def empty(self) -> bool:
        return not (self.settings or self.curves)

    @property
    def diverged(self) -> int | None:
        """The first update since which the validation NLL has not been finite; None if the last one is finite."""
        first = None
        for updates, value in zip(*self.curves.get("nll_loss", ([], [])), strict=True):
            first = None if math.isfinite(value) else updates if first is None else first
        return first

    @property
    def epochs(self) -> list[dict[str, float]]:
        """For each validation: updates, valid_nll (bits) and valid_ece, and the teacher_share of the epoch that ends
        with it. Values that are not finite or not logged are left out."""
        names = {"valid_nll": "nll_loss", "valid_ece": "ece", "teacher_share": "epoch_share"}
        known = {key: dict(zip(*self.curves.get(name, ([], [])), strict=True)) for key, name in names.items()}
        found = []
        for updates in known["valid_nll"]:
            values = {key: curve.get(updates, math.nan) for key, curve in known.items()}
            found.append({"updates": updates} | {key: one for key, one in values.items() if math.isfinite(one)})
        return found


def read(file: Path) -> Log:
    """Read the log of a run; if it was resumed, the logs of all starts follow each other in the file.

    Raises:
        UserError: the file cannot be read, or is no text.
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
    """Add the content of a message to a log; `tag` is the name of the logger, for validation that of the subset."""
    if message.startswith("{'_name'"):
        log.settings = settings(message) or log.settings
        return
    if tag in ("train", "train_inner"):
        numbers = numbers_of(tag, message)
        add(log, tag, numbers.get("num_updates"), numbers.get("teacher_share"))
    elif tag == str(log.settings.get("valid_subset", "valid")).split(",")[0]:  # selects the checkpoint
        numbers = numbers_of(tag, message)
        # fairseq's cross_entropy logs the NLL as its loss alone.
        numbers.setdefault("nll_loss", numbers.get("loss"))
        for name in CURVES:
            add(log, name, numbers.get("num_updates"), numbers.get(name))


def add(log: Log, name: str, updates: float | None, value: float | None) -> None:
    if updates is None or value is None or not 0 <= updates < MOST_UPDATES:  # false for NaN
        return
    x, y = log.curves.setdefault(name, ([], []))
    while x and x[-1] >= updates:  # a killed run resumes from an earlier update
        x.pop()
        y.pop()
    x.append(int(updates))
    y.append(value)


def numbers_of(tag: str, message: str) -> dict[str, Any]:
    """Return the numbers in a line of fairseq's progress bar, by name, without the prefix `tag`.

    Lines in the format simple: epoch 001 | valid on 'valid' subset | loss 5.3 | num_updates 9; within an epoch:
    epoch 001:  5 / 9 loss=5.3, ppl=39, num_updates=5.
    Lines in the format json: {"epoch": 1, "valid_loss": "5.3", "valid_num_updates": "9"}.
    """
    if message.startswith("{"):
        try:
            pairs: Any = json.loads(message, parse_int=float).items()
        except (ValueError, RecursionError):  # truncated as the run was killed, or not fairseq's
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
    """Parse the settings in fairseq's first message, the repr of its configuration.

    A configuration has groups (common, dataset, ...); from the command line, some are Namespaces of all options.

    Returns:
        Settings by option name; None if the message is truncated or malformed.
    """
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escape sequences
            tokens = tokenized(message)
            groups = value(next(tokens), tokens)
        if next(tokens, None) is not None or not isinstance(groups, dict):
            return None
    except (ValueError, SyntaxError, StopIteration):
        return None
    flat: dict[str, Any] = {}
    for name, group in groups.items():
        if isinstance(group, dict):
            # The name of a model, a task or a criterion is in its group: 'task': {'_name': 'translation', ...}.
            choice = group.get("_name")
            if isinstance(choice, str):
                flat.setdefault("arch" if name == "model" else name, choice)
            own = {key: each for key, each in group.items() if not isinstance(each, dict) and key != "_name"}
            # With hydra, an option may be a reference to that of another group: '${dataset.max_tokens}'.
            flat |= {key: each for key, each in own.items() if key not in flat and not str(each).startswith("${")}
    return flat


TOKEN = re.compile(
    r"""\s*([a-zA-Z]{0,2}(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")|[\[\](){},:=]|[^\s\[\](){},:='"]+)""", flags=re.DOTALL
)
CLOSING = {"{": "}", "[": "]", "(": ")"}
CONSTANTS = {"None": None, "True": True, "False": False}
DEEPEST = 20  # maximum nesting, more than a configuration has


def tokenized(text: str) -> Iterator[str]:
    place = 0
    while place < len(text):
        found = TOKEN.match(text, place)
        if not found:
            raise ValueError(f"no value at {place}")
        yield found[1]
        place = found.end()


def value(token: str, tokens: Iterator[str], depth: int = 0) -> Any:
    """Parse the repr of plain data that begins with `token` and continues in `tokens`.

    Returns:
        None, a bool, int, float or str, a list (also for a set), a tuple, or a dict with str keys. Any other text is
        returned as it is, such as an enum member, whose repr has no quotes: previous-epoch.

    Raises:
        ValueError, SyntaxError, StopIteration: the text is malformed.
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
    """Parse the rest of a dict, a Namespace, a list, a tuple or a set, after its opening bracket."""
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
    """Write fairseq's log, which begins with its settings, to a file while the context is active.

    Warnings are suppressed, as hydra warns of the way in which fairseq uses it.

    Raises:
        OSError: the file cannot be written, as on a full disk; logging alone would only print a traceback.
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
