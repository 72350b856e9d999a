"""Tests of the loss: all CPU implementations against numbers derived by hand, against fp64, and for known faults."""

import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hgkd_fairseq import gates
from hgkd_fairseq.loss import DIVERGENCES, DistillationOutput, chunked, gated_distillation, products, rows
from hgkd_fairseq.loss.options import Options
from hgkd_fairseq.sentence_weights import gate as _instance  # noqa: F401  registers the gate instance

ROOT = Path(__file__).parents[2]
PAD = 1
IMPLEMENTATIONS = ("eager", "chunked", "native")
LN2, LN3 = 0.6931471805599453, 1.0986122886681098

both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


class Batch(NamedTuple):
    """Arguments of the loss; `hidden`, `weight` and `bias` are the student's and require gradients."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: list[Tensor]
    teacher_weight: list[Tensor]
    teacher_bias: list[Tensor | None]
    target: Tensor

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]


def make(
    lengths=(4, 0, 7, 1),  # tokens of each sentence; the rest of its row is padding
    length: int = 7,
    vocabulary: int = 123,
    dimension: int = 13,
    teacher_dimensions=(9,),
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    width: float = 2.0,  # standard deviation of the logits
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, deviation: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * deviation).to(dtype)

    rows = len(lengths)
    target = torch.randint(2, vocabulary, (rows, length), generator=generator)
    target[torch.arange(length)[None] >= torch.tensor(lengths)[:, None]] = PAD
    return Batch(
        normal(rows, length, dimension).requires_grad_(),
        normal(vocabulary, dimension, deviation=width * dimension**-0.5).requires_grad_(),
        normal(vocabulary).requires_grad_() if bias else None,
        [normal(rows, length, d) for d in teacher_dimensions],
        [normal(vocabulary, d, deviation=width * d**-0.5) for d in teacher_dimensions],
        [normal(vocabulary) if bias else None for _ in teacher_dimensions],
        target,
    )


def run(batch: Batch, implementation: str, **options) -> DistillationOutput:
    return gated_distillation(
        batch.hidden,
        batch.weight,
        batch.teacher_hidden,
        batch.teacher_weight,
        batch.target,
        padding_idx=PAD,
        student_bias=batch.bias,
        teacher_bias=batch.teacher_bias,
        implementation=implementation,
        **options,
    )


def gradients(loss: Tensor, batch: Batch) -> list[Tensor]:
    return list(torch.autograd.grad(loss, batch.leaves()))


# By hand


@both
def test_hand_example(implementation: str):
    # Three words; a sentence of two tokens and a pad. With an identity for weights the features are the logits.
    #   token 0: student p = (1/2, 1/4, 1/4), teacher's tempered q = (1/4, 1/2, 1/4), gold 0
    #   token 1: student p = (1/4, 1/4, 1/2), teacher's tempered q = (1/4, 1/4, 1/2), gold 2: p = q
    # The teacher's logits are 2 log q, which the temperature 2 halves.
    p = torch.tensor([[2.0, 1.0, 1.0], [1.0, 1.0, 2.0], [5.0, 6.0, 7.0]])
    q = torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 2.0], [7.0, 6.0, 5.0]])
    hidden = p.log()[None].requires_grad_()
    weight = torch.eye(3, requires_grad=True)
    out = gated_distillation(
        hidden,
        weight,
        2 * q.log()[None],
        torch.eye(3),
        torch.tensor([[0, 2, 9]]),
        padding_idx=9,
        teacher_temperature=2.0,
        top1=True,
        implementation=implementation,
    )
    # Token 0: 1/2 > 1/4, the teacher. KL(q || p) = 1/4 log 1/2 + 1/2 log 2 + 1/4 log 1 = 1/4 log 2.
    # Token 1: equal, the data. CE = -log 1/2 = log 2.
    assert out.teacher_mask.tolist() == [[True, False, False]]
    assert out.tokens_mask.tolist() == [[True, True, False]]
    assert (out.teacher_tokens.item(), out.tokens.item()) == (1, 2)
    assert out.loss.item() == pytest.approx(1.25 * LN2, abs=1e-6)
    assert out.nll.item() == pytest.approx(2 * LN2, abs=1e-6)
    assert out.kd.item() == pytest.approx(0.25 * LN2, abs=1e-6)
    assert out.gap.item() == pytest.approx(LN2, abs=1e-6)  # log 1/2 - log 1/4, and 0
    torch.testing.assert_close(out.confidence, torch.tensor([[0.5, 0.5, 0.0]]))
    assert out.correct.tolist() == [[True, True, False]]
    # d loss / d z = p - q = (1/4, -1/4, 0) and p - onehot = (1/4, 1/4, -1/2); at the pad nothing.
    out.loss.backward()
    dz = torch.tensor([[0.25, -0.25, 0.0], [0.25, 0.25, -0.5], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(hidden.grad[0], dz, atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.grad, dz.t() @ p.log(), atol=1e-6, rtol=0)


@both
@pytest.mark.parametrize(
    ("options", "mask", "gap"),
    [
        # p(gold) = 0.1 below q(gold) = 0.3; p(argmax, word 2) = 0.7 above q(word 2) = 0.5.
        ({"gate_on": "gold"}, False, -LN3),
        ({"gate_on": "argmax"}, True, 0.3364722),  # log 0.7 / 0.5
        # Untempered, q is proportional to the squares 0.04, 0.09, 0.25: q(gold) = 0.2368, q(word 2) = 0.6579.
        ({"gate_on": "gold", "tempered_gate": False}, False, -0.8622236),  # log 0.1 * 0.38 / 0.09
        ({"gate_on": "argmax", "tempered_gate": False}, True, 0.0620354),  # log 0.7 * 0.38 / 0.25
    ],
)
def test_what_the_gate_reads(implementation: str, options: dict, mask: bool, gap: float):
    p, q = torch.tensor([[[0.2, 0.1, 0.7]]]), torch.tensor([[[0.2, 0.3, 0.5]]])
    out = gated_distillation(
        p.log(),
        torch.eye(3),
        2 * q.log(),
        torch.eye(3),
        torch.tensor([[1]]),
        padding_idx=9,
        teacher_temperature=2.0,
        implementation=implementation,
        **options,
    )
    assert out.teacher_mask.item() is mask
    assert out.gap.item() == pytest.approx(gap, abs=1e-6)
    # The target of the KL is tempered whatever the gate reads: KL = 0.2 log 1 + 0.3 log 3 + 0.5 log 5/7.
    assert out.loss.item() == pytest.approx(0.1613475 if mask else 2.3025851, abs=1e-6)


@both
def test_ensemble_is_averaged_in_probability_space(implementation: str):
    # Two members, (9/10, 1/10) and (1/10, 9/10), average to (1/2, 1/2); their logits would average to the same, so a
    # third with (9/10, 1/10) makes the mean 19/30.
    members = [
        torch.tensor([[[9.0, 1.0]]]).log(),
        torch.tensor([[[1.0, 9.0]]]).log(),
        torch.tensor([[[9.0, 1.0]]]).log(),
    ]
    out = gated_distillation(
        torch.tensor([[[3.0, 1.0]]]).log(),  # p = (3/4, 1/4)
        torch.eye(2),
        members,
        [torch.eye(2)] * 3,
        torch.tensor([[0]]),
        padding_idx=9,
        teacher_temperature=1.0,
        implementation=implementation,
    )
    # 3/4 > 19/30: the teacher. KL = 19/30 log (19/30 / 3/4) + 11/30 log (11/30 / 1/4)
    assert out.teacher_mask.item() is True
    assert out.gap.item() == pytest.approx(0.1690763, abs=1e-6)
    assert out.loss.item() == pytest.approx(0.0333488, abs=1e-6)


# Against fp64


class Case(NamedTuple):
    batch: dict
    chunk: int


CASES = {
    "one sentence all pads, V 252": Case({"vocabulary": 252, "dimension": 13, "teacher_dimensions": (9,)}, 256),
    "ensemble, sentences longer than a chunk, V 507": Case(
        {"lengths": (9, 5, 8, 0, 1), "length": 9, "vocabulary": 507, "dimension": 24, "teacher_dimensions": (13, 31)}, 7
    ),
    "chunks of few tokens, V 123": Case({"lengths": (5, 3, 5), "length": 5, "dimension": 7}, 4),
}


class Truth(NamedTuple):
    values: list[Tensor]  # loss, nll, kd, gap
    gradients: list[Tensor]
    margin: Tensor  # (N,) what the gate compares with 0
    certain: Tensor  # (N,) bool, whether rounding in the inputs' dtype cannot change the decision


def truth(batch: Batch, mask: Tensor, gate: str, gate_on: str, tempered_gate: bool, smoothing: float) -> Truth:
    """Compute the equations in fp64, token by token, for given decisions `mask`; `margin` says what they should be."""
    tau = 1.5
    epsilon = torch.finfo(batch.hidden.dtype).eps
    leaves = [x.detach().double().requires_grad_() for x in batch.leaves()]
    hidden, weight, bias = (*leaves, None)[:3]

    def logits(h: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return h.double() @ w.double().t() + (0 if b is None else b.double())

    rows = [(b, t) for b, t in itertools.product(*map(range, batch.target.shape)) if batch.target[b, t] != PAD]
    loss = nll = kd = gap = torch.zeros((), dtype=torch.float64)
    margins: dict[int, list] = {}
    for b, t in rows:
        gold = int(batch.target[b, t])
        z = logits(hidden[b, t], weight, bias)
        logp = z - z.logsumexp(0)
        members = [
            logits(h[b, t], w, c)
            for h, w, c in zip(batch.teacher_hidden, batch.teacher_weight, batch.teacher_bias, strict=True)
        ]
        q = sum((m / tau).softmax(0) for m in members) / len(members)
        q_gate = q if tempered_gate else sum(m.softmax(0) for m in members) / len(members)
        read = int(z.argmax()) if gate_on == "argmax" else gold
        difference = float((logp[read] - q_gate[read].log()).detach())
        top = z.detach().topk(2).values
        # Half a rounding step for each of two logits, at the largest one; twice that because of the sums.
        noise = 2 * epsilon * max(float(x.detach().abs().max()) for x in (z, *members))
        unclear_argmax = gate_on == "argmax" and float(top[0] - top[1]) < noise
        margins.setdefault(b, []).append((difference, noise, unclear_argmax))

        v = len(z)
        data = -(1 - smoothing) * logp[gold]
        data = data - smoothing / (v - 1) * (logp.sum() - logp[gold])  # fairseq: eps / (V - 1) to each of the others
        kl = (q * (q.log() - logp)).sum()
        to_teacher = bool(mask[b, t])
        loss = loss + (kl if to_teacher else data)
        nll = nll - logp[gold].detach()
        kd = kd + kl.detach() * to_teacher
        gap = gap + (0 if gate == "none" else difference)

    margin, certain = [], []
    for b, t in rows:
        if gate == "sentence":
            total = sum(d for d, _, _ in margins[b])
            margin.append(total)
            certain.append(abs(total) > sum(n for _, n, _ in margins[b]) and not any(u for _, _, u in margins[b]))
        else:
            difference, noise, unclear = margins[b][t]
            margin.append(difference)
            certain.append(abs(difference) > noise and not unclear)
    unclear_gap = any(u for row in margins.values() for _, _, u in row)
    return Truth(
        [loss.detach(), nll, kd, *([] if unclear_gap else [torch.as_tensor(gap, dtype=torch.float64)])],
        list(torch.autograd.grad(loss, leaves)),
        torch.tensor(margin),
        torch.tensor(certain),
    )


def error(value: Tensor, expected: Tensor, floor: float = 1e-12) -> float:
    return float((value.double() - expected).norm() / expected.norm().clamp(min=floor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("tempered_gate", [True, False], ids=["tempered", "untempered"])
@pytest.mark.parametrize("gate_on", ["gold", "argmax"])
@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
@pytest.mark.parametrize("case", CASES)
def test_error_against_fp64(
    case: str,
    gate: str,
    gate_on: str,
    tempered_gate: bool,
    smoothing: float,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    record_property,
):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", CASES[case].chunk)
    for bias in (True, False):
        batch = make(**CASES[case].batch, bias=bias, dtype=dtype)
        kept = batch.target != PAD
        errors, masks = {}, {}
        for implementation in IMPLEMENTATIONS:
            out = run(
                batch,
                implementation,
                gate=gate,
                gate_on=gate_on,
                tempered_gate=tempered_gate,
                label_smoothing=smoothing,
            )
            true = truth(batch, out.teacher_mask, gate, gate_on, tempered_gate, smoothing)
            values = [out.loss, out.nll, out.kd, out.gap][: len(true.values)]
            made = gradients(out.loss, batch)
            assert [g.dtype for g in made] == [dtype] * len(made)
            errors[implementation] = [
                *(error(v.detach(), t, floor=1.0) for v, t in zip(values, true.values, strict=True)),
                *(error(g, t) for g, t in zip(made, true.gradients, strict=True)),
            ]
            bits = out.teacher_mask[kept]
            if gate == "none":
                assert not bits.any()
            else:
                assert torch.equal(bits[true.certain], (true.margin > 0)[true.certain])
                # Else nothing was compared. Rounding to bf16 can change every sentence's decision:
                # test_gates_agree_between_dtypes compares those.
                assert true.certain.any() or dtype == torch.bfloat16
            assert not out.teacher_mask[~kept].any()
            assert out.teacher_tokens == bits.sum()
            masks[implementation] = bits
        # Chunked accumulates in fp32 but rounds the gradient at the logits once to the inputs' dtype, as eager does.
        floors = [4 * torch.finfo(torch.float32).eps] * len(true.values) + [2 * torch.finfo(dtype).eps] * len(made)
        names = ("loss", "nll", "kd", "gap")[: len(true.values)] + ("d hidden", "d weight", "d bias")[: len(made)]
        for mine in IMPLEMENTATIONS[1:]:
            for name, eager, ours, floor in zip(names, errors["eager"], errors[mine], floors, strict=True):
                record_property(f"{mine} {name} {bias}", (eager, ours))
                assert ours <= 2 * eager + floor, f"{name}, bias {bias}: {mine} {ours:.2e}, eager {eager:.2e}"


@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
def test_autocast(gate: str, monkeypatch: pytest.MonkeyPatch):
    # --amp: fp32 parameters, products in bf16. The gradients come back in fp32.
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    batch = make()
    errors = {}
    for implementation in IMPLEMENTATIONS:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(batch, implementation, gate=gate)
        made = gradients(out.loss, batch)
        assert [g.dtype for g in made] == [torch.float32] * 3
        true = truth(batch, out.teacher_mask, gate, "gold", True, 0.0)
        errors[implementation] = [error(g, t) for g, t in zip(made, true.gradients, strict=True)]
        assert error(out.loss.detach(), true.values[0]) < 0.01
    for mine in IMPLEMENTATIONS[1:]:
        for eager, ours in zip(errors["eager"], errors[mine], strict=True):
            assert ours <= 2 * eager + 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_over_many_chunks_are_fp32(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    # 300 chunks of 2 tokens: with sums in the inputs' dtype the error of d weight was 1.8 % (bf16) and 0.25 % (fp16),
    # where that of eager is 0.2 % and 0.03 %.
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 2)
    batch = make((2,) * 300, 2, vocabulary=60, dimension=8, dtype=dtype)
    wide = batch._replace(
        hidden=batch.hidden.detach().double().requires_grad_(),
        weight=batch.weight.detach().double().requires_grad_(),
        bias=batch.bias.detach().double().requires_grad_(),
    )
    expected = gradients(run(wide, "eager", gate="none").loss, wide)
    errors = {}
    for implementation in IMPLEMENTATIONS:
        made = gradients(run(batch, implementation, gate="none").loss, batch)
        errors[implementation] = [error(g, t) for g, t in zip(made, expected, strict=True)]
    for mine in IMPLEMENTATIONS[1:]:
        for eager, ours in zip(errors["eager"], errors[mine], strict=True):
            assert ours <= 2 * eager + torch.finfo(dtype).eps / 4, errors


def test_gates_agree_between_dtypes():
    # The same bf16 numbers in fp32 and in bf16: decisions differ only where rounding of the logits can change them.
    half = make(dtype=torch.bfloat16, lengths=(7, 6, 7, 5))
    wide = Batch(*[x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in half])
    wide = wide._replace(
        **{
            name: [x.float() for x in getattr(half, name)]
            for name in ("teacher_hidden", "teacher_weight", "teacher_bias")
        }
    )
    for gate, implementation in itertools.product(("token", "sentence"), ("chunked", "native")):
        a, b = run(half, implementation, gate=gate), run(wide, implementation, gate=gate)
        certain = truth(half, a.teacher_mask, gate, "gold", True, 0.0).certain
        kept = half.target != PAD
        assert certain.sum() > 0.5 * kept.sum()
        assert torch.equal(a.teacher_mask[kept][certain], b.teacher_mask[kept][certain])


@both
@pytest.mark.parametrize("gate", ["token", "sentence"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gate_compares_in_fp32(implementation: str, gate: str, dtype: torch.dtype):
    """For logits that the dtype holds exactly, and log-probabilities closer than it can resolve, all decisions are
    those of the same numbers in fp32."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(8, 32, 40, generator=generator).mul(3).to(dtype)
    target = torch.randint(2, 40, (8, 32), generator=generator)
    other = (target[..., None] + 1) % 40  # a token other than gold, whose logit differs for the teacher
    step = torch.tensor([2**-6, -(2**-6)] * 4)[:, None, None]  # up in one sentence, down in the next
    teacher = student.scatter(2, other, student.gather(2, other) * (1 + step).to(dtype))
    outs = []
    for kind in (dtype, torch.float32):
        eye, how = torch.eye(40, dtype=kind), {"teacher_temperature": 1.0, "implementation": implementation}
        outs.append(gated_distillation(student.to(kind), eye, teacher.to(kind), eye, target, gate=gate, **how))
    narrow, wide = outs
    assert torch.equal(narrow.teacher_mask, wide.teacher_mask)
    assert 0.2 < wide.teacher_mask.float().mean() < 0.8
    near = (wide.results.student_read - wide.results.teacher_read).abs() < torch.finfo(dtype).eps / 4
    assert near.float().mean() > 0.4


