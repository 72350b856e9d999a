"""The terms of the loss as functions of log-probabilities (N, V) in fp32 or fp64, differentiable by autograd.

`eager` sums these terms; so does `rows.autograd_step`, one chunk at a time, for options that no kernel supports. For
the divergence "kl", the rows in plain torch, C and Triton compute the same faster and are tested against these terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq.loss.options import JSD_BETA, SKEW_ALPHA, Options, Sparse


def data_term(logp: Tensor, target: Tensor, options: Options) -> Tensor:
    """Return the data term, (N,) nats: cross-entropy with fairseq's label smoothing eps and a confidence penalty beta.

    It is (1 - eps - eps_i) * -log p(gold) + eps_i * sum_v -log p(v) - beta H(p) with eps_i = eps / (V - 1). The
    confidence penalty is that of Pereyra et al. (2017, arXiv:1701.06548).
    """
    gold_weight, every_weight = options.gold_weight(logp.size(1))
    term = -gold_weight * logp.gather(1, target[:, None]).squeeze(1)
    if every_weight:
        term = term - every_weight * logp.sum(1)
    if options.confidence_penalty:
        term = term - options.confidence_penalty * -expectation(logp, logp)
    return term


def uniform_term(logp: Tensor) -> Tensor:
    """Return the cross-entropy with the uniform distribution, -1/V sum_v log p(v), (N,) nats."""
    return -logp.mean(1)


def expectation(logw: Tensor, values: Tensor) -> Tensor:
    """Return sum_v w(v) values(v), (N,), from log w and values, (N, V) each; a term is 0 where w(v) underflows to 0."""
    w = logw.exp()
    return (w * torch.where(w > 0, values, torch.zeros_like(w))).sum(1)  # 0 * inf and its gradient are nan


def weighted(weight: Tensor, divergence: Tensor) -> Tensor:
    """Return `weight` times `divergence`, (N,), and 0 where the weight is 0 even if the divergence is infinite.

    The divergence is infinite if the student excludes, by a bias of minus infinity, a token that the teacher allows.
    """
    return torch.where(weight != 0, weight * divergence, torch.zeros_like(divergence))


def above(logp: Tensor, logq: Tensor) -> Tensor:
    """Return sum_v p(v) 1[p(v) > q(v)], (N,): the student's mass on the tokens with p(v) > q(v)."""
    return (logp.exp() * (logp > logq)).sum(1)


# The statistics that a gate may request, `hgkd_fairseq.gates.contract.ASKED`: functions of log p and log q, (N, V)
# each, that return (N,).
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "student_above": above,
    "student_entropy": lambda logp, logq: -expectation(logp, logp),
    "teacher_entropy": lambda logp, logq: -expectation(logq, logq),
}


def drawn(logp: Tensor) -> Tensor:
    """Sample a token from each row of log-probabilities (N, V), by inverting its cumulative sums; (N,) int64."""
    sums = logp.exp().cumsum(1)
    u = torch.rand((len(logp), 1), dtype=logp.dtype, device=logp.device)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True).squeeze(1).clamp(max=logp.size(1) - 1)


class Divergence(NamedTuple):
    """A divergence of the student's distribution p from the teacher's q."""

    of: Callable[..., Tensor]  # function of log p, log q, (N, V) each, and the parameter if any; returns (N,) nats
    equation: str
    parameter: str | None = None  # the field of Options that has the parameter's value


DIVERGENCES: dict[str, Divergence] = {}


