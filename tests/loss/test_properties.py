"""Property tests of the loss: every gate and implementation on random batches against the independent equations of
loss_oracle.py in fp64, over shapes, padding, dtypes, logits up to 10,000, all equal or minus infinity, and temperatures
from 0.001 to 1,000.

HGKD_EXAMPLES=N draws N batches for each test, with new seeds each time, in place of the few fixed ones of CI:

    HGKD_EXAMPLES=2000 pytest -q tests/loss/test_properties.py
"""

import math
import os
import random
from typing import Any, NamedTuple
from unittest import mock

import loss_oracle
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hgkd_fairseq import gates
from hgkd_fairseq.gates import Gate, get_gate
from hgkd_fairseq.loss import DistillationOutput, chunked, gated_distillation
from hgkd_fairseq.sentence_weights import gate as _instance  # noqa: F401  registers the gate instance

PAD = 1
GIVEN = os.environ.get("HGKD_EXAMPLES")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # by test_triton_interpreter.py
IMPLEMENTATIONS = ("triton",) if INTERPRETED else ("eager", "chunked", "native")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SCALES = (0.0, 1e-3, 0.3, 3.0, 30.0, 1e3, 1e4)
TEMPERATURES = (1e-3, 0.03, 0.5, 1.0, 1.5, 2.0, 20.0, 1e3)
DRAWING = ("random", "beta")  # gates whose weights are drawn at random


def drawn(few: int):
    """Return settings of hypothesis: HGKD_EXAMPLES random examples if it is set, else `few` fixed ones."""
    quick = {"derandomize": True, "max_examples": few, "database": None}
    found: dict[str, Any] = {"max_examples": int(GIVEN), "database": None} if GIVEN else quick
    phases = [Phase.explicit, Phase.generate]  # a batch is made of a seed, so that shrinking is useless
    return settings(deadline=None, phases=phases, suppress_health_check=list(HealthCheck), print_blob=True, **found)


class Drawn(NamedTuple):
    """A batch whose output layer is the identity, unless `weights` is given: the features are exactly the logits, so
    that implementations differ only in the arithmetic of the loss."""

    gate: Gate
    parameters: dict  # parameters of the gate, by the oracle's names
    options: dict
    hidden: Tensor  # (B, T, V), the student's logits without the bias
    bias: Tensor | None  # (V,)
    teacher: Tensor  # (B, T, V)
    teacher_bias: Tensor | None
    target: Tensor  # (B, T)
    chunk: int
    instance: Tensor | None = None
    known: str = ""  # "own": the log q that the gate reads is given beforehand; "other": that of another teacher is
    weights: tuple[Tensor, Tensor] | None = None  # (V, D) each, in place of the identity; not in half precision


def logits(generator: torch.Generator, shape: tuple[int, ...], kind: str, scale: float) -> Tensor:
    z = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-6, 6)
    if kind == "two values":
        z = z.sign()
    if kind == "one":
        z = torch.zeros(shape, dtype=torch.float64).scatter_(2, z.argmax(2, keepdim=True), 1.0)
    if kind == "offset":
        z = z / 100 + 1
    largest = z.abs().max() if z.numel() and z.abs().max() else 1
    return z / largest * scale


MASKED = ("both", "both", "teacher", "student")
KINDS = ("normal", "normal", "two values", "one", "offset")
PADS = ("none", "ends", "ends", "anywhere", "anywhere", "all but one", "all")


def target_of(generator: torch.Generator, shape: tuple[int, int], vocabulary: int, kind: str) -> Tensor:
    target = torch.randint(2, vocabulary, shape, generator=generator)
    keep = torch.ones(shape, dtype=torch.bool)
    if kind == "ends":
        lengths = torch.randint(0, shape[1] + 1, (shape[0], 1), generator=generator)
        keep = torch.arange(shape[1])[None] < lengths
    elif kind == "anywhere":
        keep = torch.rand(shape, generator=generator) < 0.6
    elif kind.startswith("all"):
        keep[:] = False
        keep[-1, 0] = kind == "all but one"
    return target.masked_fill(~keep, PAD)


