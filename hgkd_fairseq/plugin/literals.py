"""Evaluation of option strings as Python literals, in place of fairseq's calls of eval."""

from __future__ import annotations

import ast
import sys
from typing import Any

from hgkd_fairseq.errors import UserError

LONGEST = 10_000  # limit on the characters of an option, and on the items of a sum or repetition


def literal(text: str) -> Any:
    """Return the value of a Python literal, or of an expression that adds or repeats literal lists or tuples, such as
    fairseq's own ``[(512, 3)] * 20``. No code is executed.

    Raises:
        UserError: if the text is anything else or exceeds `LONGEST`.
        TypeError: if `text` is not a string.
    """
    if not isinstance(text, str):
        raise TypeError(f"a string is evaluated, not {type(text).__name__}")
    try:
        if len(text) > LONGEST:
            raise ValueError
        return value(ast.parse(text.strip(), mode="eval").body)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        shown = text if len(text) < 100 else f"{text[:97]}..."
        raise UserError(
            f"the option value {shown!r} is no Python literal, and fairseq would run it as code: give a number, a "
            "string, a list, a tuple or a dict"
        ) from None


def value(node: ast.expr) -> Any:
    if not isinstance(node, ast.BinOp):
        return ast.literal_eval(node)
    left, right = value(node.left), value(node.right)
    added = isinstance(node.op, ast.Add) and type(left) is type(right) and len(left) + len(right) <= LONGEST
    repeated = isinstance(node.op, ast.Mult) and type(right) is int and len(left) * right <= LONGEST
    if isinstance(left, list | tuple) and added:
        return left + right
    if isinstance(left, list | tuple) and repeated:
        return left * right
    raise ValueError


def replace_eval(packages: tuple[str, ...] = ("fairseq", "fairseq_cli")) -> None:
    """Replace ``eval`` by :func:`literal` in all modules of the given packages that have been imported so far."""
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        name = spec.name if name == "__main__" and spec is not None else name
        if name.partition(".")[0] in packages:
            vars(module)["eval"] = literal
