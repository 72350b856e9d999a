"""The loss in chunks, with gradients computed in the forward pass: no [tokens x vocabulary] tensor outlives a chunk.

Each chunk of tokens takes four matrix products and one row step:

    z_s = h_s W_s^T      z_t = h_t W_t^T      dz = row_step(z_s, z_t)      dh_s = dz W_s      dW_s += dz^T h_s

The gradients are kept, in fp32 if they are sums over chunks, until the backward pass multiplies them by its incoming
gradient (which includes fp16's loss scale). Pads never reach a product. Validation computes no gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hgkd_fairseq.gates import GateWeights, TokenStatistics
from hgkd_fairseq.loss import gate_first, rows
from hgkd_fairseq.loss.options import NOTHING, Decide, Head, Known, Options, TokenResults
from hgkd_fairseq.loss.products import add_product, product, scaled

RowStep = Callable[..., tuple[TokenResults, Tensor | None]]  # with the signature of rows.row_step
# Function that returns each teacher's logits for the rows of a chunk with the given indices, or for all rows if None.
# Each call overwrites the logits of the one before.
TeacherLogits = Callable[[Tensor | None], list[Tensor]]

# Tokens per chunk, by device type. CPU: measured on 2 cores at hidden 512, vocabulary 10k and 32k; with fewer tokens
# the products are slower, more tokens only take more memory. On other devices, as many tokens as fit CHUNK_BYTES.
CHUNK_TOKENS = {"cpu": 256}

# Bytes of one head's logits per chunk on a GPU, and the smallest and largest number of tokens. Measured on an H200 in
# bf16, gate token, 8192 tokens, hidden 512, vocabulary 37000: ms per pass, ms per pass if the host has queued it in
# advance, and peak memory in MiB:
#
#     tokens a chunk    1024    2048    3072    4096    8192
#     alone             6.17    3.44    3.24    3.24    3.15
#     queued                    2.95    2.85    2.76    2.65
#     memory             228     376     523     673    1253
CHUNK_BYTES = 320 * 2**20
FEWEST_TOKENS, MOST_TOKENS = 1024, 8192

# |dz| is at most of the order of the gate's weight and often near 1e-8, which is 0 in fp16, and the forward pass does
# not know the optimizer's loss scale. fp16 gradients at the logits carry this factor until the backward pass divides it
# out.
FP16_SCALE = 1024.0


def chunk_tokens(device: torch.device, dtype: torch.dtype, vocabulary: int) -> int:
    """Return the number of tokens per chunk for hidden states of this device and dtype."""
    tokens = CHUNK_TOKENS.get(device.type)
    if tokens is None:
        fitting = CHUNK_BYTES // (vocabulary * dtype.itemsize)
        return min(max(fitting // FEWEST_TOKENS * FEWEST_TOKENS, FEWEST_TOKENS), MOST_TOKENS)
    # Twice as many logits of 2 bytes take the same memory.
    return tokens * 2 if device.type == "cpu" and dtype.itemsize == 2 else tokens


def chunk_bounds(tokens: int, lengths: Sequence[int] | None, chunk_tokens: int) -> list[tuple[int, int]]:
    """Return (start, end) of each chunk of `tokens` rows, end exclusive; with sentence `lengths`, of whole sentences.

    A chunk has at most `chunk_tokens` rows, unless a single sentence is longer: it is then a chunk of its own.
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


def project(features: Tensor, head: Head, out: Tensor | None = None) -> Tensor:
    """Return the logits (C, V) of hidden states (C, D), in their dtype; without a weight, `features` are the logits.

    The logits are written to `out` (C, V) if it is given and the head has a weight.
    """
    if head.weight is None:
        return features
    if head.bias is None:
        return torch.mm(features, head.weight.t(), out=out)
    return torch.addmm(head.bias, features, head.weight.t(), out=out)


