"""A command that gives the settings which a log begins with."""

import shlex

import command_line as cl
import pytest

from hgkd_fairseq.report import commands, logs


def reparsed(command: str) -> dict:
    """The settings that fairseq takes a command for; without --user-dir, which is imported already."""
    program, *arguments = shlex.split(command)
    if "--user-dir" in arguments:
        place = arguments.index("--user-dir")
        del arguments[place : place + 2]
    return commands.parse(program, arguments)[1]


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
    ],
)  # fmt: skip
def test_there_and_back(arguments):
    program, *rest = arguments
    _, settings = commands.parse(program, rest)
    command = commands.command(program, settings)
    assert reparsed(command) == settings
    assert "[" not in command  # lists as one types them


def test_unknown_parts():
    """An architecture of another plugin: there is no command to tell, and no failure."""
    assert commands.command("fairseq-train", {"data": "data", "arch": "not_of_fairseq", "task": "translation"}) is None
