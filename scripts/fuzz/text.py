"""Fuzzing of training logs, outputs of fairseq-generate and dictionaries, which their readers must read or refuse with
a UserError.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from pathlib import Path

from checkpoints import bytes_changed

from hgkd_fairseq.calibration.scores import Settings
from hgkd_fairseq.evaluation import generated, inference, logs
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.report import commands, figures, page, runs, tables

NUMBERS = (
    *(
        "0",
        "1",
        "5.25",
        "-1",
        "1e-05",
        "nan",
        "inf",
        "-inf",
        "1e308",
        "-1e308",
        "1e-320",
        "1" * 400,
        "9" * 5000,
        "x",
        "",
    ),
    *("1_000", "0x10", "NaN", "Infinity", "None", "true", "[1]", '"1"', "1e999", "٣", "9223372036854775808"),
)
VALUES = (
    *NUMBERS, "'x'", '"x"', "'--user-dir=x'", "'@x'", "b'x'", "f'{1}'", "'\\ud800'", "'\\x1b[2J'", "{}", "[]", "()",
    "{1}", "[[1], {2: 3}]", "{'a': [1]}", "previous-epoch", "...", "1+2j", "Namespace()", "Namespace(a=Namespace(b=1))",
    "__import__('os')", "lambda: 0", "'" + "a" * 20000 + "'", "[" * 300 + "]" * 300, "-" * 5000 + "1", "'${x}'",
    "'\\N{x}'",
)  # fmt: skip
NAMES = (
    *("data", "arch", "task", "criterion", "optimizer", "lr_scheduler", "lr", "max_tokens", "max_tokens_valid", "seed"),
    *(
        "save_dir",
        "user_dir",
        "path",
        "encoder_layers",
        "decoder_embed_dim",
        "adam_betas",
        "cpu",
        "fp16",
        "update_freq",
    ),
    *("valid_subset", "gate", "teacher_path", "help", "_name", "", "x"),
)
CHOICES = ("'lstm'", "'transformer_iwslt_de_en'", "'lightconv'", "'translation'", "'hard_gate_kd'", "'adam'", "'none'")
STARTS = (
    "2026-01-31 12:00:00 | INFO | {} | ",
    "[2026-01-31 12:00:00,000][{}][INFO] - ",
    "INFO:{}:",
    "{}",
    "\r10%|# {} ",
)
TAGS = (
    "fairseq_cli.train",
    "fairseq_cli.generate",
    "train",
    "train_inner",
    "valid",
    "valid1",
    "",
    "x" * 5000,
    "\x1b[2J",
)
STATISTICS = ("loss", "nll_loss", "ece", "bleu", "teacher_share", "num_updates", "num_updates", "epoch", "x")
PIECES = (
    *("▁a", "▁b", "c", "▁d▁e", "▁", "e▁", "x@@", "y", "<unk>", "<<unk>>", "</s>", "\u2028", "\r", "\x85", "\x0c", "@@"),
    "a" * 3000,
)


def statistics(rng: random.Random) -> str:
    """Return a random line of a progress bar."""
    pairs = [(rng.choice(STATISTICS), rng.choice(NUMBERS)) for _ in range(rng.randrange(8))]
    kind = rng.randrange(4)
    if kind == 0:
        tag = rng.choice(("valid_", "train_", ""))
        return (
            "{" + ", ".join(f'"{tag}{name}": {value or "null"}' for name, value in pairs) + rng.choice(("}", "", "]}"))
        )
    if kind == 1:
        return "epoch 001:      5 / 9 " + ", ".join(f"{name}={value}" for name, value in pairs)
    if kind == 2:
        return "epoch 001 | valid on 'valid' subset | " + " | ".join(f"{name} {value}" for name, value in pairs)
    return rng.choice(("a", "a ", "a=", "{", "[", "'", "| INFO | ", "1")) * rng.choice((1, 100, 20000))


def settings(rng: random.Random) -> str:
    """Return the repr of a random configuration, or something similar to one."""
    pairs = [
        (rng.choice(NAMES), rng.choice(CHOICES if rng.random() < 0.4 else VALUES)) for _ in range(rng.randrange(9))
    ]
    if rng.random() < 0.5:
        model = "Namespace(" + ", ".join(f"{name}={value}" for name, value in pairs) + ")"
        return "{'_name': None, 'model': " + model + rng.choice(("}", "", "}}", ", 'task': {'_name': 'translation'}}"))
    groups = ", ".join(
        f"{name!r}: {{'_name': {choice}, {', '.join(f'{key!r}: {value}' for key, value in pairs)}}}"
        for name, choice in zip(rng.sample(("model", "task", "criterion", "common"), 2), CHOICES, strict=False)
    )
    return "{'_name': None, " + groups + rng.choice(("}", "", ")"))


def train_logs(rng: random.Random) -> Iterator[bytes]:
    while True:
        lines = []
        for _ in range(rng.choice((1, 2, 5, 12))):
            start = rng.choice(STARTS).format(rng.choice(TAGS))
            lines.append(start + (settings(rng) if rng.random() < 0.3 else statistics(rng)))
        content = "\n".join(lines).encode("utf-8", "surrogatepass")
        yield bytes_changed(content, rng) if rng.random() < 0.3 else content


TURN = itertools.count()


def read_train_log(path: str | Path) -> None:
    """Process a log as `hgkd report` does; render the page, which is slow, only for one log in 500."""
    log = logs.read(Path(path))
    run = runs.Run(Path("run"), "run", log=log, generation=log)
    for program in commands.PARSERS:
        commands.command(program, log.settings)
    for key in figures.CURVES:
        figures.points(run, key)
    if next(TURN) % 500 == 499:
        report = tables.measure([run])
        (report.markdown() + page.html(report)).encode()


def outputs(rng: random.Random) -> Iterator[bytes]:
    """Generate outputs of fairseq-generate endlessly."""
    while True:
        lines = []
        for index in range(rng.choice((1, 2, 4))):
            number = str(index) if rng.random() < 0.97 else rng.choice(NUMBERS)
            for _ in range(rng.choice((1, 1, 1, 2))):
                hypothesis = rng.choices(PIECES[:9], k=rng.randrange(6))
                scores = [rng.choice(("-0.5", "-1", "0")) for _ in range(len(hypothesis) + 1)]
                if rng.random() < 0.05:
                    hypothesis.append(rng.choice(PIECES))
                if rng.random() < 0.05:
                    scores[rng.randrange(len(scores))] = rng.choice(NUMBERS)
                text = " ".join(hypothesis)
                lines += [f"H-{number}\t-0.5\t{text}", f"D-{number}\t-0.5\t{text}", f"P-{number}\t{' '.join(scores)}"]
            lines += [f"S-{number}\tx", f"T-{number}\t{' '.join(rng.choices(PIECES[:9], k=rng.randrange(6)))}"]
        if rng.random() < 0.2:
            lines.pop(rng.randrange(len(lines)))
        if rng.random() < 0.2:
            lines.insert(rng.randrange(len(lines)), statistics(rng))
        content = "\n".join(lines).encode()
        yield bytes_changed(content, rng) if rng.random() < 0.3 else content


def read_output(path: str | Path) -> None:
    """Read and score an output of fairseq-generate as the commands do."""
    generated.read_texts(Path(path))
    inference.evaluate(str(path), settings=Settings(replicates=0)).to_json()


def dictionaries(rng: random.Random) -> Iterator[bytes]:
    while True:
        rows = [f"{rng.choice(PIECES)}{rng.randrange(99)} {rng.choice(NUMBERS[:3])}" for _ in range(rng.randrange(9))]
        for _ in range(rng.choice((0, 0, 1, 2))):
            odd = (f"x {rng.choice(NUMBERS)}", "", " ", "<s> 1", "a 1 #fairseq:overwrite", "a", "a 1\ra 1", "\x00 1")
            rows.insert(rng.randrange(len(rows) + 1), rng.choice(odd))
        content = "\n".join(rows).encode()
        yield bytes_changed(content, rng) if rng.random() < 0.4 else content


def read_dictionary(path: str | Path) -> None:
    binarised.dictionary(str(path))


READERS = ((train_logs, read_train_log), (outputs, read_output), (dictionaries, read_dictionary))
