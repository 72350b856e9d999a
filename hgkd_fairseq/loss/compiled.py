"""The row mathematics of one chunk, compiled: `row_step` is `rows.row_step` fused by torch.compile into a few loops.

Compiling takes some seconds for each combination of options, dtypes and vocabulary (5 to 17 s measured on 2 free CPU
cores) and is kept by torch on disk for the next process. The number of tokens may change without another compilation.
Where no compiler works, plain torch does the rows, and the log says so once.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from hgkd_fairseq.loss import rows
from hgkd_fairseq.loss.options import Decide, Options, TokenResults

logger = logging.getLogger(__name__)

# Under this many rows torch would compile a special case (sizes 0 and 1) or the overhead would eat the gain.
LEAST_ROWS = 8

_broken = False  # a compiler that failed once is not tried again in this process
_seen: set[tuple] = set()


def _statistics(student_logits, teacher_logits, target, inverse_temperature, options) -> rows.RowStatistics:
    return rows.row_statistics(student_logits, teacher_logits, target, inverse_temperature, options)[0]


def _gradient(student_logits, teacher_logits, target, inverse_temperature, statistics, weights, scale, options) -> None:
    """Writes the gradient over `student_logits`. p and q are made again: a pass over the logits costs less than a pass
    over memory for each of them."""
    z = rows.widen(student_logits)
    p = (z - statistics.student_max[:, None]).exp() / statistics.student_sum[:, None]
    q = None
    if len(teacher_logits) == 1:
        tempered = rows.widen(teacher_logits[0]).to(z.dtype) * inverse_temperature
        q = (tempered - statistics.teacher_max[:, None]).exp() / statistics.teacher_sum[:, None]
    elif teacher_logits:
        q = rows.mean_probability(teacher_logits, inverse_temperature, z.dtype)
    gradient, gold = rows.row_gradient(p, q, weights, statistics.entropy, scale, options)
    # A comparison with every column is cheaper here than to scatter: it needs no pass of its own.
    column = torch.arange(z.size(1), device=z.device)
    student_logits.copy_(torch.where(column == target[:, None], gradient + gold[:, None], gradient))


_compiled_statistics = torch.compile(_statistics)
_compiled_gradient = torch.compile(_gradient)


def any_number_of_rows(*tensors: Tensor | None) -> None:
    """Ask for code that is not made for the number of rows in hand."""
    for tensor in tensors:
        if tensor is not None:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)


def row_step(
    student_logits: Tensor,
    teacher_logits: list[Tensor],
    target: Tensor,
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
) -> tuple[TokenResults, Tensor | None]:
    """As :func:`hgkd_fairseq.loss.rows.row_step`, with the gradient written over `student_logits`.

    The gate itself is not compiled: its parameters may change without another compilation.
    """
    global _broken
    plain = (student_logits, teacher_logits, target, decide, options, gradient_scale)
    if _broken or student_logits.size(0) < LEAST_ROWS:
        return rows.row_step(*plain)
    # A tensor: a number would be compiled into the code, and a temperature may change from step to step.
    wide = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    inverse_temperature = torch.tensor(1 / options.teacher_temperature, dtype=wide, device=student_logits.device)
    any_number_of_rows(student_logits, *teacher_logits, target)
    variant = (options.gate.name, gradient_scale, student_logits.dtype, student_logits.size(1), len(teacher_logits))
    start = time.perf_counter()
    inputs = (student_logits, teacher_logits, target, inverse_temperature)
    try:
        # Kept apart from torch's limit of recompilations, which counts variants of all runs in the process.
        with torch._dynamo.config.patch(recompile_limit=64):
            statistics = _compiled_statistics(*inputs, options)
            weights = decide(statistics.student_read, statistics.teacher_read)
            results = rows.row_results(statistics, weights, student_logits.size(1), options)
            if gradient_scale is not None:
                any_number_of_rows(*statistics, *weights)
                _compiled_gradient(*inputs, statistics, weights, gradient_scale, options)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, RuntimeError, OSError) as error:
        _broken = True
        logger.warning("the loss runs without a compiled inner loop, slower: %s", str(error).strip().splitlines()[0])
        return rows.row_step(*plain)
    if variant not in _seen:
        _seen.add(variant)
        logger.info("compiled the loss's inner loop in %.1f s", time.perf_counter() - start)
    return results, None if gradient_scale is None else student_logits
