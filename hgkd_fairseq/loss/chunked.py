"""The loss in chunks, gradients made in the forward pass: nothing of size [tokens x vocabulary] outlives a chunk.

For each chunk of tokens, FOUR products and one row step:

    z_s = h_s W_s^T      z_t = h_t W_t^T      dz = row_step(z_s, z_t)      dh_s = dz W_s      dW_s += dz^T h_s

The gradients wait, in fp32 where they are sums over chunks, for the factor that the backward pass brings (fp16's loss
scale, update_freq): it multiplies them. Pads never reach a product. Validation makes no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hgkd_fairseq.gates import GateWeights, TokenStatistics
from hgkd_fairseq.loss import rows
from hgkd_fairseq.loss.options import Decide, Head, Options, TokenResults

RowStep = Callable[..., tuple[TokenResults, Tensor | None]]  # with the signature of rows.row_step

# Tokens a chunk, by device type. CPU: measured on 2 cores at hidden 512, vocabulary 10k and 32k: 64 loses 40 %, 256 to
# 1024 are level.
CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}

# |dz| is at most the gate's weight and often near 1e-8, where fp16 flushes to zero before the optimizer's loss scale
# is known: fp16 gradients at the logits carry this factor until the backward pass divides it out.
FP16_SCALE = 1024.0


# Whether this torch has products of half-precision operands with an fp32 result, on CUDA (from 2.8 on).
MM_OUT_DTYPE = "out_dtype" in (torch.mm.__doc__ or "")


def chunk_tokens(device: torch.device, vocabulary: int) -> int:
    """Tokens a chunk for a device and a vocabulary."""
    return CHUNK_TOKENS.get(device.type, CHUNK_TOKENS["cpu"])


def chunk_bounds(tokens: int, lengths: Sequence[int] | None, chunk_tokens: int) -> list[tuple[int, int]]:
    """[start, end) of each chunk over `tokens` rows; with sentence `lengths`, chunks of whole sentences.

    A sentence longer than `chunk_tokens` is a chunk of its own.
    """
    if lengths is None:
        return [(start, min(start + chunk_tokens, tokens)) for start in range(0, tokens, chunk_tokens)]
    bounds, start, end = [], 0, 0
    for length in lengths:
        if end > start and end + length - start > chunk_tokens:
            bounds.append((start, end))
            start = end
        end += length
    if end > start:
        bounds.append((start, end))
    return bounds


def project(head: Head, start: int, end: int) -> Tensor:
    """(end - start, V) logits of some rows, in the inputs' dtype."""
    rows = head.hidden[start:end]
    if head.weight is None:
        return rows
    if head.bias is None:
        return rows @ head.weight.t()
    return torch.addmm(head.bias, rows, head.weight.t())


def product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b; an fp32 `out` keeps what a half-precision product would round or overflow."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(wide_product(a, b))


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, with `total` in fp32 (fp64 for fp64 inputs)."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.dtype == torch.bfloat16 and a.device.type == "cpu":
        total += a @ b  # bf16 has fp32's range, and on the CPU only this form runs on the matrix units
    else:
        total += wide_product(a, b)


def wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of half-precision operands with an fp32 result."""
    if a.device.type == "cuda" and MM_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, teachers, target, bounds, decide, options, needs, row_step):
        """`hidden` (N, D), `weight` (V, D), `bias` (V,) or None; `needs`: which of the three wants a gradient.

        `bounds`: [start, end) of each chunk; `decide(start, end)` gives the chunk's `options.Decide`.
        """
        needs_hidden, needs_weight, needs_bias = needs
        student = Head(hidden, weight, bias)
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0

        # fp16 rows carry `scale`, with which their products may pass fp16's largest number, 65504: kept in fp32.
        row_dtype = accumulate if hidden.dtype == torch.float16 else hidden.dtype
        d_hidden = torch.empty(hidden.shape, dtype=row_dtype, device=hidden.device) if needs_hidden else None
        d_weight = torch.zeros(weight.shape, dtype=accumulate, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(weight.size(0), dtype=accumulate, device=weight.device) if needs_bias else None
        parts: list[TokenResults] = []
        for start, end in bounds:
            results, dz = row_step(
                project(student, start, end),
                [project(teacher, start, end) for teacher in teachers],
                target[start:end],
                decide(start, end),
                options,
                scale if any(needs) else None,
            )
            parts.append(results)
            if dz is None:
                continue
            if needs_bias:
                d_bias += dz.sum(0, dtype=accumulate)
            if needs_hidden:
                product_into(d_hidden[start:end], dz, weight)
            if needs_weight:
                add_product(d_weight, dz.t(), hidden[start:end])

        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.scale = scale
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        results = concatenate(parts, hidden.new_zeros(0, dtype=accumulate), options)
        results = results._replace(loss=results.loss.sum())
        ctx.mark_non_differentiable(*[value for value in results[1:] if value is not None])
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a chunked loss can be used once; compute the loss again")
        d_hidden, d_weight, d_bias = ctx.gradients
        ctx.gradients = None
        hidden_dtype, weight_dtype, bias_dtype = ctx.dtypes
        factor = d_loss / ctx.scale
        if d_hidden is not None:
            d_hidden = (d_hidden.to(factor.dtype) * factor).to(hidden_dtype)
        if d_weight is not None:
            d_weight = d_weight.mul_(factor).to(weight_dtype)
        if d_bias is not None:
            d_bias = d_bias.mul_(factor).to(bias_dtype)
        return d_hidden, d_weight, d_bias, *[None] * 7


def concatenate(parts: list[TokenResults], empty: Tensor, options: Options) -> TokenResults:
    """The chunks' results as one; `empty` (0,) gives device and dtype where there is no chunk."""
    if not parts:
        no = torch.zeros_like(empty, dtype=torch.bool)
        top = (empty, no) if options.needs_argmax else (None, None)
        return TokenResults(empty, empty, empty, empty, no, empty, *top)
    return TokenResults(*[None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)])


def token_results(
    student: Head,
    teachers: Sequence[Head],
    target: Tensor,
    sentence: Tensor,
    lengths: Sequence[int],  # of the sentences, host integers, in order, summing to N
    options: Options,
    instance: Tensor | None = None,  # (N,) int64, number of the token's sentence in the training set
    row_step: RowStep = rows.row_step,
) -> TokenResults:
    """As :func:`hgkd_fairseq.loss.eager.token_results`, but `loss` is the scalar sum. `row_step` does the rows."""
    inputs = (student.hidden, student.weight, student.bias)
    # Asked for outside the Function: inside, needs_input_grad stays True under torch.no_grad().
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    device = student.hidden.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        inputs = tuple(None if x is None else x.to(dtype) for x in inputs)
        teachers = [Head(*[None if x is None else x.to(dtype) for x in teacher]) for teacher in teachers]
    with torch.no_grad():
        teachers = [Head(*[None if x is None else x.detach() for x in teacher]) for teacher in teachers]
    tokens, vocabulary = target.numel(), student.vocabulary
    whole_sentences = lengths if options.gate.scope == "sentence" else None
    bounds = chunk_bounds(tokens, whole_sentences, chunk_tokens(device, vocabulary))

    def weights(start: int, end: int, student_read: Tensor, teacher_read: Tensor) -> GateWeights:
        some = sentence[start:end]
        # There are at most as many sentences as tokens.
        view = (some - some[:1], end - start, vocabulary, options.progress)
        if instance is not None:
            view = (*view, instance[start:end])
        return options.gate.weights(TokenStatistics(student_read, teacher_read, *view))

    def decide(start: int, end: int) -> Decide:
        return functools.partial(weights, start, end)

    with torch.autocast(device.type, enabled=False):
        if options.gate.scope == "batch" and tokens:
            decided = _decide_whole_batch(Head(*inputs), teachers, target, bounds, weights, options, row_step)

            def decide(start: int, end: int) -> Decide:
                return lambda *_: GateWeights(*[None if part is None else part[start:end] for part in decided])

        return TokenResults(*_Chunked.apply(*inputs, teachers, target, bounds, decide, options, needs, row_step))


@torch.no_grad()
def _decide_whole_batch(student, teachers, target, bounds, weights, options: Options, row_step: RowStep) -> GateWeights:
    """The weights of a gate that has to see all tokens: a pass of its own, the forward products without a gradient."""
    reads: list[tuple[Tensor, Tensor]] = []

    def read(student_read: Tensor, teacher_read: Tensor) -> GateWeights:
        reads.append((student_read, teacher_read))
        nothing = torch.zeros_like(student_read)
        return GateWeights(nothing, nothing, nothing if options.gate.uniform else None)

    for start, end in bounds:
        logits = project(student, start, end), [project(teacher, start, end) for teacher in teachers]
        row_step(*logits, target[start:end], read, options, None)
    return weights(0, target.numel(), *[torch.cat(column) for column in zip(*reads, strict=True)])
