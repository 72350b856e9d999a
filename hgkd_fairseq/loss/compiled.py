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
from hgkd_fairseq.loss.options import Options, TokenResults

logger = logging.getLogger(__name__)

# Under this many rows torch would compile a special case (sizes 0 and 1) or the overhead would eat the gain.
LEAST_ROWS = 8

_broken = False  # a compiler that failed once is not tried again in this process
_seen: set[tuple] = set()


def _rows(student_logits, teacher_logits, target, sentence, options, gradient_scale):
    return rows.row_step(
        student_logits, teacher_logits, target, sentence, student_logits.size(0), options, gradient_scale
    )


_compiled = torch.compile(_rows)


def row_step(
    student_logits: Tensor,
    teacher_logits: list[Tensor],
    target: Tensor,
    sentence: Tensor,
    sentence_count: int,
    options: Options,
    gradient_scale: float | None,
) -> tuple[TokenResults, Tensor | None]:
    """As :func:`hgkd_fairseq.loss.rows.row_step`."""
    global _broken
    plain = (student_logits, teacher_logits, target, sentence, sentence_count, options, gradient_scale)
    if _broken or student_logits.size(0) < LEAST_ROWS:
        return rows.row_step(*plain)
    for tensor in (student_logits, *teacher_logits, target, sentence):
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    variant = (options, gradient_scale, student_logits.dtype, student_logits.size(1), len(teacher_logits))
    start = time.perf_counter()
    try:
        # Kept apart from torch's limit of recompilations, which counts variants of all runs in the process.
        with torch._dynamo.config.patch(recompile_limit=64):
            results = _compiled(student_logits, teacher_logits, target, sentence, options, gradient_scale)
    except (torch._dynamo.exc.TorchDynamoException, torch._inductor.exc.InductorError, RuntimeError, OSError) as error:
        _broken = True
        logger.warning("the loss runs without a compiled inner loop, slower: %s", str(error).strip().splitlines()[0])
        return rows.row_step(*plain)
    if variant not in _seen:
        _seen.add(variant)
        logger.info("compiled the loss's inner loop in %.1f s", time.perf_counter() - start)
    return results