def register_divergence(name: str, equation: str, parameter: str | None = None) -> Callable:
    """Return a decorator that registers a divergence under `name`, a value of the option ``divergence``.

    The decorated function takes log p and log q, (N, V) each, and returns (N,) nats. `parameter` names a field of
    :class:`Options`, whose value is passed as a third argument.

    Raises:
        ValueError: the name is registered already.
    """

    def register(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in DIVERGENCES:
            raise ValueError(f'a divergence named "{name}" is registered already; choose another name')
        DIVERGENCES[name] = Divergence(of, equation, parameter)
        return of

    return register


def divergence(logp: Tensor, logq: Tensor, options: Options) -> Tensor:
    """Return the divergence that the options select, (N,) nats, from log p and log q, (N, V) each."""
    found = DIVERGENCES[options.divergence]
    return found.of(logp, logq) if found.parameter is None else found.of(logp, logq, getattr(options, found.parameter))


@register_divergence("kl", "KL(q || p) = sum_v q (log q - log p)")
def kl(logp: Tensor, logq: Tensor) -> Tensor:
    return expectation(logq, logq - logp)


@register_divergence("reverse-kl", "KL(p || q) = sum_v p (log p - log q)")
def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return expectation(logp, logp - logq)


def mixture(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """Return log(share q + (1 - share) p), (N, V), for 0 <= share < 1; finite for a share above 0 even if p = q = 0."""
    if not share:
        return logp
    neither = logp.isneginf() & logq.isneginf()  # of no weight, but the gradient would be nan
    return torch.logaddexp(logp.masked_fill(neither, 0) + math.log(1 - share), logq + math.log(share))


@register_divergence("js", "(KL(q || m) + KL(p || m)) / 2, m = (p + q) / 2")
def js(logp: Tensor, logq: Tensor) -> Tensor:
    return jsd(logp, logq, 0.5)


@register_divergence("jsd", "b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p (--jsd-beta b)", "jsd_beta")
def jsd(logp: Tensor, logq: Tensor, beta: float = JSD_BETA) -> Tensor:
    """Return the generalised Jensen-Shannon divergence, (N,) nats: GKD, Agarwal et al., ICLR 2024, arXiv:2306.13649.

    As in the paper, it is not scaled: it tends to 0 as b tends to 0 or to 1. Divided by b it tends to KL(q || p) as b
    tends to 0, and divided by 1 - b to KL(p || q) as b tends to 1. As in TRL's GKDTrainer, these two limits are the
    values at b = 0 and b = 1.
    """
    if beta in (0, 1):
        return reverse_kl(logp, logq) if beta else kl(logp, logq)
    logm = mixture(logp, logq, beta)
    return beta * expectation(logq, logq - logm) + (1 - beta) * expectation(logp, logp - logm)


@register_divergence("skew-kl", "KL(q || a q + (1 - a) p) (--skew-alpha a)", "skew_alpha")
def skew_kl(logp: Tensor, logq: Tensor, alpha: float = SKEW_ALPHA) -> Tensor:
    """Return the skew KL of DistiLLM, (N,) nats (Ko et al., ICML 2024, arXiv:2402.03898); at a = 0 it is the KL."""
    return expectation(logq, logq - mixture(logp, logq, alpha))


def sparse_kl(logp: Tensor, sparse: Sparse) -> Tensor:
    """Return KL(q || p), (N,) nats, for a teacher of which K tokens are known.

    It is sum_k q_k (log q_k - log p_k), plus, with a rest r, r (log r - log sum_others p): all other tokens are one
    bucket. If q are relative frequencies of sampled tokens (Anshumann et al., ACL 2025, arXiv:2503.16870), the gradient
    is an unbiased estimate of that of the full KL, and so is the value if the entropy of the full q is given.
    """
    others = None
    if sparse.rest is not None:
        others = logp.scatter(1, sparse.ids, -math.inf).logsumexp(1)
    return sparse_kl_of(logp.gather(1, sparse.ids), others, sparse)


def sparse_kl_of(logp: Tensor, others: Tensor | None, sparse: Sparse) -> Tensor:
    """Return `sparse_kl` from log p of the known tokens (N, K) and of all other tokens together (N,)."""
    q, r = sparse.probability, sparse.rest
    cross = -(q * torch.where(q > 0, logp, torch.zeros_like(logp))).sum(1)
    entropy = -torch.special.xlogy(q, q).sum(1)
    if r is not None and others is not None:
        cross = cross - r * torch.where(r > 0, others, torch.zeros_like(others))
        entropy = entropy - torch.special.xlogy(r, r)
    return cross - (entropy if sparse.entropy is None else sparse.entropy)