def make(seed: int, dtype: torch.dtype, name: str) -> Drawn:
    """Draw a batch for the gate `name` from the seed."""
    generator, rng = torch.Generator().manual_seed(seed), random.Random(seed)
    shape, vocabulary = (rng.randint(1, 4), rng.randint(1, 7)), rng.choice((5, rng.randint(5, 40), rng.randint(5, 300)))
    target = target_of(generator, shape, vocabulary, rng.choice(PADS))
    hidden, teacher = (logits(generator, (*shape, vocabulary), rng.choice(KINDS), rng.choice(SCALES)) for _ in range(2))
    if rng.random() < 0.2:
        teacher = hidden.clone()  # ties at temperature 1
    gate, parameters = gate_of(rng, generator, name, target)
    options: dict[str, Any] = {
        "teacher_temperature": rng.choice(TEMPERATURES),
        "label_smoothing": rng.choice((0.0, 0.0, 0.1, 0.9)),
        "confidence_penalty": rng.choice((0.0, 0.0, 0.3)),
        "tempered_gate": rng.random() < 0.5,
        "gate_on": rng.choice(("gold", "gold", "argmax")),
        "progress": rng.choice((0.0, 0.4, 1.0)),
        "divergence": rng.choice(("kl", "kl", "kl", "kl", "reverse-kl", "js", "jsd", "skew-kl")),
    }
    if options["divergence"] in ("jsd", "skew-kl"):
        parameter = "jsd_beta" if options["divergence"] == "jsd" else "skew_alpha"
        options[parameter] = rng.choice((0.1, 0.5, 0.9))
    bias, teacher_bias = None, None
    if rng.random() < 0.5:
        bias, teacher_bias = torch.zeros(vocabulary, dtype=torch.float64), torch.zeros(vocabulary, dtype=torch.float64)
        if rng.random() < 0.5:  # forbidden tokens, none of them gold
            masked = torch.rand(vocabulary, generator=generator) < 0.3
            masked[target.unique()] = False
            masked[0] = False
            # reverse-kl is infinite where the teacher forbids what the student allows; kl the other way round.
            which = rng.choice(("both", "student") if options["divergence"] == "reverse-kl" else MASKED)
            bias[masked] = 0.0 if which == "teacher" else -torch.inf
            teacher_bias[masked] = 0.0 if which == "student" else -torch.inf
    instance = torch.arange(shape[0]) if "data" in parameters else None
    reads = gate.needs_teacher and options["gate_on"] == "gold" and gate.name not in DRAWING and gate.name != "expected"
    known = rng.choice(("", "own", "other")) if reads else ""
    narrow = [None if one is None else one.to(dtype) for one in (hidden, bias, teacher, teacher_bias)]
    made = Drawn(gate, parameters, options, *narrow, target, rng.choice((1, 2, 3, 7, 256)), instance, known)
    return with_heads(made, rng, generator) if dtype.itemsize > 2 and rng.random() < 0.3 else made


def with_heads(batch: Drawn, rng: random.Random, generator: torch.Generator) -> Drawn:
    """Return the batch with an output layer of a few dimensions in place of the identity.

    Not for half precision, whose products round logits of 10,000 by more than the differences that a gate compares;
    test_gated_distillation.py has such products, with logits of usual size.
    """
    found = []
    for features in (batch.hidden, batch.teacher):
        dimension, largest = rng.randint(1, 9), float(features.abs().max())
        shape = (features.size(2), dimension)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64).clamp(-4, 4)
        hidden = torch.randn((*features.shape[:2], dimension), generator=generator, dtype=torch.float64)
        found.append((hidden.to(features.dtype), (weight * largest / (8 * dimension)).to(features.dtype)))
    options = {**batch.options, "gate_on": "gold"}  # two logits may differ by less than their rounding
    (hidden, student), (teacher, other) = found
    return batch._replace(hidden=hidden, teacher=teacher, weights=(student, other), options=options)


