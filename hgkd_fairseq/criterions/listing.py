"""Text of the command ``hgkd options``: fairseq-train's --help has no options of a plugin."""

from __future__ import annotations

import argparse

from fairseq.dataclass.utils import gen_parser_from_dataclass

from hgkd_fairseq.criterions.hard_gate_kd import HardGateKDConfig
from hgkd_fairseq.teacher.config import TeacherOptions


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default is not None and action.default is not False
        return super()._get_help_string(action) if shown else action.help


def text() -> str:
    """Return the options of the tasks with a teacher and those of the criterion, with their help and defaults."""
    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, formatter_class=Formatter)
    for title, options in (("a task with a teacher", TeacherOptions), ("--criterion hard_gate_kd", HardGateKDConfig)):
        gen_parser_from_dataclass(parser.add_argument_group(title), options())
    return parser.format_help()
