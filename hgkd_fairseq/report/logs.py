"""fairseq's own logs, of fairseq-train and fairseq-generate: the settings that they begin with, and the numbers that
come after, in --log-format simple and json (tqdm writes simple where it is no terminal)."""

from __future__ import annotations

import ast
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hgkd_fairseq import files

# "2026-01-31 12:00:00 | INFO | valid | epoch ..."; fairseq-generate writes "INFO:fairseq_cli.generate:..."
MESSAGE = re.compile(r"(?:\| INFO \| |^INFO:)(\S+?)(?: \| |:)(.*)")
CURVES = ("nll_loss", "bleu", "ece")  # of validation


@dataclass
class Log:
    """What a log tells."""

    settings: dict[str, Any] = field(default_factory=dict)  # of the last start, by the options' names
    # By name, ([updates], [value]): those of CURVES and, of training, teacher_share.
    curves: dict[str, tuple[list[int], list[float]]] = field(default_factory=dict)


def read(file: Path) -> Log:
    """Read the log of a run and, where it was stopped and resumed, of its resumptions, one after the other.

    Raises:
        UserError: the file is no text.
    """
    log = Log()
    for line in files.read_lines(file, "keep there what fairseq printed"):
        found = MESSAGE.search(line)
        if found:
            take(log, found[1], found[2].rstrip())
    if "train_inner" in log.curves:  # many points an epoch; without it one an epoch
        log.curves["teacher_share"] = log.curves["train_inner"]
    return Log(log.settings, {name: log.curves[name] for name in (*CURVES, "teacher_share") if name in log.curves})


def take(log: Log, tag: str, message: str) -> None:
    """Add what one message tells; `tag` is a logger's name, or that of a subset."""
    if message.startswith("{'_name'"):
        log.settings = settings(message) or log.settings
        return
    if tag in ("train", "train_inner"):
        numbers = parse(tag, message)
        add(log, "teacher_share" if tag == "train" else tag, numbers.get("num_updates"), numbers.get("teacher_share"))
    elif tag == str(log.settings.get("valid_subset", "valid")).split(",")[0]:  # the one that chooses the checkpoint
        numbers = parse(tag, message)
        # fairseq's cross_entropy, whose loss it is, logs no nll_loss of its own.
        numbers.setdefault("nll_loss", numbers.get("loss"))
        for name in CURVES:
            add(log, name, numbers.get("num_updates"), numbers.get(name))


def add(log: Log, name: str, updates: float | None, value: float | None) -> None:
    if updates is None or value is None:
        return
    x, y = log.curves.setdefault(name, ([], []))
    while x and x[-1] >= updates:  # a run that was killed is resumed from an earlier update
        x.pop()
        y.pop()
    x.append(int(updates))
    y.append(value)


def parse(tag: str, message: str) -> dict[str, Any]:
    """The numbers of a line of fairseq's progress bar, by name.

    simple: "epoch 001 | valid on 'valid' subset | loss 5.3 | num_updates 9", "epoch 001:  50 / 295 loss=9.2, ppl=600";
    json: {"epoch": 1, "valid_loss": "5.3", "valid_num_updates": "9"}.
    """
    if message.startswith("{"):
        try:
            pairs = json.loads(message).items()
        except ValueError:  # cut short when the run was killed
            return {}
    else:
        pairs = re.findall(r"(\w+)[ =]([^\s=]+?)(?=,? |$)", message)
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

    def literal(node: ast.AST) -> Any:
        if isinstance(node, ast.Dict):
            return {literal(key): literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
        if isinstance(node, ast.Call):  # Namespace(a=1)
            return {word.arg: literal(word.value) for word in node.keywords}
        try:
            return ast.literal_eval(node)
        except ValueError:  # a choice, which is written without quotes: previous-epoch
            return ast.get_source_segment(message, node)

    try:
        groups = literal(ast.parse(message, mode="eval").body)
    except (SyntaxError, ValueError):
        return None
    flat: dict[str, Any] = {}
    for name, group in groups.items():
        if isinstance(group, dict):
            # The group of a task or a criterion is named by its choice: 'criterion': {'_name': 'hard_gate_kd', ...}.
            if group.get("_name"):
                flat.setdefault(name, group["_name"])
            flat |= {key: value for key, value in group.items() if key not in flat and key != "_name"}
    return flat
