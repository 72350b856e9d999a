"""Matrix products of half-precision operands with results in fp32, which half precision would round or overflow."""

from __future__ import annotations

import torch
from torch import Tensor

# Rows of a gradient that are added or converted at a time if this needs a temporary copy of them.
PART_ROWS = 2048

# Whether torch has products of half-precision operands with an fp32 result or sum on CUDA (from 2.8 on).
OUT_DTYPE = "dtype_out" in torch.ops.aten.mm.overloads() and "dtype_out" in torch.ops.aten.addmm.overloads()


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a @ b in `dtype`: the operands' dtype, or fp32 for half-precision operands."""
    return a @ b if a.dtype == dtype else wide_product(a, b)


def add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to `total` in place, or overwrite `total` by it if it is the `first` term of the sum.

    `total` is fp32 (fp64 for fp64 operands). On the CPU, a product of bf16 operands is rounded to bf16 and then added.
    """
    if total.dtype == a.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
    elif a.dtype == torch.bfloat16 and a.device.type == "cpu":
        # bf16 has fp32's range, and on the CPU only a product with a bf16 result runs on the matrix units. Parts that
        # stay in the cache are 2.6 times as fast as one product of the full size, at a vocabulary of 32k and 256 rows.
        for part, rows in zip(total.split(PART_ROWS), a.split(PART_ROWS), strict=True):
            part.copy_(rows @ b) if first else part.add_(rows @ b)
    elif a.device.type == "cuda" and OUT_DTYPE:
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:  # one pass over the sum; a product and an addition would take three
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.copy_(wide_product(a, b)) if first else total.add_(wide_product(a, b))


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b of half-precision operands in fp32."""
    if a.device.type == "cuda" and OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def scaled(gradient: Tensor | None, dtype: torch.dtype | None, factor: Tensor) -> Tensor | None:
    """Return `gradient` times the 0-d `factor` in `dtype`, computed in place if the gradient already has that dtype.

    Returns None for a gradient of None.
    """
    if gradient is None:
        return None
    if gradient.dtype == dtype == factor.dtype:
        return gradient.mul_(factor)
    out = gradient if gradient.dtype == dtype else torch.empty_like(gradient, dtype=dtype)
    # The product is in the factor's precision, because torch would round the factor to the dtype of a bf16 gradient. On
    # the CPU it is computed in parts that stay in the cache, on a GPU in one launch.
    rows = PART_ROWS if gradient.device.type == "cpu" else max(gradient.size(0), 1)
    for part, made in zip(gradient.split(rows), out.split(rows), strict=True):
        torch.mul(part.to(factor.dtype), factor, out=made)
    return out