class Rows(NamedTuple):
    """A head and the indices of the rows of its hidden states that are used, in order: all but the pads."""

    head: Head  # hidden (R, D)
    kept: Tensor  # (N,) int64

    def features(self, start: int, end: int, places: Tensor | None = None) -> Tensor:
        """Return a copy of the hidden states of rows `start` to `end` (exclusive) of the N rows, (end - start, D).

        With `places` (G,), return only those of the G rows with these indices among them, (G, D).
        """
        kept = self.kept[start:end]
        return self.head.hidden.index_select(0, kept if places is None else kept[places])

    def logits(self, features: Tensor, buffer: Tensor) -> Tensor:
        """Return the logits (C, V) of hidden states (C, D), written to the first C rows of `buffer`."""
        return project(features, self.head, buffer[: features.size(0)])


def row_stride(vocabulary: int, itemsize: int) -> int:
    """Return the stride of the rows of logits on a GPU, in elements of `itemsize` bytes: a multiple of 16 bytes.

    A thread can then load 16 bytes at a time for any vocabulary. At a vocabulary of 256,206 in bf16, rows read 4 bytes
    at a time took 0.94 to 1.68 ms per chunk of 1,024 tokens on an H200. Matrix products of that size take three times
    the time that their flops require, with this stride too.
    """
    vector = 16 // itemsize
    return -(-vocabulary // vector) * vector


def logits_buffer(head: Head, tokens: int) -> Tensor:
    """Return an uninitialised buffer (tokens, V) for logits, in the dtype and on the device of the hidden states."""
    hidden, vocabulary = head.hidden, head.vocabulary
    if hidden.device.type != "cuda":
        return hidden.new_empty(tokens, vocabulary)
    return hidden.new_empty(tokens, row_stride(vocabulary, hidden.element_size()))[:, :vocabulary]


class Chunks:
    """Iterable over the chunks of a batch.

    It yields ((start, end), the student's hidden states (C, D), its logits (C, V), a `TeacherLogits`). All chunks share
    one buffer per head: logits must be used before the next chunk is requested.
    """

    def __init__(self, student: Rows, teachers: Sequence[Rows], bounds: Sequence[tuple[int, int]]):
        self.student, self.teachers, self.bounds = student, teachers, bounds

    def __iter__(self) -> Iterator[tuple[tuple[int, int], Tensor, Tensor, TeacherLogits]]:
        longest = max((end - start for start, end in self.bounds), default=0)
        # One allocation for all chunks, because each allocation of this size may be a request to the operating system.
        buffers = [logits_buffer(rows.head, longest) for rows in (self.student, *self.teachers)]
        for start, end in self.bounds:
            features = self.student.features(start, end)
            logits = self.student.logits(features, buffers[0])
            yield (start, end), features, logits, functools.partial(self.of_teachers, start, end, buffers[1:])

    def of_teachers(self, start: int, end: int, buffers: list[Tensor], places: Tensor | None = None) -> list[Tensor]:
        return [
            rows.logits(rows.features(start, end, places), buffer)
            for rows, buffer in zip(self.teachers, buffers, strict=True)
        ]


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, kept, teachers, bounds, step, options, needs):
        """Compute the summed loss, the per-token results and the gradients.

        Args:
            hidden, weight, bias: the student's head, (R, D), (V, D), and (V,) or None.
            kept: (N,) indices of the rows that are used.
            teachers: sequence of `Rows`.
            bounds: (start, end) of each chunk.
            step: function `step(start, end, logits, TeacherLogits, gradient_scale)` that computes the rows of a chunk.
            options: options of the loss.
            needs: for each of the first three, whether it needs a gradient.
        """
        needs_hidden, needs_weight, needs_bias = needs
        accumulate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        scale = FP16_SCALE if hidden.dtype == torch.float16 else 1.0

        # fp16 gradients carry `scale`, so that their products may exceed fp16's largest number, 65504: fp32 is used.
        row_dtype = accumulate if hidden.dtype == torch.float16 else hidden.dtype
        d_hidden = torch.zeros(hidden.shape, dtype=row_dtype, device=hidden.device) if needs_hidden else None
        d_weight = torch.empty(weight.shape, dtype=accumulate, device=weight.device) if needs_weight else None
        d_bias = torch.zeros(weight.size(0), dtype=accumulate, device=weight.device) if needs_bias else None
        parts: list[TokenResults] = []
        chunks = Chunks(Rows(Head(hidden, weight, bias), kept), teachers, bounds)
        for (start, end), features, logits, others in chunks:
            results, dz = step(start, end, logits, others, scale if any(needs) else None)
            parts.append(results)
            if dz is None:
                continue
            if needs_bias:
                d_bias += dz.sum(0, dtype=accumulate)
            if needs_hidden:
                d_hidden.index_copy_(0, kept[start:end], product(dz, weight, row_dtype))
            if needs_weight:
                add_product(d_weight, dz.t(), features, first=start == 0)
        if needs_weight and not bounds:
            d_weight.zero_()

        ctx.gradients = (d_hidden, d_weight, d_bias)
        ctx.scale = scale
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        results = concatenate(parts, hidden.new_zeros(0, dtype=accumulate), options)
        results = results._replace(loss=results.loss.sum())
        ctx.mark_non_differentiable(*[value for value in results[1:] if value is not None])
        ctx.set_materialize_grads(False)  # allocate no zeros for the other outputs
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_loss, *_):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a chunked loss can be used once; compute the loss again")
        gradients, ctx.gradients = ctx.gradients, None
        factor = d_loss / ctx.scale
        return *[scaled(*pair, factor) for pair in zip(gradients, ctx.dtypes, strict=True)], *[None] * 6