# Pads


@both
@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_pads(implementation: str, gate: str, dtype: torch.dtype):
    batch = make(lengths=(0, 0), dtype=dtype)
    out = run(batch, implementation, gate=gate, top1=True)
    for value in (out.loss, out.nll, out.kd, out.gap, out.teacher_tokens, out.tokens):
        assert value.item() == 0
    assert out.confidence.shape == out.correct.shape == (2, 7)
    for gradient, leaf in zip(gradients(out.loss, batch), batch.leaves(), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


@both
@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_lengths_may_be_given(implementation: str, gate: str):
    batch = make()
    counted, given = run(batch, implementation, gate=gate), run(batch, implementation, gate=gate, lengths=[4, 0, 7, 1])
    assert torch.equal(given.loss, counted.loss)
    assert torch.equal(given.teacher_mask, counted.teacher_mask)


@both
def test_no_sentences(implementation: str):
    batch = make(lengths=(0, 0))
    empty = batch._replace(
        hidden=batch.hidden[:0], teacher_hidden=[batch.teacher_hidden[0][:0]], target=batch.target[:0]
    )
    assert run(empty, implementation, gate="sentence").loss.item() == 0


@both
@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
def test_one_token(implementation: str, gate: str):
    batch = make(lengths=(0, 1, 0))
    out = run(batch, implementation, gate=gate)
    true = truth(batch, out.teacher_mask, gate, "gold", True, 0.0)
    assert out.tokens.item() == 1
    assert out.loss.item() == pytest.approx(true.values[0].item(), rel=1e-5)
    for gradient, expected in zip(gradients(out.loss, batch), true.gradients, strict=True):
        torch.testing.assert_close(gradient.double(), expected, atol=1e-6, rtol=1e-5)


@both
@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
@pytest.mark.parametrize("poison", [float("inf"), float("nan"), 1e4])
def test_pads_reach_nothing(implementation: str, gate: str, poison: float):
    batch = make()
    pads = (batch.target == PAD)[..., None]
    poisoned = batch._replace(
        hidden=batch.hidden.detach().masked_fill(pads, poison).requires_grad_(),
        teacher_hidden=[h.masked_fill(pads, poison) for h in batch.teacher_hidden],
    )
    clean_out, out = (run(b, implementation, gate=gate, label_smoothing=0.1, top1=True) for b in (batch, poisoned))
    for name in ("loss", "nll", "kd", "gap", "teacher_mask", "confidence", "correct"):
        assert torch.equal(getattr(out, name), getattr(clean_out, name)), name
    for clean, other in zip(gradients(clean_out.loss, batch), gradients(out.loss, poisoned), strict=True):
        assert torch.equal(other, clean)
    # And no gradient reaches a pad.
    d_hidden = gradients(run(poisoned, implementation, gate=gate).loss, poisoned)[0]
    assert torch.equal(d_hidden[pads.squeeze(2)], torch.zeros_like(d_hidden[pads.squeeze(2)]))


# Student and teacher


def same(batch: Batch) -> Batch:
    """Return the batch with the student as its own teacher."""
    return batch._replace(
        teacher_hidden=[batch.hidden.detach()],
        teacher_weight=[batch.weight.detach()],
        teacher_bias=[batch.bias.detach()],
    )


@both
@pytest.mark.parametrize("gate", ["token", "sentence"])
def test_student_that_equals_the_teacher_learns_from_the_data(implementation: str, gate: str):
    out = run(same(make()), implementation, gate=gate, teacher_temperature=1.0)
    assert not out.teacher_mask.any()
    assert (out.kd.item(), out.gap.item()) == (0, 0)
    assert torch.equal(out.loss, out.nll)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_student_that_equals_the_teacher_learns_nothing_from_it(implementation: str, dtype: torch.dtype):
    batch = same(make(dtype=dtype))
    out = run(batch, implementation, gate="always", teacher_temperature=1.0)
    assert out.teacher_tokens.item() == 12
    assert out.loss.item() == pytest.approx(0, abs=1e-6)
    scale = gradients(run(batch, implementation, gate="none").loss, batch)
    for gradient, usual in zip(gradients(out.loss, batch), scale, strict=True):
        assert gradient.double().norm() <= 1e-6 * usual.double().norm()


@both
def test_teacher_gets_no_gradient(implementation: str):
    batch = make()
    for tensor in (*batch.teacher_hidden, *batch.teacher_weight, *batch.teacher_bias):
        tensor.requires_grad_()
    run(batch, implementation, gate="always").loss.backward()
    assert batch.hidden.grad is not None
    for tensor in (*batch.teacher_hidden, *batch.teacher_weight, *batch.teacher_bias):
        assert tensor.grad is None


@both
def test_label_smoothing_is_that_of_fairseq(implementation: str):
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    batch = make()
    out = run(batch, implementation, gate="none", label_smoothing=0.1)
    z = torch.nn.functional.linear(batch.hidden, batch.weight, batch.bias)
    expected, nll = label_smoothed_nll_loss(z.log_softmax(-1).flatten(0, 1), batch.target.flatten(), 0.1, PAD)
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert out.nll.item() == pytest.approx(nll.item(), rel=1e-6)
    for gradient, theirs in zip(gradients(out.loss, batch), gradients(expected, batch), strict=True):
        torch.testing.assert_close(gradient, theirs, atol=1e-6, rtol=1e-5)


# Gradients


@both
@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_finite_differences(implementation: str, gate: str, smoothing: float):
    """Gradients equal central differences, on data so far from the gate's boundary that no step changes a decision: no
    gradient leaks through the gate. (torch's gradcheck asks for the gradient twice, which the chunked loss refuses.)"""
    dtype, _, tolerance = precision(implementation)
    oracle = "eager" if dtype == torch.float32 else implementation  # differences need fp64
    shape = {"lengths": (3, 0, 2, 1), "length": 3, "vocabulary": 11, "dimension": 4, "seed": 3}
    mine, batch = make(**shape, dtype=torch.float64), make(**shape, dtype=torch.float64)
    mine = Batch(*[tree_map_only(Tensor, lambda x: as_dtype(x, dtype), part) for part in mine])
    out = run(mine, implementation, gate=gate, label_smoothing=smoothing)
    margins = truth(batch, out.teacher_mask, gate, "gold", True, smoothing).margin
    step = 1e-6
    assert margins.abs().min() > 100 * step
    assert gate == "none" or 0 < out.teacher_tokens < out.tokens
    with torch.no_grad():
        for leaf, gradient in zip(batch.leaves(), gradients(out.loss, mine), strict=True):
            numerical, values = torch.zeros_like(leaf), leaf.view(-1)
            for i in range(leaf.numel()):
                ends = []
                for sign in (1, -1):
                    values[i] += sign * step
                    ends.append(run(batch, oracle, gate=gate, label_smoothing=smoothing).loss)
                    values[i] -= sign * step
                numerical.view(-1)[i] = (ends[0] - ends[1]) / (2 * step)
            near = tolerance if dtype == torch.float32 else {"atol": 1e-7, "rtol": 1e-6}
            torch.testing.assert_close(gradient.double(), numerical, **near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tied_weight(dtype: torch.dtype):
    """For an output weight that is also the embedding both gradients are added."""
    batch = make(dtype=dtype)
    source = torch.tensor([[3, 5, 3, 8, 9, 10, 3]] * 4)
    found = {}
    for implementation in IMPLEMENTATIONS:
        weight = batch.weight.detach().clone().requires_grad_()
        hidden = torch.nn.functional.embedding(source, weight).tanh()
        out = run(batch._replace(hidden=hidden, weight=weight), implementation, gate="token")
        out.loss.backward()
        found[implementation] = weight.grad
        alone = torch.autograd.grad(
            run(batch._replace(hidden=hidden.detach(), weight=weight), implementation, gate="token").loss, weight
        )[0]
        assert not torch.equal(alone[3], weight.grad[3])
    tolerance = 20 * torch.finfo(dtype).eps
    for mine in IMPLEMENTATIONS[1:]:
        torch.testing.assert_close(found[mine], found["eager"], atol=tolerance, rtol=tolerance)


@both
def test_two_losses_over_one_weight_add(implementation: str):
    batch, other = make(seed=1), make(seed=2)
    other = other._replace(weight=batch.weight, bias=batch.bias)
    (run(batch, implementation).loss + run(other, implementation).loss).backward()
    expected = (
        gradients(run(batch, implementation).loss, batch)[1] + gradients(run(other, implementation).loss, other)[1]
    )
    torch.testing.assert_close(batch.weight.grad, expected)


@both
@pytest.mark.parametrize("factor", [128.0, 2.0**-9, -3.0, 0.0])
def test_factor_scales_the_gradients(implementation: str, factor: float):
    batch = make()
    plain = gradients(run(batch, implementation).loss, batch)
    scaled = gradients(run(batch, implementation).loss * factor, batch)
    for gradient, one in zip(scaled, plain, strict=True):
        torch.testing.assert_close(gradient, one * factor, atol=1e-5 * abs(factor), rtol=1e-5)


def test_backward_twice_is_refused():
    batch = make()
    loss = run(batch, "chunked").loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="gradients of a chunked loss can be used once"):
        loss.backward()


@both
def test_no_gradient_under_no_grad(implementation: str, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(chunked, "add_product", lambda *_, **__: made.append("weight"))
    monkeypatch.setattr(chunked, "product", lambda a, b, dtype: made.append("hidden") or a @ b)
    batch = make()
    with torch.no_grad():
        out = run(batch, implementation, top1=True)
    assert out.loss.requires_grad is False
    assert made == []
    if implementation != "eager":  # both patched functions are called where a gradient is wanted
        run(batch, implementation)
        assert sorted(set(made)) == ["hidden", "weight"]


@both
def test_only_the_loss_carries_gradient(implementation: str):
    out = run(make(), implementation, top1=True)
    assert out.loss.requires_grad
    assert not any(getattr(out, name).requires_grad for name in ("nll", "kd", "gap", "confidence"))


@both
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_frozen_inputs_get_none(implementation: str, frozen: str):
    batch = make()
    expected = dict(zip(("hidden", "weight", "bias"), gradients(run(batch, implementation).loss, batch), strict=True))
    getattr(batch, frozen).requires_grad_(False)
    run(batch, implementation).loss.backward()
    for name in expected:
        if name == frozen:
            assert getattr(batch, name).grad is None
        else:
            assert torch.equal(getattr(batch, name).grad, expected[name])


# fp16


def nearly_learnt() -> Batch:
    """Return an fp16 batch of 48 tokens that the student has almost learnt: of 4,000 words, each wrong one has a
    probability near 1e-8 (e^-18.4), so that the gradient at its logit is far below fp16's smallest number, 6e-8."""
    tokens, vocabulary = 48, 4000
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(2, vocabulary, (4, 12), generator=generator)
    hidden = torch.zeros(4, 12, tokens + 2)
    weight = torch.randn(vocabulary, tokens + 2, generator=generator) * 0.25
    flat = hidden.view(tokens, -1)
    flat[torch.arange(tokens), torch.arange(tokens)] = 1.0
    flat[:, tokens:] = torch.randn(tokens, 2, generator=generator)
    weight[target.flatten(), torch.arange(tokens)] += 18.4
    half = torch.float16
    return Batch(
        hidden.to(half).requires_grad_(),
        weight.to(half).requires_grad_(),
        None,
        [hidden.to(half)],
        [weight.to(half)],
        [None],
        target,
    )


def flushed(scale: float, monkeypatch: pytest.MonkeyPatch) -> tuple[float, float]:
    """Return the share of zeros in d weight at the loss scale 2**14: (chunked in fp16, fp32 gradients cast to fp16)."""
    batch = nearly_learnt()
    monkeypatch.setattr(chunked, "FP16_SCALE", scale)
    wide = batch._replace(
        hidden=batch.hidden.detach().float().requires_grad_(), weight=batch.weight.detach().float().requires_grad_()
    )
    half = gradients(run(batch, "chunked", gate="none").loss * 2**14, batch)[1]
    full = gradients(run(wide, "eager", gate="none").loss * 2**14, wide)[1]
    size = full.abs() / 2**14
    assert 1e-10 < size[size > 0].median() < 1e-6  # what is tested: gradients of about 1e-8
    return (half == 0).float().mean().item(), (full.half() == 0).float().mean().item()


def test_fp16_small_gradients_are_not_flushed(monkeypatch: pytest.MonkeyPatch):
    ours, reference = flushed(chunked.FP16_SCALE, monkeypatch)
    assert ours <= reference + 0.001
    # Without the factor nearly everything is lost, so that the data do test it.
    without, _ = flushed(1.0, monkeypatch)
    assert without > 0.9


@both
def test_fp16_overflow_is_seen(implementation: str):
    """Logits beyond 65504 must show as inf or NaN, which fairseq's loss scaler acts on, never as silent zeros."""
    batch = make(dtype=torch.float16)
    batch = batch._replace(hidden=(batch.hidden.detach() * 3e4).requires_grad_())
    out = run(batch, implementation, gate="none")
    values = [out.loss.detach(), *gradients(out.loss, batch)]
    assert not all(value.isfinite().all() for value in values)


@both
def test_fp16_gradients_beyond_its_range_are_seen(implementation: str):
    batch = make(dtype=torch.float16)
    made = gradients(run(batch, implementation, gate="none").loss * 2.0**17, batch)
    assert not all(gradient.isfinite().all() for gradient in made)
    # At a scale that fits, none overflows: the factor inside does not reduce fp16's range.
    made = gradients(run(batch, implementation, gate="none").loss * 2.0**12, batch)
    assert all(gradient.isfinite().all() for gradient in made)


@both
def test_fp16_gradients_are_not_beyond_its_range_inside(implementation: str):
    """A gradient of 150 fits fp16; times the internal factor that protects small gradients it would not."""
    hidden = torch.zeros(1, 1, 1, dtype=torch.float16, requires_grad=True)
    weight = torch.tensor([[150.0], [-150.0]], dtype=torch.float16)
    target = torch.zeros(1, 1, dtype=torch.int64)
    out = gated_distillation(
        hidden, weight, None, None, target, padding_idx=9, gate="none", implementation=implementation
    )
    out.loss.backward()  # p = (1/2, 1/2), so that dz = (-1/2, 1/2)
    assert hidden.grad.item() == -150


# Bad inputs


def arguments(**changes) -> dict:
    batch = make(teacher_dimensions=(9,))
    plain = {
        "student_hidden": batch.hidden,
        "student_weight": batch.weight,
        "teacher_hidden": batch.teacher_hidden[0],
        "teacher_weight": batch.teacher_weight[0],
        "target": batch.target,
    }
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "word"}, 'unknown gate "word"; known gates: always, annealed, '),
        ({"gate_on": "second"}, 'gate_on is "second"; it must be one of gold, argmax'),
        ({"teacher_temperature": 0}, "teacher_temperature is 0.0; it must be above 0"),
        ({"teacher_temperature": float("nan")}, "teacher_temperature is nan"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0; it must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"teacher_weight": torch.zeros(124, 9)}, "vocabularies differ: student 123, teacher 124"),
        ({"teacher_hidden": torch.zeros(4, 6, 9)}, r"teacher_hidden is \(4, 6, 9\) and target \(4, 7\)"),
        ({"student_hidden": torch.zeros(28, 13)}, r"student_hidden is \(28, 13\) and target \(4, 7\)"),
        ({"student_weight": torch.zeros(123, 12)}, r"student_weight \(123, 12\) does not fit student_hidden"),
        ({"teacher_hidden": None}, 'gate "token" needs a teacher, but teacher_hidden is None'),
        (
            {"teacher_hidden": [torch.zeros(4, 7, 9)] * 2, "teacher_weight": [torch.zeros(123, 9)]},
            "one teacher_hidden, teacher_weight and teacher_bias a member, not 2, 1 and 2",
        ),
        ({"teacher_hidden": [], "teacher_weight": []}, "not 0, 0 and 0"),
        ({"implementation": "fast"}, 'unknown implementation "fast"; it must be one of auto, eager, chunked'),
        (
            {"implementation": "chunked", "student_hidden": torch.zeros(4, 7, 123), "student_weight": None},
            "needs linear heads",
        ),
        (
            {"implementation": "chunked", "teacher_hidden": torch.zeros(4, 7, 123), "teacher_weight": None},
            "needs linear heads",
        ),
    ],
)
def test_bad_input_is_one_error_message(changes: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        gated_distillation(**arguments(**changes))
    assert "\n" not in str(caught.value)


def test_logits_in_place_of_a_head():
    """With weight=None `hidden` holds logits; "auto" takes them, for the student, the teacher or both."""
    batch = make(bias=False)
    student_logits = (batch.hidden @ batch.weight.t()).detach()
    teacher_logits = batch.teacher_hidden[0] @ batch.teacher_weight[0].t()
    expected = run(batch, "chunked")
    for hidden, weight in ((batch.hidden, batch.weight), (student_logits, None)):
        for teacher_hidden, teacher_weight in (
            (batch.teacher_hidden[0], batch.teacher_weight[0]),
            (teacher_logits, None),
        ):
            out = gated_distillation(hidden, weight, teacher_hidden, teacher_weight, batch.target, padding_idx=PAD)
            assert torch.equal(out.teacher_mask, expected.teacher_mask)
            assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


# Properties


def part(batch: Batch, rows) -> Batch:
    return batch._replace(
        hidden=batch.hidden.detach()[rows].requires_grad_(),
        teacher_hidden=[h[rows] for h in batch.teacher_hidden],
        target=batch.target[rows],
    )


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(0, 6), min_size=2, max_size=6),
        "length": st.integers(6, 8),
        "vocabulary": st.integers(3, 40),
        "dimension": st.integers(1, 9),
        "bias": st.booleans(),
        "seed": st.integers(0, 100),
    }
)