def gate_of(rng: random.Random, generator: torch.Generator, name: str, target: Tensor) -> tuple[Gate, dict]:
    """Draw parameters of a gate; return the gate and its parameters by the oracle's names."""
    share = rng.choice((0.0, 0.3, 0.5, 1.0))
    weight = rng.choice((0.0, 0.4, 1.0))
    if name in ("floor", "sentence-floor"):
        return get_gate(name, gate_floor="0.2,0.9"), {"floor": (0.2, 0.9)}
    if name == "typical":
        margin, rest = rng.choice((-1.0, 0.0, 0.5)), rng.choice((0.0, 0.4, 1.0))
        gate = get_gate(name, kd_weight=weight, typical_margin=margin, untypical_weight=rest)
        return gate, {"kd_weight": weight, "margin": margin, "untypical_weight": rest}
    if name in ("soft", "soft-learned"):
        sharpness = float(torch.tensor(3 * weight))  # learned parameters are fp32
        return get_gate(name, gate_sharpness=sharpness), {"sharpness": sharpness}
    if name in ("always", "progressive", "wsl", "wsl-normalised"):
        return get_gate(name, kd_weight=weight), {"kd_weight": weight}
    if name == "annealed":
        return get_gate(name, gate_share=share), {"share": share}
    if name == "random":
        return (get_gate(name), {}) if share == 0.5 else (get_gate(name, gate_share=share), {"share": share})
    if name == "selective-batch":
        return get_gate(name, kd_weight=weight, gate_share=share), {"kd_weight": weight, "share": share}
    if name == "selective-global":
        gate, threshold = get_gate(name, kd_weight=weight), rng.choice((-math.inf, 0.0, 1.0, 100.0))
        gate.weights.state["threshold"] = torch.tensor(threshold)
        return gate, {"kd_weight": weight, "threshold": threshold}
    if name == "virtual-teacher":
        temperature = rng.choice((0.5, 1.0, 1.5, 20.0))
        found = {"kd_weight": weight, "virtual_gold": 0.9, "virtual_temperature": temperature}
        return get_gate(name, **found), {"kd_weight": weight, "gold": 0.9, "temperature": temperature}
    if name == "beta":
        return get_gate(name, kd_weight=weight), {"kd_weight": weight}
    sentences = torch.arange(target.size(0))[:, None].expand_as(target)[target != PAD]
    if name == "instance":
        gate, rows = get_gate(name), torch.rand(2, target.size(0), generator=generator)
        gate.weights.begin(torch.zeros(target.size(0), dtype=torch.bool))
        gate.weights.state.update(data=rows[0], teacher=rows[1])
        return gate, {"data": rows[0].double()[sentences], "teacher": rows[1].double()[sentences]}
    if name == "pair":
        gate, opened = get_gate(name, kd_weight=weight), torch.rand(target.size(0), generator=generator) < 0.5
        gate.weights.state["open"] = opened
        teacher = weight * opened.double()[sentences]
        return gate, {"data": 1 - teacher, "teacher": teacher}
    return get_gate(name), {}


def run(batch: Drawn, implementation: str, known: Tensor | None) -> tuple[DistillationOutput, list[Tensor]]:
    """Return the output and the gradients of the features, the weight and, if there is one, the bias."""
    student, teacher = batch.weights or [torch.eye(batch.hidden.size(2), dtype=batch.hidden.dtype)] * 2
    leaves = [x.clone().requires_grad_() for x in (batch.hidden, student)]
    if batch.bias is not None:
        leaves.append(batch.bias.clone().requires_grad_())
    with mock.patch.dict(chunked.CHUNK_TOKENS, {"cpu": batch.chunk}):
        out = gated_distillation(
            *leaves[:2], batch.teacher, teacher, batch.target,
            padding_idx=PAD, gate=batch.gate, student_bias=leaves[2] if len(leaves) > 2 else None,
            teacher_bias=batch.teacher_bias, instance=batch.instance, teacher_gold=known, top1=True,
            implementation=implementation, **batch.options,
        )  # fmt: skip
    return out, list(torch.autograd.grad(out.loss, leaves))


