"""Matrix products with half-precision operands that keep what such a product would round or overflow."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a gradient that are added or converted at a time, where that needs a copy of them.
PART_ROWS = 2048

# Whether this torch has products of half-precision operands with an fp32 result or sum, on CUDA (from 2.8 on).
OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads() and "dtype_out" in torch.ops.aten.addmm.overloads()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b; in fp32, where that is asked for, it keeps what a half-precision product would round or overflow."""
    return a @ b if a.dtype == dtype else wide_product(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or total = a @ b for the first of a sum; `total` is fp32 (fp64 for fp64 inputs)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.dtype == torch.bfloat16 and a.device.type == "cpu":
        # bf16 has fp32's range, and on the CPU only this form runs on the matrix units. In parts that stay in the
        # cache: 2.6 times as fast at a vocabulary of 32k and 256 rows as with one product of the whole size.
        for part, rows in zip(total.split(PART_ROWS), a.split(PART_ROWS), strict=True):
            part.copy_(rows @ b) if first else part.add_(rows @ b)
    elif a.device.type == "cuda" and OUT_DTYPE:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:  # the product adds to the sum as it writes: one pass over it where product and addition would be three
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.copy_(wide_product(a, b)) if first else total.add_(wide_product(a, b))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half-precision operands with an fp32 result."""
    if a.device.type == "cuda" and OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def scaled(gradient: Tensor | None, dtype: torch.dtype | None, factor: Tensor) -> Tensor | None:
    """`gradient` times a 0-d `factor`, in `dtype`; in its own memory where it has that dtype."""
    if gradient is None:
        return None
    if gradient.dtype == dtype == factor.dtype:
        return gradient.mul_(factor)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    # In the factor's precision, for a bf16 tensor would round the factor first; on the CPU in parts that stay in the
    # cache, on a GPU in one launch.
    rows = PART_ROWS if gradient.device.type == "cpu" else max(gradient.size(0), 1)
    for part, made in zip(gradient.split(rows), out.split(rows), strict=True):
        torch.mul(part.to(factor.dtype), factor, out=made)
    return out
