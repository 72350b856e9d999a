"""Tests of teachers that are known beforehand by the gold tokens' log-probabilities or by sparse distributions, against
eager and by hand."""

import dataclasses
import math

import pytest
import torch
from test_gated_distillation import IMPLEMENTATIONS, PAD, Batch, gradients, make, precision, run
from torch import Tensor

from hgkd_fairseq import gates
from hgkd_fairseq.loss import Head, Sparse, chunked, gated_distillation
from hgkd_fairseq.loss.eager import mean_logprobs

WITH_TEACHER = sorted(name for name, gate in gates.GATES.items() if gate.needs_teacher)
OF_SPARSE = [name for name in WITH_TEACHER if not gates.GATES[name].asks]
SUMS = ("loss", "nll", "kd", "gap", "teacher_tokens")
fast = pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "eager"])


def teacher_logprobs(batch: Batch, temperature: float) -> Tensor:
    """Return (B, T, V), the log-probabilities of the teacher, of an ensemble those of the mean."""
    members = zip(batch.teacher_hidden, batch.teacher_weight, batch.teacher_bias, strict=True)
    return mean_logprobs([Head(*member) for member in members], temperature)


def gold(batch: Batch, temperature: float = 1.5) -> Tensor:
    return teacher_logprobs(batch, temperature).gather(2, batch.target[..., None]).squeeze(2)


