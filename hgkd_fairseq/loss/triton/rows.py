"""The row step on the Triton kernels, for CUDA devices: `row_step` computes what `rows.row_step` computes.

Triton is an optional dependency and imported only on use. `usable` returns whether the kernels run on a device.

    gate "token" or "none"   one launch: statistics, gate and gradient
    any other gate           two launches, with the gate's torch function between them; the host never waits
"""

from __future__ import annotations

import functools
import itertools
import math
import os
from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq.gates import GATES, Gate, hard
from hgkd_fairseq.loss import chunked, rows
from hgkd_fairseq.loss.options import FUSED_GATE_ON, Decide, Options, Sparse, TokenResults, decided

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WARP = 32


class Variant(NamedTuple):
    """A kernel with the values for which it is compiled."""

    kernel: str  # the name of a function in kernels.py
    constants: dict[str, int | bool]  # the constexpr arguments
    num_warps: int


def launch_shape(stride: int, itemsize: int, vocabulary: int) -> tuple[int, int, int]:
    """Return (num_warps, VECTOR, DEPTH): a thread loads VECTOR consecutive logits DEPTH times from each tile.

    `stride` is the greatest common divisor of both heads' row strides, in logits of `itemsize` bytes. A load has at
    most 16 bytes, and fewer if the stride is not a multiple of 16 bytes. DEPTH keeps a thread at 64 registers, so that
    two programs of 16 warps fit on a multiprocessor (scripts/benchmarks/kernel_resources.py prints the registers).
    Measured on an H200, ms per chunk, gate token:

        V, tokens, dtype        4 warps  8 warps  16 warps  32 warps        (DEPTH 2)
        37000, 3072, bf16        0.322    0.294     0.271     0.354
        32000, 4096, bf16        0.360    0.449     0.323
        10152, 4096, bf16        0.116    0.097     0.149     0.189
        37000, 2048, fp32        0.555    0.538     0.491     0.340

    A single tile for the whole row (10152 logits, 16 warps, DEPTH 4) took 0.220: the row is read twice all the same.
    """
    vector = math.gcd(stride, 16 // itemsize)
    num_warps = 4 if vocabulary < 4096 else 8 if vocabulary < 16384 else 16 if itemsize < 4 else 32
    return num_warps, vector, 2


def fused(gate: Gate) -> bool:
    """Return whether the kernel implements the gate, which is recognised by its function: gates may have any name."""
    return (gate.weights, gate.needs_teacher) in ((hard.token, True), (hard.none, False))


def variants(
    vocabulary: int, strides: tuple[int, int], itemsize: int, options: Options, make_gradient: bool
) -> list[Variant]:
    """Return the kernels that a step launches, in order.

    `strides` are those of the rows of the student's and the teacher's logits, in logits; `itemsize` is in bytes.
    """
    num_warps, vector, depth = launch_shape(math.gcd(*strides), itemsize, vocabulary)
    student, teacher_stride = strides
    shape = {
        "STUDENT_STRIDE": student,
        "TEACHER_STRIDE": teacher_stride,
        "V": vocabulary,
        "WIDTH": -(-vocabulary // vector) * vector,
        "THREADS": num_warps * WARP,
        "VECTOR": vector,
        "DEPTH": depth,
    }
    has_teacher = options.gate.needs_teacher
    teacher = {"HAS_TEACHER": has_teacher}
    statistics = {
        "SMOOTHING": options.label_smoothing > 0,
        "ARGMAX": options.needs_argmax,
        "GATE_ON_ARGMAX": options.needs_argmax and options.gate_on == "argmax",
        # At temperature 1 both are the same.
        "GATE_TEMPERATURE": not options.reads_untempered,
    }
    entropy = {"TEACHER_ENTROPY": bool(options.gate.asks)}
    gradient = {"MAKE_GRADIENT": make_gradient}
    if fused(options.gate):
        return [Variant("token_rows", shape | teacher | statistics | gradient, num_warps)]
    return [
        Variant("statistics_rows", shape | teacher | statistics | entropy, num_warps),
        Variant("gradient_rows", shape | teacher | gradient, num_warps),
    ]


def all_variants(vocabulary: int, itemsize: int) -> list[Variant]:
    """Return all kernels that `row_step` can launch at a vocabulary, for rows with the stride of `chunked` on a GPU."""
    found = []
    strides = (chunked.row_stride(vocabulary, itemsize),) * 2
    split = (
        Gate("user", lambda s: hard.none(s), needs_teacher=needs, asks=asks)
        for needs, asks in ((True, ()), (False, ()), (True, ("teacher_entropy",)))
    )
    for gate, gate_on, tempered_gate, smoothing, top1, make_gradient in itertools.product(
        (GATES["token"], GATES["none"], *split), FUSED_GATE_ON, (True, False), (0.0, 0.1), (True, False), (True, False)
    ):
        options = Options(gate, gate_on, 1.5, tempered_gate, smoothing, top1=top1)
        if not options.fused:
            continue
        found += [v for v in variants(vocabulary, strides, itemsize, options, make_gradient) if v not in found]
    return found


def _launch(variant: Variant, logits: Tensor, *arguments: Tensor | float) -> None:
    """Launch a kernel with one program per row."""
    from hgkd_fairseq.loss.triton import kernels as triton_kernels

    kernel = getattr(triton_kernels, variant.kernel)
    kernel[(logits.size(0),)](logits, *arguments, **variant.constants, num_warps=variant.num_warps)


def _rows(logits: Tensor) -> Tensor:
    """Return the logits with contiguous, non-overlapping rows at any stride: as they are if possible, else a copy."""
    plain = logits.stride(1) == 1 and logits.stride(0) >= logits.size(1)
    return logits if plain else logits.contiguous()


def _known(student_logits: Tensor, teachers: int, options: Options) -> bool:
    """Return whether the kernels support logits, number of teachers and options.

    They support one divergence, the gold token or the argmax as the token that the gate reads, and an ensemble only if
    gate and loss read it at the same temperature; not fp64, a confidence penalty or a uniform term.
    """
    return not (
        student_logits.dtype not in DTYPES
        or not student_logits.size(0)
        or (teachers > 1 and options.reads_untempered)
        or options.confidence_penalty
        or options.gate.uniform
        or not options.fused
    )


def row_step(
    student_logits: Tensor,  # (C, V), overwritten by the gradient if its rows are contiguous
    teacher_logits: list[Tensor],  # (C, V) each, not tempered
    target: Tensor,  # (C,) int64
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    sparse: Sparse | None = None,
) -> tuple[TokenResults, Tensor | None]:
    """Compute what :func:`hgkd_fairseq.loss.rows.row_step` computes, and write the gradient over `student_logits`.

    Inputs and options that the kernels do not support are left to that function. If the stride of the rows exceeds V,
    the memory between them may be overwritten. A target outside the vocabulary gives nan.
    """
    tokens, vocabulary = student_logits.shape
    if sparse is not None or not _known(student_logits, len(teacher_logits), options):
        return rows.row_step(student_logits, teacher_logits, target, decide, options, gradient_scale, sparse)
    student = _rows(student_logits)
    temperature = options.teacher_temperature
    if not options.gate.needs_teacher:
        teacher = student  # never read
    elif len(teacher_logits) == 1:
        teacher = _rows(teacher_logits[0])
    else:
        # The log of the mean probability, which are logits at temperature 1.
        teacher = rows.mean_probability(teacher_logits, 1 / temperature, torch.float32).log_()
        temperature = 1.0

    results = torch.empty((7, tokens), dtype=torch.float32, device=student.device)
    flags = torch.empty((2, tokens), dtype=torch.int8, device=student.device)
    strides = (student.stride(0), teacher.stride(0))
    steps = variants(vocabulary, strides, student.element_size(), options, gradient_scale is not None)
    scale = 0.0 if gradient_scale is None else float(gradient_scale)
    outputs = (student, teacher, target.contiguous(), results, flags)
    scalars = (tokens, 1 / temperature, *options.gold_weight(vocabulary))
    teacher_share = None
    with torch.cuda.device_of(student):
        if len(steps) == 1:
            _launch(steps[0], *outputs, *scalars, scale)
        else:
            statistics = torch.empty((5, tokens), dtype=torch.float32, device=student.device)
            _launch(steps[0], *outputs, statistics, *scalars)
            asked = rows.asked(options, statistics[4])
            weights = decided(decide, results[4], results[5], *asked)  # STUDENT_READ, TEACHER_READ
            if weights.uniform is not None:
                raise ValueError(rows.UNDECLARED.format(options.gate.name))
            data, teacher_weight = (weight.to(torch.float32).contiguous() for weight in weights[:2])
            teacher_share = weights.teacher_share
            _launch(steps[1], *outputs, statistics, data, teacher_weight, *scalars, scale)

    loss, nll, data_term, kl, student_read, teacher_read, confidence = results.unbind()
    teacher_mask, correct = flags.view(torch.bool).unbind()
    top = (confidence, correct) if options.needs_argmax else (None, None)
    found = TokenResults(loss, nll, data_term, kl, None, student_read, teacher_read, teacher_mask, *top)
    found = found._replace(teacher_share=teacher_share)
    return found, None if gradient_scale is None else student


def usable(device: torch.device | str) -> str | None:
    """Return None if `row_step` runs on `device` and agrees with plain torch, otherwise an error message."""
    device = torch.device(device)
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    return _usable(device)


@functools.cache
def _usable(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}); `pip install triton` brings it."
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f'Triton compiles for CUDA devices, and this is "{device}".'
    try:
        worst = rows.difference_of(row_step, device)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[-1]
        return f"Triton's kernels failed on {device}: {type(error).__name__}: {reason}"
    if not worst < rows.LARGEST_DIFFERENCE:
        return f"Triton's kernels differ from plain torch by {worst:.2g} on {device}."
    return None