@settings(deadline=None, max_examples=25)
@given(shape=shapes, gate=st.sampled_from(["token", "sentence", "none"]), data=st.data())
def test_a_batch_is_the_sum_of_its_halves(shape: dict, gate: str, data):
    cut = data.draw(st.integers(0, len(shape["lengths"])))
    for implementation in IMPLEMENTATIONS:
        dtype, near, _ = precision(implementation)
        near = max(near, 1e-9)
        batch = make(**shape, dtype=dtype)
        whole = run(batch, implementation, gate=gate, label_smoothing=0.1)
        halves = [part(batch, slice(None, cut)), part(batch, slice(cut, None))]
        outs = [run(half, implementation, gate=gate, label_smoothing=0.1) for half in halves]
        for name in ("loss", "nll", "kd", "gap", "teacher_tokens", "tokens"):
            total = sum(getattr(out, name).item() for out in outs)
            assert getattr(whole, name).item() == pytest.approx(total, rel=near, abs=near), name
        made = [gradients(out.loss, half) for out, half in zip(outs, halves, strict=True)]
        for index, gradient in enumerate(gradients(whole.loss, batch)):
            parts = [half[index] for half in made]
            torch.testing.assert_close(gradient, torch.cat(parts) if index == 0 else sum(parts), atol=near, rtol=near)


