"""The registered gates as text and as Markdown tables."""

from __future__ import annotations

import re

from hgkd_fairseq.errors import flag
from hgkd_fairseq.gates.registry import GATES, all_parameters


def defaults(gate: str) -> list[str]:
    """Return the options of a gate, each followed by its default unless that is None."""
    options = {flag(name): it.default for name, it in GATES[gate].parameters.items()}
    return [option if default is None else f"{option} {default}" for option, default in options.items()]


def text() -> str:
    lines = []
    for name, gate in GATES.items():
        lines += [name, f"    {gate.equation}", f"    {gate.source}"]
        lines += [f"    {', '.join(defaults(name))}"] if gate.parameters else []
    return "\n".join(lines)


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def markdown() -> str:
    """Return two Markdown tables: the gates, and their options."""
    gates = [
        [f"`{name}`", gate.equation, re.sub(r"arXiv:([\d.]*\d)", r"[\g<0>](https://arxiv.org/abs/\1)", gate.source)]
        for name, gate in GATES.items()
    ]
    taken: dict[tuple[str, str], list[str]] = {}  # (option, meaning) -> gates with defaults
    for name, takers in all_parameters().items():
        for gate, it in takers:
            default = "" if it.default is None else f" {it.default}"
            meaning = ": ".join([it.option.help, *([" or ".join(it.option.choices)] if it.option.choices else [])])
            taken.setdefault((f"`{flag(name)}`", meaning), []).append(f"`{gate}`{default}")
    options = [[option, meaning, ", ".join(takers)] for (option, meaning), takers in taken.items()]
    return "\n\n".join(
        [table(["`--gate`", "weights", "source"], gates), table(["option", "meaning", "gates, defaults"], options)]
    )
