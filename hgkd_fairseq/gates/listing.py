"""The registered gates as text and as a table in markdown."""

from __future__ import annotations

from hgkd_fairseq.gates.registry import GATES


def defaults(gate: str) -> list[str]:
    """The options of a gate with their defaults."""
    options = {"--" + name.replace("_", "-"): it.default for name, it in GATES[gate].parameters.items()}
    return [option if default is None else f"{option} {default}" for option, default in options.items()]


def text() -> str:
    lines = []
    for name, gate in GATES.items():
        lines += [name, f"    {gate.equation}", f"    {gate.source}"]
        lines += [f"    {', '.join(defaults(name))}"] if gate.parameters else []
    return "\n".join(lines)


def markdown() -> str:
    rows = ["| `--gate` | weights | options, defaults | source |", "|---|---|---|---|"]
    for name, gate in GATES.items():
        options = ", ".join(f"`{option}`" for option in defaults(name))
        cells = (f"`{name}`", gate.equation, options, gate.source)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
