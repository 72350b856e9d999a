"""Argument types and shared options of the `hgkd` commands: numbers in a range, and checked input and output files."""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
from collections.abc import Callable
from pathlib import Path

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError, printable

COMPUTED = ("bleu", "chrf", "ter")  # metrics that this package computes; files of scores need other names
TOKENIZERS = ("13a", "none", "intl", "zh", "char")  # supported tokenizers of sacreBLEU for BLEU, the default first


class Parser(argparse.ArgumentParser):
    """Argument parser with the option ``--debug``. argparse makes the parsers of subcommands from the same class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def number(low: float, high: float = 2**53, kind: type = int) -> Callable[[str], float]:
    """Return an argparse type for numbers.

    The returned function raises argparse.ArgumentTypeError for text that is not a number in the range.

    Args:
        low: smallest allowed value.
        high: largest allowed value.
        kind: int, for whole numbers only, or float.
    """

    def convert(text: str) -> float:
        what = "number" if kind is float else "whole number"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{printable(text[:40])} is no {what}") from None
        if not low <= value <= high:  # false for NaN
            limits = f"above {low - 1}" if (low, kind) == (1, int) and value < low else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{printable(text[:40])} is no {what} {limits}")
        return value

    return convert


def part(text: str) -> tuple[int, int]:
    """Convert the text "I/N", part I of N parts, to (I - 1, N). This is an argparse type.

    Raises:
        argparse.ArgumentTypeError: the text has another form, or I is not from 1 to N.
    """
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and len(text) < 16 and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"{printable(text[:40])} is no part I/N, with I from 1 to N")
    return int(first) - 1, int(count)


class Output(str):
    """Argparse type for the name of a file to write, which is checked before the command does any work.

    Raises:
        argparse.ArgumentTypeError: the file cannot be written.
    """

    def __new__(cls, text: str):
        if text == "-":
            raise argparse.ArgumentTypeError("no name of an output; a file of that name is ./-")
        try:
            files.check_output(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return super().__new__(cls, text)


class NewOutput(Output):
    """Argparse type for the name of a file or folder to create.

    Raises:
        argparse.ArgumentTypeError: it exists already or cannot be written.
    """

    def __new__(cls, text: str):
        if os.path.lexists(text):
            raise argparse.ArgumentTypeError(f"{text} exists; name another file or folder, or remove it")
        return super().__new__(cls, text)


class Input(str):
    """Argparse type for the name of an input: a file, several files separated by ':', or a folder.

    Raises:
        argparse.ArgumentTypeError: the name is empty.
    """

    content: tuple[str, ...] = ("*",)  # patterns of the file names that are read in a folder

    def __new__(cls, text: str):
        if not text:
            raise argparse.ArgumentTypeError("the name is empty; give one")
        return super().__new__(cls, text)

    def is_read(self, output: str) -> bool:
        """Return whether writing the file `output` would overwrite this input, or a file that is read in it."""
        if not os.path.isfile(output):
            return False
        for part in {str(self), *self.split(":")}:
            if os.path.isdir(part):
                inside = Path(output).resolve().is_relative_to(Path(part).resolve())
                if inside and any(fnmatch.fnmatch(os.path.basename(output), pattern) for pattern in self.content):
                    return True
            elif files.same_file(output, part):
                return True
        return False


class Data(Input):
    content = ("*.bin", "*.idx", "dict.*.txt")


class RunFolder(Input):
    content = ("*.pt", "*.log", "*.txt", "*.json")


class SegmentScores(Input):
    """Argparse type for NAME=FILE: a file of sentence scores, and the name of the metric that computed them.

    Raises:
        argparse.ArgumentTypeError: the text has another form, or NAME is a metric that this package computes.
    """

    metric: str

    def __new__(cls, text: str):
        metric, equals, file = text.partition("=")
        if not (equals and file and re.fullmatch(r"\w[\w.+-]{0,39}", metric)):
            raise argparse.ArgumentTypeError(f"{printable(text[:60])} is no NAME=FILE, as COMET=comet.txt")
        if metric.lower() in COMPUTED:
            raise argparse.ArgumentTypeError(f"{metric} is computed here; give the scores in {file} another name")
        found = super().__new__(cls, file)
        found.metric = metric
        return found


def refuse_overwriting(args) -> None:
    """Check that no output of a command overwrites one of its inputs or another output.

    Args:
        args: parsed arguments; those of the types Input and Output are compared.

    Raises:
        UserError: an output is also an input or another output.
    """
    named = [one for value in vars(args).values() for one in (value if isinstance(value, list) else [value])]
    outputs = [one for one in named if isinstance(one, Output)]
    for place, output in enumerate(outputs):
        if any(isinstance(one, Input) and one.is_read(output) for one in named):
            raise UserError(f"{output} is read by this command and would be written over; name another file to write")
        special = os.path.exists(output) and not os.path.isfile(output)
        if not special and any(files.same_file(output, other) for other in outputs[:place]):
            raise UserError(f"{output} is named for two outputs; name another file for one of them")


def add(commands, name: str, run: Callable, about: str) -> Callable:
    """Add a subcommand and return the method that adds arguments to its parser.

    Args:
        commands: result of the parent parser's `add_subparsers`.
        name: name of the subcommand.
        run: function that runs it, given the parsed arguments; returns an exit status, or None for 0.
        about: description in the list of subcommands.
    """
    command = commands.add_parser(name, help=about, description=about)
    command.set_defaults(run=run)
    return command.add_argument


def add_data(option) -> None:
    option("data", type=Data, metavar="DATA", help="folder that fairseq-preprocess wrote")


def add_batches(option, subset: str) -> None:
    option("--gen-subset", default=subset, metavar="SPLIT", help=f"subset to use (default: {subset})")
    most = number(1, 2**31 - 1)
    option("--max-tokens", type=most, default=4000, metavar="N", help="tokens a batch (default: 4000)")
    add_running(option)


def add_running(option) -> None:
    """Add the options of a command that runs a model."""
    option("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    plugin = "plugin of the model's architecture, as fairseq-train's: its code is run"
    option("--user-dir", type=Input, metavar="DIR", help=plugin)


def add_search(option, beam: int | None = 5) -> None:
    """Add the options of the beam search. `beam` is the value of ``--beam`` if it is not given."""
    option("--beam", type=number(1, 1000), default=beam, metavar="N", help="width of the beam (default: 5)")
    option("--lenpen", type=number(-10, 10, float), default=1.0, metavar="P", help="length penalty (default: 1)")
    longest = "translations have at most A x + B pieces, x those of the longest source in the batch (default: 0)"
    option("--max-len-a", type=number(0, 1000, float), default=0.0, metavar="A", help=longest)
    option("--max-len-b", type=number(0, 10**6), default=200, metavar="B", help="see --max-len-a (default: 200)")


def add_tokenize(option) -> None:
    by = "by sacreBLEU, for BLEU; none where texts are tokens already (default: 13a)"
    option("--tokenize", choices=TOKENIZERS, default=TOKENIZERS[0], help=by)


def add_segment_scores(option, what: str) -> None:
    scores = f"scores of the sentences by another metric (COMET, MetricX), one a line in their order: {what}"
    option("--segment-scores", action="append", default=[], type=SegmentScores, metavar="NAME=FILE", help=scores)
