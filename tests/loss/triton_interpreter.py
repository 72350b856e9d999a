"""Patches of Triton's interpreter for the tests: correct conversion to bf16, errors for bf16 arithmetic, faster calls.

The interpreter keeps bf16 as raw 16-bit integers: arithmetic on it is silently wrong, and fp32 -> bf16 truncates where
a GPU rounds to the nearest, ties to even. Import this module only if TRITON_INTERPRET=1 was set before `import triton`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterBuilder, TensorHandle


def round_to_bf16(values: np.ndarray) -> np.ndarray:
    """Return the 16 bits (uint16) of the bf16 nearest to each value in fp32, ties to even; nan stays nan."""
    bits = values.astype(np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def _rounding(convert):
    """Wrap `convert(self, src, dst_type, ...)` so that fp32 -> bf16 rounds to the nearest."""

    def wrapped(self, src, dst_type, *rest):
        if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.bfloat16:
            return TensorHandle(round_to_bf16(src.data), tl.bfloat16)
        return convert(self, src, dst_type, *rest)

    return wrapped


def _refusing(operation):
    """Wrap `operation(self, *operands, op)` so that an operand of bf16 raises a TypeError."""

    def wrapped(self, *arguments):
        for operand in arguments[:-1]:
            if operand.dtype.scalar == tl.bfloat16:
                raise TypeError("arithmetic on bf16: convert to fp32 first")
        return operation(self, *arguments)

    return wrapped


@contextlib.contextmanager
def exact_bf16() -> Iterator[None]:
    """Round to bf16 as a GPU does, raise on bf16 arithmetic, and patch Triton's language once per launch, not call."""
    patched: set[str] = set()  # modules whose language is patched in this launch
    launch = GridExecutor.__call__

    def launch_once(self, *arguments, **named):
        patched.clear()
        return launch(self, *arguments, **named)

    def call(self, *arguments, **named):
        module = self.fn.__module__
        if module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*arguments, **named)

    builder = InterpreterBuilder
    with (
        mock.patch.object(builder, "cast_impl", _rounding(builder.cast_impl)),
        mock.patch.object(builder, "create_fp_to_fp", _rounding(builder.create_fp_to_fp)),
        mock.patch.object(builder, "binary_op", _refusing(builder.binary_op)),
        mock.patch.object(builder, "unary_op", _refusing(builder.unary_op)),
        mock.patch.object(GridExecutor, "__call__", launch_once),
        mock.patch.object(InterpretedFunction, "__call__", call),
    ):
        yield
