"""Tests of the loss on CPU and GPU: every implementation against fp64, in several dtypes, vocabularies and alignments.

Cases run on the CPU and, marked `cuda`, on a GPU; those of streams, graphs and memory run on a GPU alone. An error may
be at most about twice that of eager torch in the same dtype on the same device.
"""

import itertools
import warnings
from typing import NamedTuple

import pytest
import torch
from test_gated_distillation import PAD, Batch, error, make
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hgkd_fairseq import gates
from hgkd_fairseq.gates import GATES, Gate, hard, tools
from hgkd_fairseq.loss import DistillationOutput, chunked, gated_distillation
from hgkd_fairseq.loss.options import Options
from hgkd_fairseq.sentence_weights import gate as _instance  # noqa: F401  registers the gate instance

cuda = pytest.mark.cuda
IMPLEMENTATIONS = [
    *((device, name) for device, name in (("cpu", "chunked"), ("cpu", "native"))),
    *(pytest.param("cuda", name, marks=cuda) for name in ("chunked", "triton")),
]
everywhere = pytest.mark.parametrize(("device", "implementation"), IMPLEMENTATIONS)
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16)
LENGTHS = (13, 0, 30, 1, 22)  # 66 tokens, one sentence all pads


def moved(batch: Batch, device: str, dtype: torch.dtype | None = None) -> Batch:
    """Return a copy on `device` with its floating-point parts in `dtype` and the same `requires_grad`."""

    def move(x: Tensor) -> Tensor:
        kind = dtype if x.is_floating_point() else None
        return x.detach().to(device, kind, copy=True).requires_grad_(x.requires_grad)

    return Batch(*[tree_map_only(Tensor, move, part) for part in batch])


def run(batch: Batch, implementation: str, **options) -> DistillationOutput:
    return gated_distillation(
        batch.hidden, batch.weight, batch.teacher_hidden, batch.teacher_weight, batch.target, padding_idx=PAD,
        student_bias=batch.bias, teacher_bias=batch.teacher_bias, implementation=implementation, **options,
    )  # fmt: skip


def gradients(batch: Batch, out: DistillationOutput) -> list[Tensor]:
    return list(torch.autograd.grad(out.loss, batch.leaves()))


class Case(NamedTuple):
    vocabulary: int = 1000
    dtype: torch.dtype = FP32
    gate: str = "token"
    gate_on: str = "gold"
    tempered_gate: bool = True
    smoothing: float = 0.1
    bias: bool = True

    def options(self) -> dict:
        return {
            "gate": self.gate,
            "gate_on": self.gate_on,
            "tempered_gate": self.tempered_gate,
            "label_smoothing": self.smoothing,
            "top1": True,
        }

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in self._asdict().items() if v != self._field_defaults[k]]
        return " ".join(changed).replace("torch.", "") or "default"


OPTIONS = list(itertools.product(("token", "sentence"), ("gold", "argmax"), (True, False), (0.0, 0.1), (True, False)))
CASES = [
    *(Case(1000, dtype, *options) for options, dtype in zip(OPTIONS, itertools.cycle(DTYPES), strict=False)),
    *(Case(10, dtype, gate) for dtype in DTYPES for gate in ("token", "sentence", "none")),
]
LARGE = [
    *(
        Case(v, dtype, gate)
        for v in (10152, 32000, 37000, 256001)
        for dtype in DTYPES
        for gate in ("token", "sentence")
    ),
    *(Case(v, dtype) for v in (10153, 32006) for dtype in DTYPES),
    Case(32000, BF16, "none"),
    Case(32000, BF16, "token", "argmax", False, 0.0, False),
]


def fixed(bits: Tensor) -> Gate:
    """Return a gate whose decisions are `bits` (N,)."""
    return Gate("fixed", lambda s: tools.hard_weights(bits, s.student_logprob.dtype), scope="batch")


