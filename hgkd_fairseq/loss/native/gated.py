"""The row step that evaluates the gate first, on the C kernel; the counterpart of `gate_first.gated_step`.

Rows are closed if the gate gives them no teacher weight, otherwise open. Calls of the kernel, in training:

    gate "token"   one for all rows: statistics, gate, and the gradient of closed rows; one for the open rows
    other gates    one for the statistics of all rows; after the gate, one for the closed rows and one for the open rows
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hgkd_fairseq.gates import hard
from hgkd_fairseq.loss import gate_first, rows
from hgkd_fairseq.loss.native.rows import (
    GRADIENT_ALONE,
    STATISTICS,
    STATISTICS_ALONE,
    TOKEN_CLOSED,
    WEIGHTED,
    Chunk,
    dtypes,
)
from hgkd_fairseq.loss.options import FUSED, Decide, Options, TokenResults, decided

TEACHER_READ = STATISTICS.index("teacher_read")


def gated_step(
    student_logits: Tensor,  # (C, V), overwritten by the gradient if contiguous
    teacher_logits: Callable[[Tensor | None], list[Tensor]],  # (G, V) each, of the rows with these indices (None: all)
    target: Tensor,  # (C,) int64
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    teacher_read: Tensor,  # (C,) nats, what the gate reads of the teacher
) -> tuple[TokenResults, Tensor | None]:
    if student_logits.dtype not in dtypes() or options.divergence != FUSED:
        return gate_first.gated_step(
            student_logits, teacher_logits, target, decide, options, gradient_scale, teacher_read
        )
    chunk = Chunk(student_logits, target, options, gradient_scale)
    token = options.gate.weights is hard.token and gradient_scale is not None
    if token:
        chunk.found[TEACHER_READ] = teacher_read
    chunk.run(TOKEN_CLOSED if token else STATISTICS_ALONE)
    weights = decided(decide, chunk.statistics().student_read, teacher_read)
    opened = (weights.teacher != 0).nonzero().squeeze(1)
    if gradient_scale is not None and not token and len(opened) < len(target):
        chunk.run(GRADIENT_ALONE, weights, places=(weights.teacher == 0).nonzero().squeeze(1))
    if len(opened):
        others, temperature = teacher_logits(opened), options.teacher_temperature
        if len(others) > 1:  # log of the mean probability, which are logits at temperature 1
            others = [rows.mean_probability(others, 1 / temperature, torch.float32).log_()]
            temperature = 1.0
        mode = STATISTICS_ALONE if gradient_scale is None else WEIGHTED
        chunk.run(mode, weights, others[0], temperature, opened)
    return rows.row_results(chunk.statistics(), weights, student_logits.size(1), options), chunk.gradient()