def tokens_of(batch: Drawn) -> loss_oracle.Tokens:
    kept = batch.target != PAD
    wide, rounding = [], 0.0
    u = torch.finfo(torch.float64 if batch.hidden.dtype == torch.float64 else torch.float32).eps
    student, teacher = batch.weights or (None, None)
    heads = ((batch.hidden, student, batch.bias), (batch.teacher, teacher, batch.teacher_bias))
    for features, weight, bias in heads:
        z = features[kept].double()
        if weight is not None:
            size = (z.abs() @ weight.double().abs().t()).max() if z.numel() else 0.0
            rounding = max(rounding, weight.size(1) * u * float(size))
            z = z @ weight.double().t()
        wide.append(z if bias is None else z + bias.double())
    sentence = torch.arange(len(kept))[:, None].expand_as(kept)[kept]
    o = batch.options
    return loss_oracle.Tokens(
        wide[0].requires_grad_(), wide[1], batch.target[kept], sentence, u, rounding, o["teacher_temperature"],
        o["label_smoothing"], o["confidence_penalty"], o["divergence"], o.get("jsd_beta", o.get("skew_alpha", 0.5)),
        o["gate_on"] if batch.gate.needs_teacher else "gold", o["tempered_gate"], batch.parameters, o["progress"],
    )  # fmt: skip


def near(value: Tensor | float, expected: float, error: float, what: str) -> None:
    """Assert that a sum is within `error` of the expected one, or not finite if that one is not."""
    value = float(value)
    if math.isfinite(expected):
        assert abs(value - expected) <= error + 1e-30, f"{what}: {value!r}, expected {expected!r} +- {error:.1e}"
    else:
        assert not math.isfinite(value), f"{what}: {value!r}, expected {expected!r}"


def check(batch: Drawn, implementation: str) -> None:
    tokens = tokens_of(batch)
    found = loss_oracle.find(tokens)
    known = None
    if batch.known:  # log q in fp32, as a store has it
        log_q = found.teacher_read.float()
        if batch.known == "other":
            log_q = log_q.roll(1) - 0.25
            found = loss_oracle.find(tokens, log_q.double())
        known = torch.zeros(batch.target.shape)
        known[batch.target != PAD] = log_q
        found.b = found.b + C32 * found.teacher_read.abs()
    torch.manual_seed(0)
    out, made = run(batch, implementation, known)
    kept, opened = batch.target != PAD, out.teacher_mask[batch.target != PAD]
    if batch.gate.name in DRAWING:
        weights = drawn_weights(batch, opened, found, tokens)
    else:
        weights = loss_oracle.weights(batch.gate.name, tokens, found)
    if weights is None:
        return
    if weights.unsure is not None:
        sure = ~weights.unsure
        assert torch.equal(opened[sure], (weights.teacher > 0)[sure]), f"{batch.gate.name}: a clear decision is wrong"
    weights = weights.with_decision(opened)
    expected = loss_oracle.expected(tokens, weights, found, tokens.student, batch.gate.needs_teacher)

    assert (int(out.tokens), int(out.teacher_tokens)) == (int(kept.sum()), int(opened.sum()))
    assert torch.equal(out.tokens_mask, kept)
    assert not out.teacher_mask[~kept].any()
    near(out.loss.detach(), expected.loss, expected.loss_error, "loss")
    near(out.nll, expected.nll, expected.nll_error, "nll")
    if weights.error is None:
        near(out.kd, expected.kd, expected.kd_error, "kd")
    if batch.gate.needs_teacher:
        gap = found.student_read - found.teacher_read
        near(out.gap, float(gap.sum()), float((found.a + found.b + C32 * gap.abs()).sum()), "gap")
    top = tokens.student.detach().argmax(1)
    if batch.weights is None:
        assert torch.equal(out.correct[kept], top == tokens.target)
    probability = found.logp.detach().gather(1, top[:, None]).squeeze(1).exp()
    assert ((out.confidence[kept].double() - probability).abs() <= torch.expm1(2 * found.a)).all()

    check_gradients(batch, implementation, expected, made)


# Largest gradient at the logits in fp16, which carries a factor of chunked.FP16_SCALE. That of the KL is at most the
# sum of the weights; that of another divergence, at logits of 10,000, can be larger than this.
FP16_DZ = torch.finfo(torch.float16).max / chunked.FP16_SCALE
C32 = loss_oracle.C * torch.finfo(torch.float32).eps