@everywhere
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_gradients_and_gates(case: Case, device: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    """Loss, its parts and all gradients agree with fp64 under the same decisions, and so do the decisions wherever
    rounding of the logits cannot change them."""
    monkeypatch.setitem(chunked.CHUNK_TOKENS, device, 40)
    compare(case, device, implementation)


@pytest.mark.parametrize(
    ("device", "implementation", "case"),
    [
        *(("cpu", "native", case) for case in (LARGE[0], Case(256001, BF16))),  # two: each takes seconds on a CPU
        *(pytest.param("cuda", "triton", case, marks=cuda) for case in LARGE),
    ],
    ids=str,
)
def test_large_vocabularies(device: str, implementation: str, case: Case):
    compare(case, device, implementation)


def compare(case: Case, device: str, implementation: str) -> None:
    shape = {"dimension": 16, "teacher_dimensions": (24,), "vocabulary": case.vocabulary, "bias": case.bias}
    drawn = make(LENGTHS, max(LENGTHS), **shape, dtype=case.dtype, width=3.0)
    batch, wide = moved(drawn, device), moved(drawn, device, torch.float64)
    kept = batch.target != PAD
    out = run(batch, implementation, **case.options())
    made = gradients(batch, out)
    bits = out.teacher_mask[kept]
    options = {**case.options(), "gate": "none" if case.gate == "none" else fixed(bits)}
    true = run(wide, "eager", **options)
    exact = gradients(wide, true)
    plain = run(batch, "eager", **options)
    theirs = gradients(batch, plain)

    assert [g.dtype for g in made] == [case.dtype] * len(made)
    unclear = case.gate_on == "argmax" and case.dtype != FP32  # rounding may choose another argmax
    names = ("loss", "nll", "kd") + (() if unclear else ("gap",))
    for name in names:
        mine, other = (error(getattr(x, name).detach(), getattr(true, name).detach(), 1.0) for x in (out, plain))
        assert mine <= 2 * other + 8 * torch.finfo(FP32).eps, f"{name}: {mine:.2e}, eager {other:.2e}"
    for name, mine, other, expected in zip(("hidden", "weight", "bias"), made, theirs, exact, strict=False):
        mine, other = error(mine, expected), error(other, expected)
        assert mine <= 2 * other + 2 * torch.finfo(case.dtype).eps, f"d {name}: {mine:.2e}, eager {other:.2e}"
    assert not out.teacher_mask[~kept].any()
    if case.gate != "none":
        wanted, certain = decisions(case, wide)
        assert certain.any() or case.dtype == BF16  # rounding can change every sentence's
        assert torch.equal(bits[certain], wanted[certain])


def decisions(case: Case, wide: Batch) -> tuple[Tensor, Tensor]:
    """Return the gate's decisions (N,) in fp64, and which of them rounding in the case's dtype cannot change (N,)."""
    kept = wide.target != PAD
    z = wide.hidden.detach()[kept] @ wide.weight.detach().t()
    t = wide.teacher_hidden[0][kept] @ wide.teacher_weight[0].t()
    if case.bias:
        z, t = z + wide.bias.detach(), t + wide.teacher_bias[0]
    read = z.argmax(1) if case.gate_on == "argmax" else wide.target[kept]
    logp, logq = z.log_softmax(1), (t / (1.5 if case.tempered_gate else 1.0)).log_softmax(1)
    margin = (logp - logq).gather(1, read[:, None]).squeeze(1)
    # Half a rounding step for each of two logits, at the largest one, and the rounding of products and sums.
    noise = 4 * torch.finfo(case.dtype).eps * torch.maximum(z.abs().amax(1), t.abs().amax(1))
    if case.gate_on == "argmax":
        top = z.topk(2, dim=1).values
        noise = torch.where(top[:, 0] - top[:, 1] < noise, torch.inf, noise)
    if case.gate == "sentence":
        sentence = kept.nonzero()[:, 0]

        def total(values: Tensor) -> Tensor:
            return values.new_zeros(len(kept)).index_add_(0, sentence, values)[sentence]

        margin, noise = total(margin), total(noise)
    return margin > 0, margin.abs() > noise


@everywhere
@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
@pytest.mark.parametrize(
    "lengths", [(0, 0), (), (1,), (0, 1, 0)], ids=["all pads", "empty", "one token", "one of three"]
)
def test_few_tokens(lengths: tuple, gate: str, device: str, implementation: str):
    batch = moved(make(lengths, 3), device)
    out = run(batch, implementation, gate=gate)
    made = gradients(batch, out)
    assert out.tokens == sum(lengths)
    assert all(g.isfinite().all() for g in made)
    expected = run(batch, "eager", gate=gate)
    for mine, other in zip([out.loss, *made], [expected.loss, *gradients(batch, expected)], strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)


@everywhere
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e4])
def test_pads_reach_nothing(poison: float, device: str, implementation: str):
    results = []
    for value in (0.0, poison):
        batch = moved(make((4, 0, 7, 1)), device)
        pads = batch.target == PAD
        with torch.no_grad():
            batch.hidden[pads] = value
            batch.teacher_hidden[0][pads] = value
        out = run(batch, implementation, gate="sentence", top1=True)
        made = gradients(batch, out)
        results.append([out.loss.detach(), out.kd, out.token_nll, out.confidence, *made])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@everywhere
