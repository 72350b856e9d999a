"""A command that gives the settings which a log begins with."""

import shlex
import sys
from pathlib import Path

import command_line as cl
import pytest
from fairseq import options

from hgkd_fairseq.evaluation import logs
from hgkd_fairseq.report import commands


def parse(program: str, arguments: list[str]) -> dict:
    """The settings that fairseq takes what is typed for."""
    return vars(options.parse_args_and_arch(commands.PARSERS[program](), arguments))


def reparsed(command: str) -> dict:
    """The settings that fairseq takes a command for; without --user-dir, which is imported already."""
    program, *arguments = shlex.split(command)
    if "--user-dir" in arguments:
        place = arguments.index("--user-dir")
        del arguments[place : place + 2]
    return parse(program, arguments)


def test_of_a_real_log(student: cl.Run, teacher: cl.Run, tmp_path):
    for run in (student, teacher):
        (tmp_path / "train.log").write_text(run.result.output)
        settings = logs.read(tmp_path / "train.log").settings
        command = commands.command("fairseq-train", settings)
        found = reparsed(command)
        assert len(found) > 150
        unequal = {name for name in found.keys() & settings.keys() if found[name] != settings[name]}
        assert unequal <= {"user_dir"}
        assert f" --save-dir {run.folder} " in command
        assert "--eval-bleu --eval-bleu-args '{\"beam\": 2}'" in command
        for default in ("--max-tokens-valid", "--clip-norm", "--warmup-init-lr", "--decoder-output-dim"):
            assert default not in command
    assert "--teacher-path" not in command


@pytest.mark.parametrize(
    "arguments",
    [
        ("fairseq-generate", "data", "--path", "a.pt:b.pt", "--beam", "3", "--max-len-a", "1.5", "--cpu", "--quiet"),
        ("fairseq-train", "data", "--arch", "transformer", "--lr", "0.1,0.2", "--update-freq", "4,2", "--lr-scheduler",
         "inverse_sqrt", "--warmup-updates", "7", "--source-lang", "de", "--task", "translation_with_teacher",
         "--criterion", "hard_gate_kd", "--gate", "always", "--kd-weight", "0.25", "--teacher-path", "a file.pt"),
        ("fairseq-train", "data", "--arch", "lightconv", "--encoder-layers", "2", "--encoder-kernel-size-list", "[3,7]",
         "--memory-efficient-fp16", "--patience=-1", "--save-dir=-runs", "--batch-size", "30"),
        ("fairseq-train", "data", "--arch", "transformer_iwslt_de_en", "--encoder-embed-dim", "20000"),
    ],
)  # fmt: skip
def test_there_and_back(arguments):
    program, *rest = arguments
    settings = parse(program, rest)
    command = commands.command(program, settings)
    assert reparsed(command) == settings
    assert "[" not in command  # lists as one types them
    assert "--max-sentences" not in command  # an older name of --batch-size


def test_unknown_parts():
    """An architecture of another plugin: there is no command to tell, and no failure."""
    assert commands.command("fairseq-train", {"data": "data", "arch": "not_of_fairseq", "task": "translation"}) is None


WRITES = "__import__('pathlib').Path('RAN').write_text('x')"  # would leave a file behind


@pytest.mark.parametrize(
    ("program", "settings", "expected"),
    [
        ("fairseq-train", {"data": "--user-dir=payload", "arch": "lstm"},
         "fairseq-train --arch lstm -- --user-dir=payload"),
        ("fairseq-train", {"data": "@payload", "arch": "lstm"}, "fairseq-train @payload --arch lstm"),
        ("fairseq-train", {"data": "x; touch RAN", "arch": "lstm", "user_dir": "$(touch RAN)"},
         "fairseq-train 'x; touch RAN' --arch lstm --user-dir '$(touch RAN)'"),
        ("fairseq-train", {"data": "x", "arch": "lstm", "save_dir": "--user-dir=payload"},
         "fairseq-train x --arch lstm --save-dir=--user-dir=payload"),
        ("fairseq-generate", {"data": "x", "path": "--user-dir=payload"},
         "fairseq-generate x --path=--user-dir=payload"),
        ("fairseq-generate", {"data": "x", "path": "y", "arch": "wav2vec2"}, "fairseq-generate x --path y"),
        ("fairseq-train", {"data": "x", "arch": "--user-dir=payload"}, None),
        ("fairseq-train", {"data": "x", "task": ["--user-dir=payload"]}, None),
        ("fairseq-train", {"data": "x", "arch": "lstm", "optimizer": "adam", "adam_betas": WRITES},
         f"fairseq-train x --arch lstm --optimizer adam --adam-betas {shlex.quote(WRITES)}"),
        ("fairseq-train", {"data": "x", "arch": "lightconv", "encoder_kernel_size_list": WRITES},
         f"fairseq-train x --arch lightconv --encoder-kernel-size-list {shlex.quote(WRITES)}"),
        ("fairseq-train", {"data": "x", "arch": "lightconv", "encoder_kernel_size_list": [3], "encoder_layers": 10**15},
         "fairseq-train x --arch lightconv --encoder-layers 1000000000000000 --encoder-kernel-size-list 3"),
        ("fairseq-train", {"data": None, "lr": "x", "seed": [1], "cpu": "y", "help": 1, "bpe": 0.5}, None),
    ],
)  # fmt: skip
def test_a_log_is_data(program, settings, expected, tmp_path, monkeypatch):
    """Nothing of a log is imported, evaluated or run, whatever its options make of it; it is quoted and printed."""
    monkeypatch.chdir(tmp_path)
    Path("payload").mkdir()
    Path("payload/__init__.py").write_text(WRITES)
    assert commands.command(program, settings) == expected
    assert not Path("RAN").exists()
    assert "payload" not in sys.modules