def check_gradients(batch: Drawn, implementation: str, expected: loss_oracle.Expected, made: list[Tensor]) -> None:
    """Assert that gradients are within their error bounds.

    Each is computed from the gradient at the logits, and rounded to its dtype at the end or at the logits; what is
    below the smallest number of fp16 may be 0.
    """
    kept, dtype = batch.target != PAD, batch.hidden.dtype
    assert [one.dtype for one in made] == [dtype] * len(made)
    u = torch.finfo(dtype).eps
    floor = {torch.float16: 2.0**-24}.get(dtype, 1e-30)
    if not expected.dz.isfinite().all():  # the loss is infinite
        return
    if dtype == torch.float16 and (expected.dz.abs() > FP16_DZ).any():  # must show as inf or nan
        assert implementation == "eager" or not all(one.isfinite().all() for one in made)
        return
    # (exact, error, size) of each; size is the sum of absolute terms, as a sum that cancels is rounded at their size.
    dz, bound = expected.dz, expected.dz_error + 2 * u * expected.dz.abs() + floor
    whole = [(dz, bound, torch.zeros_like(dz))]
    if batch.weights is not None:
        layer = batch.weights[0].double()
        whole = [(dz @ layer, bound @ layer.abs(), dz.abs() @ layer.abs())]
    features = batch.hidden[kept].double()
    whole.append((dz.t() @ features, bound.t() @ features.abs(), dz.abs().t() @ features.abs()))
    if len(made) > 2:
        whole.append((dz.sum(0), bound.sum(0), dz.abs().sum(0)))
    assert (made[0][~kept] == 0).all()
    for name, one, (exact, error, size) in zip(("d hidden", "d weight", "d bias"), made, whole, strict=False):
        one = one[kept] if name == "d hidden" else one
        fits = size < torch.finfo(dtype).max / 4  # 4 tokens of logits of 10,000 are more than fp16 holds
        right = (one.double() - exact).abs() <= error + (4 * u + C32) * size + floor  # False for nan
        assert (right | ~fits).all(), f"{name}: off by {(one.double() - exact).abs()[~right & fits].max()}"


def drawn_weights(batch: Drawn, opened: Tensor, found: loss_oracle.Found, tokens: loss_oracle.Tokens):
    """Return the expected weights of a gate that draws at random; None where rounding makes them unknown.

    The decisions of `random` are taken from `opened`, after a check of their number; `beta` repeats the same draws.
    """
    if batch.gate.name == "random":
        hard = opened.double()
        gap, noise = found.student_read - found.teacher_read, found.a + found.b
        share = batch.parameters.get("share")
        if share in (0.0, 1.0):
            assert opened.all() if share else not opened.any()
        elif share is None and not (gap.abs() <= noise).any() and len(gap) <= batch.chunk:
            assert opened.sum() == (gap > 0).sum()
        return loss_oracle.Weights(1 - hard, hard)
    read = found.teacher_read
    order = read.sort()
    if len(read) > 1 and (order.values.diff() <= 2 * found.b.max()).any():
        return None  # which token gets which draw is unknown
    torch.manual_seed(0)
    wide = torch.float64 if batch.hidden.dtype == torch.float64 else torch.float32
    values = torch.rand(read.shape, dtype=wide).double().pow(1 / 4).sort().values
    gold = torch.empty_like(values)
    gold[order.indices] = values
    weight = batch.parameters["kd_weight"]
    return loss_oracle.smoothed(1 - weight, weight, gold, tokens.student.size(1))


CASES = [(one, "fp32") for one in IMPLEMENTATIONS]
CASES += [(one, dtype) for one in IMPLEMENTATIONS for dtype in ("bf16", "fp16")]
CASES += [] if INTERPRETED else [("eager", "fp64"), ("chunked", "fp64")]


@pytest.fixture(autouse=True)
def _interpreter():
    if not INTERPRETED:
        yield
        return
    import triton_interpreter

    with triton_interpreter.exact_bf16(), np.errstate(all="ignore"):
        yield


@pytest.mark.parametrize(("implementation", "dtype"), CASES)
@drawn(20 if INTERPRETED else 60)
@example(seed=3246329, gate="beta")  # fp64 with a teacher's log-probabilities in fp32
@example(seed=65, gate="token")  # a given log q that decides otherwise than the teacher's own (Triton)
@given(seed=st.integers(0, 2**32 - 1), gate=st.sampled_from(sorted(gates.GATES)))
def test_loss_and_gradients(implementation: str, dtype: str, seed: int, gate: str):
    check(make(seed, DTYPES[dtype], gate), implementation)
