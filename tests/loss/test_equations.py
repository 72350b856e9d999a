"""Tests of the terms of the loss at ties, at the ends of a distribution and at probabilities of 0."""

import math

import pytest
import torch

from hgkd_fairseq.gates import get_gate
from hgkd_fairseq.loss import DIVERGENCES, equations, gate_first
from hgkd_fairseq.loss.options import Options, Sparse

# Student and teacher: equal for the first type; then 0 for the student, for the teacher, for both and for none.
P = [0.2, 0.0, 0.3, 0.0, 0.5]
Q = [0.2, 0.4, 0.0, 0.0, 0.4]


def logs(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


def kl(q: list[float], p: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True) if a)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("js", {}, lambda m: (kl(Q, m(0.5)) + kl(P, m(0.5))) / 2),
        ("jsd", {"jsd_beta": 0.3}, lambda m: 0.3 * kl(Q, m(0.3)) + 0.7 * kl(P, m(0.3))),
        ("skew-kl", {"skew_alpha": 0.2}, lambda m: kl(Q, m(0.2))),
    ],
)
def test_divergences_of_distributions_with_zeros(name: str, options: dict, expected):
    def mixture(share: float) -> list[float]:
        return [share * q + (1 - share) * p for p, q in zip(P, Q, strict=True)]

    logp = logs(P).requires_grad_()
    found = equations.divergence(logp, logs(Q), Options(get_gate("token"), divergence=name, **options))
    assert found.item() == pytest.approx(expected(mixture), rel=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), logp)
    assert gradient.isfinite().all()


def test_defaults_of_the_divergences():
    logp, logq = logs(P), logs(Q)
    assert DIVERGENCES["jsd"].of(logp, logq).item() == DIVERGENCES["js"].of(logp, logq).item()
    assert DIVERGENCES["skew-kl"].of(logp, logq).item() == pytest.approx(
        equations.skew_kl(logp, logq, 0.1).item(), rel=1e-12
    )


def test_what_is_equal_is_not_above():
    assert equations.above(logs(P), logs(Q)).item() == pytest.approx(0.8)
    assert equations.above(logs(P), logs(P)).item() == 0


def test_drawn_to_the_last_type():
    torch.manual_seed(0)
    last = torch.full((500, 7), -torch.inf)
    last[:, 6] = 0
    assert (equations.drawn(last) == 6).all()
    # Rounded probabilities need not sum to 1: they are taken as shares of their sum.
    counts = equations.drawn(torch.tensor([[0.125, 0.375]]).log().expand(20_000, 2)).bincount()
    assert counts[1] / 20_000 == pytest.approx(0.75, abs=0.015)


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
def test_the_gold_tokens_logprob_of_large_logits(size: float):
    logits = size * torch.tensor([[1.0, 0.0, 1.0], [-1.0, -1.0, -3.0]])
    target = torch.tensor([2, 2])
    found = gate_first.gold_logprob(logits, target)
    torch.testing.assert_close(found, logits.double().log_softmax(1)[range(2), target].float())


def test_what_is_known_of_a_sparse_teacher_that_is_certain():
    """Known tokens and a rest of probability 0 contribute nothing, also where the student gives them probability 0."""
    logp = logs([0.25, 0.75, 0.0, 0.0])
    sparse = Sparse(torch.tensor([[1, 2]]), torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.zeros(1).double())
    assert equations.sparse_kl(logp, sparse).item() == pytest.approx(-math.log(0.75))
    nothing_else = Sparse(torch.tensor([[0, 1]]), logs([0.25, 0.75]).exp(), torch.zeros(1).double())
    assert equations.sparse_kl(logp, nothing_else).item() == pytest.approx(0, abs=1e-12)