@settings(deadline=None, max_examples=25)
@given(shape=shapes, gate=st.sampled_from(["token", "sentence", "none"]), data=st.data())
def test_order_of_sentences_does_not_matter(shape: dict, gate: str, data):
    order = data.draw(st.permutations(range(len(shape["lengths"]))))
    for implementation in IMPLEMENTATIONS:
        dtype, near, _ = precision(implementation)
        batch = make(**shape, dtype=dtype)
        out, other = (run(b, implementation, gate=gate) for b in (batch, part(batch, order)))
        assert torch.equal(other.teacher_mask, out.teacher_mask[order])
        assert torch.equal(other.tokens_mask, out.tokens_mask[order])
        assert other.loss.item() == pytest.approx(out.loss.item(), rel=max(near, 1e-9), abs=max(near, 1e-9))


@settings(deadline=None, max_examples=200)
@given(lengths=st.lists(st.integers(0, 12), max_size=12), chunk=st.integers(1, 10))
def test_chunks_cover_all_rows_and_cut_no_sentence(lengths: list[int], chunk: int):
    tokens = sum(lengths)
    ends = set(itertools.accumulate(lengths, initial=0))
    for given_lengths in (lengths, None):
        bounds = chunked.chunk_bounds(tokens, given_lengths, chunk)
        assert [row for start, end in bounds for row in range(start, end)] == list(range(tokens))
        assert all(start < end for start, end in bounds)
    for start, end in chunked.chunk_bounds(tokens, lengths, chunk):
        assert {start, end} <= ends
        whole = [n for n, last in zip(lengths, itertools.accumulate(lengths), strict=True) if n and start < last <= end]
        assert end - start <= chunk or len(whole) == 1  # only a sentence longer than a chunk makes a larger one