@pytest.mark.parametrize("vocabulary", [252, 507, 1001])
def test_alignment_does_not_matter(vocabulary: int, device: str, implementation: str):
    """Features and weights that are slices of larger tensors, at unaligned addresses, give the same results."""
    batch = moved(make((7, 5, 6), 7, vocabulary=vocabulary, dimension=13, bias=False, dtype=BF16), device)

    def sliced(x: Tensor) -> Tensor:
        """Return the same numbers at an unaligned address and with the strides of a wider tensor."""
        room = torch.zeros(*x.shape[:-1], x.size(-1) + 3, dtype=x.dtype, device=x.device)
        room[..., 1:-2] = x.detach()
        return room[..., 1:-2]

    hostile = Batch(
        sliced(batch.hidden).requires_grad_(), sliced(batch.weight).requires_grad_(), None,
        [sliced(x) for x in batch.teacher_hidden], [sliced(x) for x in batch.teacher_weight], [None], batch.target,
    )  # fmt: skip
    results = []
    for one in (batch, hostile):
        out = run(one, implementation, gate="token", label_smoothing=0.1)
        results.append([out.loss.detach(), *gradients(one, out)])
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-2, atol=1e-3)


@everywhere
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_autocast(gate: str, dtype: torch.dtype, device: str, implementation: str):
    """With --amp (fp32 parameters, half-precision products) gradients are fp32 and about as accurate as eager's."""
    batch = moved(make(LENGTHS, max(LENGTHS)), device)
    wide = moved(batch, device, torch.float64)
    errors = {}
    for name in ("eager", implementation):
        with torch.autocast(device, dtype=dtype):
            out = run(batch, name, gate=gate)
        made = gradients(batch, out)
        assert [g.dtype for g in made] == [FP32] * 3
        true = run(wide, "eager", gate=fixed(out.teacher_mask[batch.target != PAD]))
        errors[name] = [error(g, e) for g, e in zip(made, gradients(wide, true), strict=True)]
    for eager, mine in zip(errors["eager"], errors[implementation], strict=True):
        assert mine <= 2 * eager + 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=cuda)])
def test_rows_beyond_32_bits(device: str):
    """With tokens x vocabulary above 2^31 the last rows have the results that they have alone.

    Only the case on a GPU is that large; the one on the CPU runs the same code on few rows.
    """
    from hgkd_fairseq.loss.native import rows as cpu_rows
    from hgkd_fairseq.loss.triton import rows as triton_rows

    step = {"cpu": cpu_rows.row_step, "cuda": triton_rows.row_step}[device]
    vocabulary, count = (256001, 8400) if device == "cuda" else (4001, 64)
    assert device == "cpu" or count * vocabulary > 2**31
    options = Options(GATES["token"], teacher_temperature=1.5, label_smoothing=0.1)

    def decide(student_read: Tensor, teacher_read: Tensor) -> gates.GateWeights:
        return hard.token(gates.TokenStatistics(student_read, teacher_read, student_read, 1))

    student, teacher = (torch.zeros(count, vocabulary, dtype=BF16, device=device) for _ in range(2))
    last = slice(count - 3, count)
    generator = torch.Generator(device).manual_seed(0)
    for logits in (student, teacher):
        logits[last].normal_(generator=generator)
    target = torch.arange(count, device=device)
    alone = step(student[last].clone(), [teacher[last].clone()], target[last], decide, options, 1.0)
    whole = step(student, [teacher], target, decide, options, 1.0)
    assert torch.equal(whole[0].loss[last], alone[0].loss)
    assert torch.equal(whole[1][last], alone[1])
    assert alone[1].abs().sum() > 0