def concatenate(parts: list[TokenResults], empty: Tensor, options: Options) -> TokenResults:
    """Concatenate the results of the chunks; `empty` (0,) gives device and dtype if there is no chunk."""
    if not parts:
        no = torch.zeros_like(empty, dtype=torch.bool)
        top = (empty, no) if options.needs_argmax else (None, None)
        uniform = empty if options.gate.uniform else None
        return TokenResults(empty, empty, empty, empty, uniform, empty, empty, no, *top)
    if len(parts) == 1:
        return parts[0]
    joined = [None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)]
    return TokenResults(*joined)  # type: ignore[arg-type]  # the same columns are None in all chunks


def token_results(
    student: Head,  # hidden (R, D)
    teachers: Sequence[Head],  # hidden (R, Dt) each
    kept: Tensor,  # (N,) int64, indices of the rows that are not pads
    target: Tensor,  # (N,) int64
    sentence: Callable[[], Tensor],  # returns (N,) int64, index of each token's sentence
    lengths: Sequence[int],  # numbers of tokens of the sentences, host integers, in order, summing to N
    options: Options,
    instance: Tensor | None = None,  # (N,) int64, index of the token's sentence in the training set
    row_step: RowStep = rows.row_step,
    known: Known = NOTHING,
    gated_step: gate_first.GatedStep | None = gate_first.gated_step,
) -> TokenResults:
    """Return the results of N tokens, as :func:`hgkd_fairseq.loss.eager.token_results`, but with `loss` their sum.

    `row_step` computes the rows of a chunk. `gated_step`, if not None, replaces it if the gate can be evaluated before
    the teachers' logits (`Options.closes_first`) and `known` has the log-probabilities of the gold tokens.
    """
    inputs: tuple = (student.hidden, student.weight, student.bias)
    # Determined outside the Function: inside, needs_input_grad is True even under torch.no_grad().
    needs = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs)
    device = student.hidden.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        inputs = tuple(None if x is None else x.to(dtype) for x in inputs)
        teachers = [teacher.map(lambda tensor: tensor.to(dtype)) for teacher in teachers]
    with torch.no_grad():
        views = [Rows(teacher.map(Tensor.detach), kept) for teacher in teachers]
    tokens, vocabulary = target.numel(), student.vocabulary
    whole_sentences = lengths if options.gate.scope == "sentence" else None
    first = gated_step if known.gold is not None and known.sparse is None and options.closes_first else None
    if known.gold is not None and first is None:
        options = options.asked_outside
    size = chunk_tokens(device, inputs[0].dtype, vocabulary)
    if first is not None and device.type == "cpu" and inputs[0].dtype == torch.float32:
        size *= 2  # only some rows reach the teacher's product, which is slower per row the fewer there are
    bounds = chunk_bounds(tokens, whole_sentences, size)

    def weights(start: int, end: int, student_read: Tensor, teacher_read: Tensor, *asked: dict) -> GateWeights:
        if known.student is not None:
            student_read = known.student[start:end].to(student_read.dtype)
        some = sentence()[start:end]
        numbers = None if instance is None else instance[start:end]
        if known.gold is not None:
            teacher_read = known.gold[start:end].to(student_read.dtype)
        # The number of tokens stands in for that of sentences, which is at most as large.
        view = (some - some[:1], end - start, vocabulary, options.progress, numbers)
        more = known.asked(asked, student_read.dtype, slice(start, end))
        return options.gate.weights(TokenStatistics(student_read, teacher_read, *view, *more))

    def decide(start: int, end: int) -> Decide:
        if not options.gate.constant:
            return functools.partial(weights, start, end)
        unread = target.new_zeros(end - start, dtype=rows.widen(student.hidden[:0]).dtype)
        return weights(start, end, unread, unread)

    with torch.autocast(device.type, enabled=False):
        if options.gate.scope == "batch" and tokens:
            # If all that the gate reads of the teacher is known, the teachers' logits are not computed.
            chunks = Chunks(Rows(Head(*inputs), kept), [] if known.suffices(options) else views, bounds)
            decided = _decide_whole_batch(chunks, target, weights, options, row_step)

            def decide(start: int, end: int) -> Decide:
                uniform = None if decided.uniform is None else decided.uniform[start:end]
                return GateWeights(decided.data[start:end], decided.teacher[start:end], uniform)

        def step(start: int, end: int, logits: Tensor, others: TeacherLogits, scale: float | None):
            arguments = (target[start:end], decide(start, end), options, scale)
            if first is not None:
                assert known.gold is not None
                return first(logits, others, *arguments, known.gold[start:end])
            if known.sparse is None:
                return row_step(logits, others(None), *arguments)
            return row_step(logits, [], *arguments, known.sparse.map(lambda tensor: tensor[start:end]))

        results = TokenResults(*_Chunked.apply(*inputs, kept, views, bounds, step, options, needs))
    return results if known.gold is None else results._replace(teacher_read=known.gold)


@torch.no_grad()
def _decide_whole_batch(chunks: Chunks, target: Tensor, weights, options: Options, row_step: RowStep) -> GateWeights:
    """Return the weights (N,) of a gate that needs all tokens, in a separate forward pass without gradients."""
    reads: list[tuple[Tensor, ...]] = []

    def read(student_read: Tensor, teacher_read: Tensor, *asked: dict[str, Tensor]) -> GateWeights:
        reads.append((student_read, teacher_read, *[value for each in asked for value in each.values()]))
        nothing = torch.zeros_like(student_read)
        return GateWeights(nothing, nothing, nothing if options.gate.uniform else None)

    if not chunks.teachers:
        options = options.without_teacher
    for (start, end), _, logits, others in chunks:
        row_step(logits, others(None), target[start:end], read, options, None)
    student_read, teacher_read, *values = [torch.cat(column) for column in zip(*reads, strict=True)]
    asked = [dict(zip(options.gate.asks, values, strict=True))] if values else []
    return weights(0, target.numel(), student_read, teacher_read, *asked)