# Memory


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


@pytest.mark.parametrize("gate", ["token", "sentence", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_tensor_of_tokens_times_vocabulary(gate: str, smoothing: float):
    tokens, vocabulary, dimension = 4096, 2000, 4
    batch = make((16,) * 256, 16, vocabulary, dimension, (dimension,))

    def largest(implementation: str) -> int:
        with LargestTensor() as mode:
            run(batch, implementation, gate=gate, label_smoothing=smoothing).loss.backward()
        return mode.elements

    assert largest("chunked") == largest("native") == chunked.CHUNK_TOKENS["cpu"] * vocabulary
    assert largest("eager") == tokens * vocabulary


# Without fairseq


# Every gate, with what else the loss can hold


def forward_kl(p: Tensor, q: Tensor) -> Tensor:
    return (q * (q.log() - p.log())).sum(1)


def autograd_of_the_equation(
    batch: Batch, gate: gates.Gate, penalty: float, progress: float, instance: Tensor | None = None,
    divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl,
) -> tuple[Tensor, list]:  # fmt: skip
    """Return the loss and its gradients by autograd of the equation, with probabilities over the whole vocabulary."""
    kept = batch.target != PAD
    z = batch.hidden[kept] @ batch.weight.t() + batch.bias
    teacher_z = (batch.teacher_hidden[0][kept] @ batch.teacher_weight[0].t() + batch.teacher_bias[0]) / 1.5
    p, q, gold = z.softmax(1), teacher_z.softmax(1).detach(), batch.target[kept]
    rows = torch.arange(len(gold))
    sentence = torch.arange(len(batch.target)).repeat_interleave(kept.sum(1))
    reads = p[rows, gold].log().detach(), (q if gate.needs_teacher else p)[rows, gold].log().detach()
    if instance is not None:
        instance = instance[sentence]
    view = (sentence, len(batch.target), z.size(1), progress, instance)
    above = (p * (p > q)).sum(1).detach()
    asked = {"student_above": above, "teacher_entropy": -(q * q.log()).sum(1)} if gate.asks else {}
    weights = gate.weights(gates.TokenStatistics(*reads, *view, asked))
    entropy = -(p * p.log()).sum(1)
    loss = weights.data * (-p[rows, gold].log() - penalty * entropy)
    if gate.needs_teacher:
        loss = loss + weights.teacher * divergence(p, q)
    if weights.uniform is not None:
        loss = loss + weights.uniform * -p.log().mean(1)
    return loss.sum(), gradients(loss.sum(), batch)


def precision(implementation: str) -> tuple[torch.dtype, float, dict[str, float]]:
    """Return (dtype to compute in, relative tolerance of the loss, tolerance of its gradients); native has no fp64."""
    if implementation == "native":
        return torch.float32, 1e-5, {"rtol": 1e-4, "atol": 2e-6}
    return torch.float64, 1e-12, {"rtol": 1e-10, "atol": 1e-12}


@both
@pytest.mark.parametrize("penalty", [0.0, 0.3])
@pytest.mark.parametrize("name", sorted(gates.GATES))
def test_gradient_of_every_gate(name: str, penalty: float, implementation: str, monkeypatch: pytest.MonkeyPatch):
    values = {"kd_weight": 0.3} if "kd_weight" in gates.GATES[name].parameters else {}
    dtype, near, tolerance = precision(implementation)
    batch, gate = make(dtype=dtype), gates.get_gate(name, **values)
    if name != "random":  # its draws depend on the chunks
        monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    torch.manual_seed(0)
    loss, expected = autograd_of_the_equation(batch, gate, penalty, progress=0.4)
    torch.manual_seed(0)
    out = run(batch, implementation, gate=gate, confidence_penalty=penalty, progress=0.4)
    assert out.loss.item() == pytest.approx(loss.item(), rel=near)
    for got, wanted in zip(gradients(out.loss, batch), expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


@both
@pytest.mark.parametrize("gate", ["token", "always", "sentence", "beta"])
@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_gradient_of_every_divergence(name: str, gate: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    """Loss and gradients equal those of the definitions, written out with probabilities."""
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    dtype, near, tolerance = precision(implementation)
    batch, made = make(dtype=dtype), gates.get_gate(gate)
    torch.manual_seed(0)
    loss, expected = autograd_of_the_equation(batch, made, 0.3, 0.0, divergence=WRITTEN_OUT[name])
    torch.manual_seed(0)
    out = run(batch, implementation, gate=made, confidence_penalty=0.3, divergence=name, **PARAMETERS.get(name, {}))
    assert out.loss.item() == pytest.approx(loss.item(), rel=near)
    for got, wanted in zip(gradients(out.loss, batch), expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


PARAMETERS = {"jsd": {"jsd_beta": 0.2}, "skew-kl": {"skew_alpha": 0.3}}
WRITTEN_OUT = {
    "kl": lambda p, q: (q * (q / p).log()).sum(1),
    "reverse-kl": lambda p, q: (p * (p / q).log()).sum(1),
    "js": lambda p, q: (q * (2 * q / (p + q)).log() + p * (2 * p / (p + q)).log()).sum(1) / 2,
    "jsd": lambda p, q: (0.2 * q * (q / (0.2 * q + 0.8 * p)).log() + 0.8 * p * (p / (0.2 * q + 0.8 * p)).log()).sum(1),
    "skew-kl": lambda p, q: (q * (q / (0.3 * q + 0.7 * p)).log()).sum(1),
}


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_a_divergence_where_probabilities_are_zero(name: str):
    """A token of probability 0 for both contributes nothing, no nan either. p = (3/4, 1/4, 0), q = (1/4, 3/4, 0)."""
    z = torch.tensor([[3.0, 1.0, 0.0]], dtype=torch.float64).log().requires_grad_()
    logq = torch.tensor([[0.25, 0.75, 0.0]], dtype=torch.float64).log()
    value = DIVERGENCES[name].of(torch.log_softmax(z, 1), logq, *PARAMETERS.get(name, {}).values())
    p = torch.tensor([[0.75, 0.25]], dtype=torch.float64)
    torch.testing.assert_close(value, WRITTEN_OUT[name](p, p.flip(1)))
    value.sum().backward()
    assert z.grad.isfinite().all()
    assert z.grad[0, 2] == 0


def test_limits_of_the_divergences_with_a_parameter():
    """The JSD of GKD divided by beta tends to KL(q || p) at beta 0, and divided by 1 - beta to KL(p || q) at beta 1; at
    0 and 1 it is defined as these, and at 1/2 it is js. The skew KL is the KL at alpha 0 and tends to 0 at alpha 1."""
    generator = torch.Generator().manual_seed(0)
    logp, logq = torch.randn((2, 5, 7), generator=generator, dtype=torch.float64).log_softmax(-1)
    of = {name: it.of for name, it in DIVERGENCES.items()}
    near = 1e-6
    for limit, found, exact in (
        ("kl", of["jsd"](logp, logq, near) / near, of["jsd"](logp, logq, 0.0)),
        ("reverse-kl", of["jsd"](logp, logq, 1 - near) / near, of["jsd"](logp, logq, 1.0)),
        ("kl", of["skew-kl"](logp, logq, near), of["skew-kl"](logp, logq, 0.0)),
    ):
        torch.testing.assert_close(exact, of[limit](logp, logq), rtol=0, atol=0)
        torch.testing.assert_close(found, exact, rtol=2e-5, atol=0)
        assert (found != exact).all()
    torch.testing.assert_close(of["jsd"](logp, logq, 0.5), of["js"](logp, logq), rtol=0, atol=0)
    assert (of["skew-kl"](logp, logq, 1 - near) < near**1.5).all()
    for option in ({"jsd_beta": 1.5}, {"skew_alpha": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is 1"):
            gated_distillation(**arguments(**option))


def test_an_unknown_divergence_is_refused():
    with pytest.raises(ValueError, match='unknown divergence "hellinger"; known are: kl, reverse-kl, js'):
        gated_distillation(**arguments(divergence="hellinger"))


@both
def test_gradient_with_weights_of_sentences(implementation: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)  # chunks that cut sentences
    dtype, near, tolerance = precision(implementation)
    batch, gate = make((4, 0, 7, 1, 6), dtype=dtype), gates.get_gate("instance")  # one sentence is all pads
    gate.weights.begin(torch.zeros(8, dtype=torch.bool))
    for name in ("data", "teacher"):
        gate.weights.state[name] = torch.rand(
            8, dtype=torch.float64, generator=torch.Generator().manual_seed(len(name))
        )
    instance = torch.tensor([6, 2, 0, 7, 2])
    loss, expected = autograd_of_the_equation(batch, gate, 0.3, 0.0, instance)
    out = run(batch, implementation, gate=gate, confidence_penalty=0.3, instance=instance)
    assert out.loss.item() == pytest.approx(loss.item(), rel=near)
    for got, wanted in zip(gradients(out.loss, batch), expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


class Learned(torch.nn.Module):
    """Learned gate: data 1 - g, teacher `opening` g, uniform g / 2 (if `uniform`); g = sigmoid(a + k gap)."""

    def __init__(self, opening: float, uniform: bool):
        super().__init__()
        self.opening, self.uniform = opening, uniform
        self.offset, self.sharpness = (torch.nn.Parameter(torch.tensor(value)) for value in (0.3, 0.7))

    def forward(self, statistics: gates.TokenStatistics) -> gates.GateWeights:
        gap = statistics.student_logprob - statistics.teacher_logprob
        open_ = torch.sigmoid(self.offset.to(gap.dtype) + self.sharpness.to(gap.dtype) * gap)
        # A weight of 0 still has a gradient.
        teacher = self.opening * open_ + (open_ - open_.detach() if self.opening == 0 else 0)
        return gates.GateWeights(1 - open_, teacher, open_ / 2 if self.uniform else None)


@both
@pytest.mark.parametrize("gate_on", ["gold", "argmax"])
@pytest.mark.parametrize("kind", ["soft-learned", "uniform", "closed"])
def test_gradient_of_a_learned_gate(kind: str, gate_on: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    """Gradients of a gate's parameters equal central differences of eager in fp64, also with a uniform term and where
    the gate reads the argmax; with a teacher's weight of 0 ("closed") they equal those of eager in fp64."""
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    learned = Learned(opening=float(kind != "closed"), uniform=kind == "uniform")
    made = gates.get_gate(kind).weights if kind == "soft-learned" else learned
    gate = gates.Gate("mine", made, uniform=kind == "uniform", compares=False)
    parameters = list(made.parameters())
    dtype, near, tolerance = precision(implementation)
    expected = []
    made.double()
    batch = make(dtype=torch.float64)
    for parameter in parameters:
        values = []
        for step in (1e-6, -1e-6):
            with torch.no_grad():
                parameter += step
                values.append(run(batch, "eager", gate=gate, gate_on=gate_on).loss.item())
                parameter -= step
        expected.append((values[0] - values[1]) / 2e-6)
    if kind == "closed":  # the weight stays 0, so that differences do not show its gradient, the KL
        batch64 = run(batch, "eager", gate=gate, gate_on=gate_on)
        expected = [g.item() for g in torch.autograd.grad(batch64.loss, parameters)]
        assert batch64.teacher_tokens == 0
    batch = Batch(*[tree_map_only(Tensor, lambda x: as_dtype(x, dtype), part) for part in batch])
    out = run(batch, implementation, gate=gate, gate_on=gate_on)
    got = [g.item() for g in torch.autograd.grad(out.loss, parameters, retain_graph=True)]
    assert got == pytest.approx(expected, rel=max(100 * near, 1e-6))
    # The student learns as if the weights were constants.
    frozen = dataclasses.replace(gate, weights=lambda s: detached(made(s)))
    constants = run(batch, "eager", gate=frozen, gate_on=gate_on)
    for mine, theirs in zip(gradients(out.loss, batch), gradients(constants.loss, batch), strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_a_learned_gate_that_is_closed_where_the_student_forbids_a_token():
    """The KL is infinite and its weight 0: neither the loss nor the gradients are nan."""
    batch, learned = make(dtype=torch.float64), Learned(opening=0.0, uniform=False)
    bias = torch.zeros(batch.weight.size(0), dtype=torch.float64)
    bias[(set(range(2, 123)) - set(batch.target.flatten().tolist())).pop()] = -torch.inf
    gate = gates.Gate("mine", learned, compares=False)
    out = run(batch._replace(bias=bias), "eager", gate=gate)
    assert out.results.kl.isinf().any()
    assert out.loss.isfinite()
    assert all(part.isfinite() for part in torch.autograd.grad(out.loss, list(learned.parameters())))


@pytest.mark.parametrize("implementation", ["eager", "chunked", "native"])
def test_cross_entropy_does_not_depend_on_options_of_the_teacher(implementation: str, monkeypatch: pytest.MonkeyPatch):
    """They select no slower code either, as before --distill-start-update."""
    batch = make()
    plain = run(batch, implementation, gate="none")
    monkeypatch.setattr(rows, "autograd_step", None)
    other = run(batch, implementation, gate="none", divergence="js", gate_on="student-draw")
    assert torch.equal(plain.loss, other.loss)


def test_a_uniform_weight_has_to_be_declared():
    gate = gates.Gate("mine", lambda s: gates.GateWeights(*[torch.ones_like(s.student_logprob)] * 3), compares=False)
    with pytest.raises(ValueError, match='gate "mine" gives a weight to the uniform term: register it with uniform=T'):
        run(make(), "chunked", gate=gate)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if x.is_floating_point() else x


def detached(weights: gates.GateWeights) -> gates.GateWeights:
    return gates.GateWeights(*[None if part is None else part.detach() for part in weights])


@pytest.mark.parametrize("scope", ["token", "sentence", "batch"])
@pytest.mark.parametrize("tempered_gate", [True, False])
@pytest.mark.parametrize(
    ("asks", "teachers"),
    [(tuple(gates.contract.ASKED), (9, 4)), (("teacher_entropy",), (9, 4)), (("teacher_entropy",), (9,))],
)
@both
def test_what_a_gate_asks_for(
    implementation: str,
    asks: tuple[str, ...],
    teachers: tuple[int, ...],
    tempered_gate: bool,
    scope: str,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    batch = make(dtype=precision(implementation)[0], teacher_dimensions=teachers)
    seen: dict[str, list[Tensor]] = {}

    def weights(statistics: gates.TokenStatistics) -> gates.GateWeights:
        for name, values in statistics.asked.items():
            seen.setdefault(name, []).append(values)
        return gates.hard.token(statistics)

    gate = gates.Gate("asks", weights, scope, asks=asks)
    assert Options(gate, tempered_gate=tempered_gate).fused == (asks == ("teacher_entropy",) and tempered_gate)
    out = run(batch, implementation, gate=gate, tempered_gate=tempered_gate)
    expected = run(batch, implementation, gate="token", tempered_gate=tempered_gate)
    assert torch.equal(out.teacher_mask, expected.teacher_mask)
    z, *logits = [
        (hidden.double() @ weight.double().t() + bias.double())[batch.target != PAD].detach()
        for hidden, weight, bias in zip(
            [batch.hidden, *batch.teacher_hidden],
            [batch.weight, *batch.teacher_weight],
            [batch.bias, *batch.teacher_bias],
            strict=True,
        )
    ]
    p = z.softmax(1)
    q = sum((teacher / (1.5 if tempered_gate else 1)).softmax(1) for teacher in logits) / len(logits)
    values = {
        "student_above": p.where(p > q, 0.0).sum(1),
        "student_entropy": -(p * p.log()).sum(1),
        "teacher_entropy": -(q * q.log()).sum(1),
    }
    assert seen.keys() == set(asks)
    for name in asks:
        torch.testing.assert_close(torch.cat(seen[name]).double(), values[name], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate_on", ["student-draw", "teacher-draw"])
@both
def test_drawn_tokens_have_the_distribution_they_are_drawn_from(implementation: str, gate_on: str):
    """The mean of log p - log q over many draws is its expectation over the vocabulary, within four standard errors."""
    count, vocabulary = 4000, 7
    batch = make((1,), 1, vocabulary)
    many = batch._replace(
        hidden=batch.hidden.expand(count, 1, -1),
        teacher_hidden=[hidden.expand(count, 1, -1) for hidden in batch.teacher_hidden],
        target=batch.target.expand(count, 1),
    )
    logp, logq = (
        (hidden @ weight.t() + bias).flatten().detach() / tau
        for hidden, weight, bias, tau in (
            (batch.hidden, batch.weight, batch.bias, 1.0),
            (batch.teacher_hidden[0], batch.teacher_weight[0], batch.teacher_bias[0], 1.5),
        )
    )
    logp, logq = logp.log_softmax(0), logq.log_softmax(0)
    torch.manual_seed(0)
    out = run(many, implementation, gate="token", gate_on=gate_on)
    drawn_from = (logp if gate_on == "student-draw" else logq).exp()
    mean = (drawn_from * (logp - logq)).sum()
    spread = ((drawn_from * (logp - logq - mean) ** 2).sum() / count).sqrt()
    assert abs(out.gap / count - mean) < 4 * spread
    share = (drawn_from * (logp > logq)).sum()
    assert abs(out.teacher_share / count - share) < 4 * (share * (1 - share) / count).sqrt()
    assert out.teacher_share == out.teacher_tokens


@pytest.mark.parametrize("scope", ["token", "sentence", "batch"])
@both
def test_the_gate_reads_what_is_given(implementation: str, scope: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    batch = make()
    own = run(batch, implementation, gate="token")
    given = -torch.rand(batch.target.shape)
    gate = gates.Gate("token of another scope", gates.hard.token, scope)
    out = run(batch, implementation, gate=gate, student_logprob=given)
    teacher = torch.zeros_like(given)
    teacher[batch.target != PAD] = own.results.teacher_read
    assert torch.equal(out.teacher_mask, (given > teacher) & (batch.target != PAD))
    assert not torch.equal(out.teacher_mask, own.teacher_mask)
    torch.testing.assert_close(out.token_nll, own.token_nll)  # products of other shapes may differ by a bit
    with pytest.raises(ValueError, match="student_logprob is of the gold token"):
        run(batch, implementation, gate="token", gate_on="argmax", student_logprob=given)


@both
def test_the_teachers_share_is_of_the_weights(implementation: str):
    batch = make()
    out = run(batch, implementation, gate=gates.get_gate("wsl", kd_weight=2.0))
    ratio = (out.results.student_read / out.results.teacher_read).double()  # of two NLLs
    weight = 2 * (1 - (-ratio).exp())
    assert out.teacher_share.item() == pytest.approx((weight / (1 + weight)).sum().item(), rel=1e-5)
    assert out.teacher_tokens == out.tokens
    assert run(batch, implementation, gate="none").teacher_share == 0
    assert run(batch, implementation, gate=gates.get_gate("always", kd_weight=0.25)).teacher_share == 0.25 * out.tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_gradients(dtype: torch.dtype):
    """Scaled gradients have the given dtype, and stay in the same memory if they have that dtype already."""
    gradient = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    found = products.scaled(gradient.clone(), dtype, torch.tensor(0.5))
    assert found is not None
    assert found.dtype == dtype
    assert found.tolist() == [[0.5, -1.5], [0.25, 1.0]]
    own = gradient.to(dtype)
    assert products.scaled(own, dtype, torch.tensor(0.5)).data_ptr() == own.data_ptr()
    assert own.tolist() == found.tolist()