# What only a GPU has


@cuda
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
@pytest.mark.parametrize("gate", sorted(set(GATES) - {"instance"}))
def test_the_host_never_waits(gate: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    """Forward and backward of every gate cause no synchronisation, by torch's detector."""
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cuda", 32)
    batch, made = moved(make(LENGTHS, max(LENGTHS), dtype=BF16), "cuda"), gates.get_gate(gate)
    if made.learned:
        made.weights.cuda()  # as training moves the criterion's parameters
    for waiting in ("warm", "error"):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error" if waiting == "error" else "default")
        try:
            out = run(batch, implementation, gate=made, lengths=LENGTHS, top1=True)
            out.loss.backward()
            if isinstance(made.weights, gates.Observer):
                made.weights.observe(out, lambda values: values)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert batch.hidden.grad.isfinite().all()


@cuda
def test_the_detector_of_synchronisations_detects():
    batch = moved(make(LENGTHS, max(LENGTHS)), "cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            run(batch, "triton")  # without `lengths` tokens are counted on the device
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_two_streams(gate: str):
    """Two losses at the same time on two streams give the results that each gives alone."""
    batches = [moved(make(LENGTHS, max(LENGTHS), vocabulary=10152, seed=seed, dtype=BF16), "cuda") for seed in (1, 2)]

    def loss(batch: Batch) -> list[Tensor]:
        out = run(batch, "triton", gate=gate, lengths=LENGTHS)
        return [out.loss.detach(), *gradients(batch, out)]

    alone = [loss(batch) for batch in batches]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in batches]
    for _ in range(5):
        found = []
        for stream, batch in zip(streams, batches, strict=True):
            with torch.cuda.stream(stream):
                found.append(loss(batch))
        torch.cuda.synchronize()
        for mine, expected in zip(found, alone, strict=True):
            for a, b in zip(mine, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@cuda
@pytest.mark.parametrize("gate", ["none", "token", "sentence"])
def test_cuda_graph(gate: str):
    """Forward and backward, captured once in a CUDA graph for given lengths, give the right results for other data."""
    first, second = (moved(make(LENGTHS, max(LENGTHS), seed=seed, dtype=BF16), "cuda") for seed in (1, 2))

    def step(batch: Batch) -> list[Tensor]:
        out = run(batch, "triton", gate=gate, lengths=LENGTHS)
        return [out.loss.detach(), *gradients(batch, out)]

    expected = step(second)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(first)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(first)
    with torch.no_grad():
        for mine, other in zip(flat(first), flat(second), strict=True):
            mine.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    for mine, other in zip(captured, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


def flat(batch: Batch) -> list[Tensor]:
    return [*batch.leaves(), *batch.teacher_hidden, *batch.teacher_weight, *batch.teacher_bias, batch.target]


@cuda
@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_memory(gate: str):
    """The peak memory of 8,192 tokens and 32,000 types in bf16 is little more than the logits of a chunk and d weight
    in fp32, and at most a fifth of eager's."""
    batch = moved(make((64,) * 128, 64, vocabulary=32000, dimension=64, dtype=BF16, bias=False), "cuda")
    peaks = {}
    for implementation in ("eager", "triton"):
        run(batch, implementation, gate=gate, lengths=(64,) * 128).loss.backward()  # one-time allocations
        batch.hidden.grad = batch.weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(batch, implementation, gate=gate, lengths=(64,) * 128).loss.backward()
        peaks[implementation] = torch.cuda.max_memory_allocated() - before
    logits = chunked.chunk_tokens(torch.device("cuda"), BF16, 32000) * 32000 * 2
    assert peaks["triton"] < 2 * logits + 3 * 32000 * 64 * 4 + 2**25
    assert peaks["triton"] < peaks["eager"] / 5


@cuda
def test_auto_is_triton(monkeypatch: pytest.MonkeyPatch):
    """On a GPU `auto` uses the Triton kernels, which pass their self-check, without a warning."""
    from hgkd_fairseq.loss.triton import rows as triton_rows

    assert triton_rows.usable("cuda") is None
    calls = []
    real = triton_rows.row_step
    monkeypatch.setattr(triton_rows, "row_step", lambda *a: calls.append(1) or real(*a))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(moved(make(), "cuda"), "auto")
    assert calls