@fast
@pytest.mark.parametrize("tempered", [True, False])
@pytest.mark.parametrize("dimensions", [(9,), (9, 7)], ids=["one", "ensemble"])
@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_gate_that_is_decided_first(
    name: str, dimensions: tuple, tempered: bool, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    if name != "random":  # its draws depend on the chunks
        monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    dtype, near, tolerance = precision(implementation)
    batch = make(dtype=dtype, teacher_dimensions=dimensions)
    options = {"gate": name, "tempered_gate": tempered, "confidence_penalty": 0.3, "label_smoothing": 0.1, "top1": True}
    known = gold(batch, 1.5 if tempered else 1.0)
    torch.manual_seed(0)
    expected = run(batch, "eager", **options)
    torch.manual_seed(0)
    out = run(batch, implementation, teacher_gold=known, **options)
    torch.manual_seed(0)
    with torch.no_grad():
        validated = run(batch, implementation, teacher_gold=known, **options)
    for found in (out, validated):
        for part in SUMS:
            assert getattr(found, part).item() == pytest.approx(getattr(expected, part).item(), rel=near, abs=10 * near)
        assert torch.equal(found.teacher_mask, expected.teacher_mask)
        assert torch.equal(found.correct, expected.correct)
    for got, wanted in zip(gradients(out.loss, batch), gradients(expected.loss, batch), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


@fast
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_its_error_is_that_of_the_full_way(dtype: torch.dtype, implementation: str):
    """Errors of the gradients, against fp64 on the same inputs, are at most twice those without `teacher_gold`."""
    batch = make((30,) * 20, 30, 507, 24, (13,), dtype=dtype)
    wide = Batch(*[widened(part) for part in batch])
    known = gold(wide)
    truth = gradients(run(wide, "eager", teacher_gold=known).loss, wide)
    errors = []
    for given in (known, None):
        out = run(batch, implementation, teacher_gold=given)
        made = gradients(out.loss, batch)
        errors.append([((a.double() - b).norm() / b.norm()).item() for a, b in zip(made, truth, strict=True)])
    for first, full in zip(*errors, strict=True):
        assert first <= 2 * full + 2 * torch.finfo(dtype).eps


def widened(part):
    if isinstance(part, list):
        return [widened(one) for one in part]
    return part.detach().double().requires_grad_(part.requires_grad) if part.is_floating_point() else part


@fast
@pytest.mark.parametrize(("name", "share"), [("token", 0.3), ("sentence", 0.3), ("token-reversed", 0.7), ("beta", 0.0)])
def test_the_teachers_product_is_made_for_its_tokens_alone(
    name: str, share: float, implementation: str, monkeypatch: pytest.MonkeyPatch
):
    batch = make((20,) * 20, 20)
    plain = run(batch, "eager", gate="none").token_nll
    opened = (torch.arange(20) < 6)[:, None].expand_as(plain)  # three tenths of the sentences
    known = torch.where(opened, -1.0, 1.0) - plain
    rows = []
    multiply = chunked.project
    monkeypatch.setattr(chunked, "project", lambda features, *rest: rows.append(features) or multiply(features, *rest))
    out = run(batch, implementation, gate=name, teacher_gold=known)
    assert sum(len(features) for features in rows if features.size(1) == 9) == out.teacher_tokens == share * 400


def test_what_reads_more_takes_the_full_way():
    batch = make()
    asks = dataclasses.replace(gates.GATES["token"], asks=("student_entropy",))
    for options in ({"gate": "token", "gate_on": "argmax"}, {"gate": "soft-learned"}, {"gate": asks}):
        expected = run(batch, "eager", **options)
        out = run(batch, "chunked", teacher_gold=gold(batch), **options)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        assert (out.results.kl > 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("scope", ["sentence", "batch"])
def test_an_entropy_that_is_known(scope: str, implementation: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    batch = make(dtype=precision(implementation)[0])
    logq = teacher_logprobs(batch, 1.5)
    surprise, entropy = -gold(batch), -(logq.exp() * logq).sum(2)
    middle = float((surprise - entropy)[batch.target != PAD].mean())
    gate = dataclasses.replace(gates.get_gate("typical", typical_margin=middle), scope=scope)
    expected = run(batch, "eager", gate=gate)
    assert 0.7 < expected.teacher_share / expected.tokens < 1
    for known in ({"teacher_gold": gold(batch)}, {"teacher_gold": gold(batch), "teacher_entropy": entropy}):
        out = run(batch, implementation, gate=gate, **known)
        assert out.teacher_share.item() == pytest.approx(expected.teacher_share.item(), rel=1e-5)
    out = run_sparse(batch, implementation, top(batch, 7), gate=gate, teacher_entropy=entropy)
    assert out.teacher_share.item() == pytest.approx(expected.teacher_share.item(), rel=1e-5)
    above = {"teacher_gold": gold(batch), "teacher_entropy": entropy + 100}  # the gate reads the given entropy
    out = run(batch, implementation, gate=gate, **above)
    assert out.teacher_share.item() == pytest.approx(0.7 * expected.tokens.item(), rel=1e-5)


@fast
def test_a_kernel_does_not_decide_by_its_own_teacher(implementation: str):
    """The gate reads `teacher_gold` also where it is the token gate, which the kernels have built in, and is decided
    after the teacher's logits are made."""
    batch = make(dtype=precision(implementation)[0])
    gate = gates.Gate("token", gates.hard.token)
    for known, opened in ((-50.0, 1), (0.0, 0)):
        options = {"gate": gate, "teacher_gold": torch.full(batch.target.shape, known)}
        expected, out = run(batch, "eager", **options), run(batch, implementation, **options)
        assert out.teacher_tokens == opened * out.tokens
        for got, wanted in zip(gradients(out.loss, batch), gradients(expected.loss, batch), strict=True):
            torch.testing.assert_close(got, wanted, **precision(implementation)[2])


# Sparse


def top(batch: Batch, k: int, rest: bool = True) -> Sparse:
    """Return the k most probable tokens of the teacher, with the remaining mass or, without `rest`, renormalised."""
    q, ids = teacher_logprobs(batch, 1.5).exp().topk(k)
    if rest:
        return Sparse(ids, q, 1 - q.sum(2))
    return Sparse(ids, q / q.sum(2, keepdim=True))


def run_sparse(batch: Batch, implementation: str, sparse: Sparse, **options):
    return gated_distillation(
        batch.hidden, batch.weight, None, None, batch.target, padding_idx=PAD, student_bias=batch.bias,
        teacher_gold=gold(batch), teacher_sparse=sparse, implementation=implementation, **options,
    )  # fmt: skip


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_sparse_by_hand(implementation: str):
    # p = (1/2, 1/4, 1/4). Known of q: word 1 has 1/2, and the others together 1/2; under p they have 3/4:
    # KL = 1/2 log (1/2 / 1/4) + 1/2 log (1/2 / 3/4) = 1/2 log 2 + 1/2 log 2/3.
    # dz = p - (1/2 at word 1; elsewhere 1/2 p / (3/4)) = (1/2 - 1/3, 1/4 - 1/2, 1/4 - 1/6).
    p = torch.tensor([[[2.0, 1.0, 1.0]]]).log().requires_grad_()
    for rest, loss, gradient in (
        (0.5, 0.5 * math.log(2) + 0.5 * math.log(2 / 3), [1 / 6, -1 / 4, 1 / 12]),
        # Without a rest: draws, all of word 1; KL = -log 1/4 and dz = p - onehot.
        (None, math.log(4), [1 / 2, -3 / 4, 1 / 4]),
    ):
        q = torch.tensor([[[1.0 if rest is None else 0.5]]])
        sparse = Sparse(torch.tensor([[[1]]]), q, None if rest is None else torch.tensor([[rest]]))
        out = gated_distillation(
            p, torch.eye(3), None, None, torch.tensor([[0]]), padding_idx=9, implementation=implementation,
            teacher_gold=torch.tensor([[-2.0]]), teacher_sparse=sparse,
        )  # fmt: skip
        assert out.teacher_mask.item() is True
        assert out.loss.item() == pytest.approx(loss, abs=1e-6)
        assert out.gap.item() == pytest.approx(2 - math.log(2), abs=1e-6)
        torch.testing.assert_close(torch.autograd.grad(out.loss, p)[0][0, 0], torch.tensor(gradient), atol=1e-6, rtol=0)


@fast
@pytest.mark.parametrize("rest", [True, False], ids=["rest", "draws"])
@pytest.mark.parametrize("name", OF_SPARSE)
def test_sparse_against_eager(name: str, rest: bool, implementation: str, monkeypatch: pytest.MonkeyPatch):
    if name != "random":
        monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)
    dtype, near, tolerance = precision(implementation)
    batch = make(dtype=dtype)
    sparse = top(batch, 7, rest)
    if not rest:  # for some tokens fewer are known, and the entropy is given
        none = torch.arange(7)[None, None] > batch.target[..., None] % 7
        ids = torch.where(none, sparse.ids[..., :1], sparse.ids)
        q = sparse.probability.masked_fill(none, 0)
        sparse = Sparse(ids, q / q.sum(2, keepdim=True), entropy=torch.rand(batch.target.shape, dtype=dtype))
    options = {"gate": name, "confidence_penalty": 0.3, "label_smoothing": 0.1, "top1": True}
    found = []
    for one in ("eager", implementation):
        torch.manual_seed(0)
        found.append(run_sparse(batch, one, sparse, **options))
    for part in SUMS:
        wanted = getattr(found[0], part).item()
        assert getattr(found[1], part).item() == pytest.approx(wanted, rel=10 * near, abs=10 * near)
    for wanted, got in zip(*[gradients(out.loss, batch) for out in found], strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_all_but_one_token_is_the_whole_teacher(implementation: str):
    """A rest of one token is that token: loss and gradients equal those of the dense teacher."""
    dtype, near, tolerance = precision(implementation)
    batch = make(dtype=dtype)
    dense, sparse = run(batch, implementation), run_sparse(batch, implementation, top(batch, 122))
    assert sparse.loss.item() == pytest.approx(dense.loss.item(), rel=10 * near)
    for got, wanted in zip(gradients(sparse.loss, batch), gradients(dense.loss, batch), strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)


def test_draws_are_unbiased():
    """Over 4,000 times 50 draws the mean gradient and, given the entropy of q, the mean KL equal those of the dense
    teacher within four standard errors; the gradient of the top 8 tokens does not."""
    batch, times = make((3,), 3, dtype=torch.float64), 4000
    logq = teacher_logprobs(batch, 1.5)[0]  # (3, V)
    entropy = -(logq.exp() * logq).sum(1)
    dense = run(batch, "eager", gate="always")
    (expected,) = torch.autograd.grad(dense.loss, batch.hidden)
    generator = torch.Generator().manual_seed(0)
    draws = torch.multinomial(logq.exp(), 50 * times, replacement=True, generator=generator).view(3, times, 50)
    hidden = batch.hidden.detach().expand(times, 3, -1).requires_grad_()
    shares = torch.full((times, 3, 50), 1 / 50, dtype=torch.float64)
    sparse = Sparse(draws.transpose(0, 1), shares, None, entropy.expand(times, 3))
    teacher = [batch.teacher_hidden[0].expand(times, 3, -1)]
    many = batch._replace(hidden=hidden, target=batch.target.expand(times, 3), teacher_hidden=teacher)
    out = run_sparse(many, "eager", sparse, gate="always")
    (found,) = torch.autograd.grad(out.loss, hidden)  # (times, 3, D)
    for values, wanted in ((found, expected[0]), (out.results.kl.view(times, 3).sum(1), dense.loss.detach())):
        error = (values.mean(0) - wanted).abs() / (values.std(0) / times**0.5)
        assert error.max() < 4
        assert (values.std(0) > 0).all()
    (biased,) = torch.autograd.grad(run_sparse(batch, "eager", top(batch, 8), gate="always").loss, batch.hidden)
    assert (biased - expected).abs().max() > 4 * (found.std(0) / times**0.5).max()


REFUSED = {
    "gold of another shape": ({"teacher_gold": torch.zeros(2, 2)}, "teacher_gold is (2, 2) and target (1, 3)"),
    "no gold": ({"teacher_sparse": 3, "teacher_hidden": None}, "needs teacher_gold"),
    "two teachers": ({"teacher_sparse": 3, "teacher_gold": torch.zeros(1, 3)}, "are two teachers"),
    "entropy alone": ({"teacher_entropy": torch.zeros(1, 3), "gate": "typical"}, "teacher_entropy needs teacher_gold"),
    "entropy of another shape": (
        {"teacher_gold": torch.zeros(1, 3), "teacher_entropy": torch.zeros(2, 2), "gate": "typical"},
        "teacher_entropy is (2, 2) and target (1, 3)",
    ),
    "no entropy": (
        {"teacher_sparse": 3, "teacher_gold": torch.zeros(1, 3), "teacher_hidden": None, "gate": "typical"},
        'gate "typical" asks for what a sparse teacher does not say',
    ),
    "argmax": ({"teacher_sparse": 3, "teacher_gold": torch.zeros(1, 3), "gate_on": "argmax"}, 'not the "argmax"'),
    "another divergence": (
        {"teacher_sparse": 3, "teacher_gold": torch.zeros(1, 3), "divergence": "js"},
        'the divergence is "kl", not "js"',
    ),
    "lengths": ({"lengths": [2]}, "lengths are [2] and target has [3] tokens"),
    "all tokens": (
        {"teacher_sparse": 123, "teacher_gold": torch.zeros(1, 3), "teacher_hidden": None},
        "has 123 tokens of a vocabulary of 123",
    ),
}


def test_a_sparse_teacher_of_other_shapes():
    batch = make((3,), 3)
    sparse = top(batch, 7)
    fewer = sparse._replace(probability=sparse.probability[..., :6])
    flat = sparse.map(lambda part: part.flatten(1))
    wide = sparse._replace(rest=torch.zeros(1, 3, 1))  # would be broadcast to a wrong loss
    for other in (fewer, sparse.map(lambda part: part[:, :2]), flat, wide):
        with pytest.raises(ValueError, match=r"teacher_sparse is \[\(1, .* and target \(1, 3\)"):
            run_sparse(batch, "eager", other)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str):
    options, message = REFUSED[name]
    batch = make((3,), 3)
    if isinstance(options.get("teacher_sparse"), int):
        options = {**options, "teacher_sparse": top(batch, options["teacher_sparse"])}
    arguments = {
        "student_hidden": batch.hidden, "student_weight": batch.weight, "target": batch.target,
        "teacher_hidden": batch.teacher_hidden, "teacher_weight": batch.teacher_weight,
    } | options  # fmt: skip
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its text is compared
        gated_distillation(**arguments)
    assert message in str(caught.value)


def test_a_gate_that_asks_is_refused_of_a_sparse_teacher():
    batch = make()
    with pytest.raises(ValueError, match='gate "expected" asks for what a sparse teacher does not say'):
        run_sparse(batch, "eager", top(batch, 7, True), gate="expected")
