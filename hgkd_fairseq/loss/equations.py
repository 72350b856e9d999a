"""The terms of the loss, each written once, on log-probabilities (N, V) in fp32 or fp64. Autograd goes through them.

`eager` adds them up as they stand, and so does `rows.autograd_step`, a chunk at a time, for what no kernel knows. Plain
torch, C and Triton compute the same of the divergence "kl" faster, and are tested against these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq.loss.options import JSD_BETA, SKEW_ALPHA, Options, Sparse


def data_term(logp: Tensor, target: Tensor, options: Options) -> Tensor:
    """(N,) nats: (1 - eps - eps_i) * -log p(gold) + eps_i * sum_v -log p(v) - beta H(p), eps_i = eps / (V - 1).

    fairseq's label smoothing; the entropy bonus is Pereyra et al.'s (2017, arXiv:1701.06548).
    """
    gold_weight, every_weight = options.gold_weight(logp.size(1))
    term = -gold_weight * logp.gather(1, target[:, None]).squeeze(1)
    if every_weight:
        term = term - every_weight * logp.sum(1)
    if options.confidence_penalty:
        term = term - options.confidence_penalty * -expectation(logp, logp)
    return term


def uniform_term(logp: Tensor) -> Tensor:
    """(N,) nats, the cross-entropy with the uniform distribution: -1/V sum_v log p(v)."""
    return -logp.mean(1)


def expectation(logw: Tensor, values: Tensor) -> Tensor:
    """(N,) sum_v w(v) values(v). Where w underflows to 0 its token contributes 0, whatever the value is."""
    w = logw.exp()
    return (w * torch.where(w > 0, values, torch.zeros_like(w))).sum(1)  # a product of 0 and inf has no gradient


def weighted(weight: Tensor, divergence: Tensor) -> Tensor:
    """(N,) their product; 0 where the weight is 0, also of a divergence that is infinite: of a token that the teacher
    allows and the student forbids, with a bias of minus infinity, and that a closed gate gives to the data."""
    return torch.where(weight != 0, weight * divergence, torch.zeros_like(divergence))


def above(logp: Tensor, logq: Tensor) -> Tensor:
    """(N,) sum_v p(v) 1[p(v) > q(v)]."""
    return (logp.exp() * (logp > logq)).sum(1)


# (log p, log q), (N, V) each -> (N,): what a gate may ask for, `hgkd_fairseq.gates.contract.ASKED`.
STATISTICS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "student_above": above,
    "student_entropy": lambda logp, logq: -expectation(logp, logp),
    "teacher_entropy": lambda logp, logq: -expectation(logq, logq),
}


def drawn(logp: Tensor) -> Tensor:
    """(N,) int64, a token of each distribution (N, V), drawn at random: of its cumulative sums the first above u."""
    sums = logp.exp().cumsum(1)
    u = torch.rand((len(logp), 1), dtype=logp.dtype, device=logp.device)
    return torch.searchsorted(sums, u * sums[:, -1:], right=True).squeeze(1).clamp(max=logp.size(1) - 1)


class Divergence(NamedTuple):
    """Of the student's distribution p from the teacher's q."""

    of: Callable[..., Tensor]  # (log p, log q), (N, V) each, and the parameter where there is one -> (N,) nats
    equation: str
    parameter: str | None = None  # a field of Options


DIVERGENCES: dict[str, Divergence] = {}


def register_divergence(name: str, equation: str, parameter: str | None = None) -> Callable:
    """Decorator: register a function (log p, log q) -> (N,) under the value that ``divergence`` takes; one with a
    parameter, a field of :class:`Options`, is given its value as a third argument.

    Raises:
        ValueError: the name is taken.
    """

    def register(of: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if name in DIVERGENCES:
            raise ValueError(f'a divergence named "{name}" is registered already; choose another name')
        DIVERGENCES[name] = Divergence(of, equation, parameter)
        return of

    return register


def divergence(logp: Tensor, logq: Tensor, options: Options) -> Tensor:
    """(N,) nats, the one of the options."""
    found = DIVERGENCES[options.divergence]
    return found.of(logp, logq) if found.parameter is None else found.of(logp, logq, getattr(options, found.parameter))


@register_divergence("kl", "KL(q || p) = sum_v q (log q - log p)")
def kl(logp: Tensor, logq: Tensor) -> Tensor:
    return expectation(logq, logq - logp)


@register_divergence("reverse-kl", "KL(p || q) = sum_v p (log p - log q)")
def reverse_kl(logp: Tensor, logq: Tensor) -> Tensor:
    return expectation(logp, logp - logq)


def mixture(logp: Tensor, logq: Tensor, share: float) -> Tensor:
    """(N, V) log(share q + (1 - share) p), for a share below 1; where both are 0, anything finite."""
    if not share:
        return logp
    neither = logp.isneginf() & logq.isneginf()  # counts for nothing, and has no gradient as it stands
    return torch.logaddexp(logp.masked_fill(neither, 0) + math.log(1 - share), logq + math.log(share))


@register_divergence("js", "(KL(q || m) + KL(p || m)) / 2, m = (p + q) / 2")
def js(logp: Tensor, logq: Tensor) -> Tensor:
    return jsd(logp, logq, 0.5)


@register_divergence("jsd", "b KL(q || m) + (1 - b) KL(p || m), m = b q + (1 - b) p (--jsd-beta b)", "jsd_beta")
def jsd(logp: Tensor, logq: Tensor, beta: float = JSD_BETA) -> Tensor:
    """The generalised Jensen-Shannon divergence of GKD (Agarwal et al., ICLR 2024, arXiv:2306.13649).

    As the paper has it, not scaled: it tends to 0 with b and with 1 - b, and over b to KL(q || p), over 1 - b to
    KL(p || q). These two stand at b = 0 and b = 1, as in TRL's GKDTrainer.
    """
    if beta in (0, 1):
        return reverse_kl(logp, logq) if beta else kl(logp, logq)
    logm = mixture(logp, logq, beta)
    return beta * expectation(logq, logq - logm) + (1 - beta) * expectation(logp, logp - logm)


@register_divergence("skew-kl", "KL(q || a q + (1 - a) p) (--skew-alpha a)", "skew_alpha")
def skew_kl(logp: Tensor, logq: Tensor, alpha: float = SKEW_ALPHA) -> Tensor:
    """The skew KL of DistiLLM (Ko et al., ICML 2024, arXiv:2402.03898); at a = 0 the KL itself."""
    return expectation(logq, logq - mixture(logp, logq, alpha))


def sparse_kl(logp: Tensor, sparse: Sparse) -> Tensor:
    """(N,) nats, KL(q || p) of a teacher of which K tokens are known: sum_k q_k (log q_k - log p_k), and with a rest r
    that of one bucket of all other tokens, r (log r - log sum_others p).

    Where q are shares of draws (Anshumann et al., ACL 2025, arXiv:2503.16870), the gradient is an unbiased estimate of
    that of the whole KL, and with the whole q's entropy so is the value.
    """
    others = None
    if sparse.rest is not None:
        others = logp.scatter(1, sparse.ids, -math.inf).logsumexp(1)
    return sparse_kl_of(logp.gather(1, sparse.ids), others, sparse)


def sparse_kl_of(logp: Tensor, others: Tensor | None, sparse: Sparse) -> Tensor:
    """The same, of log p at the known tokens (N, K) and of all others together (N,)."""
    q, r = sparse.probability, sparse.rest
    cross = -(q * torch.where(q > 0, logp, torch.zeros_like(logp))).sum(1)
    entropy = -torch.special.xlogy(q, q).sum(1)
    if r is not None and others is not None:
        cross = cross - r * torch.where(r > 0, others, torch.zeros_like(others))
        entropy = entropy - torch.special.xlogy(r, r)
    return cross - (entropy if sparse.entropy is None else sparse.entropy)
