"""Computes what a store keeps of a teacher's distribution for each target token: the statistics of the gold token and,
depending on the store's kind, the hidden state, draws or the most probable tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hgkd_fairseq.loss import Head
from hgkd_fairseq.loss.eager import logits, mean_logprobs
from hgkd_fairseq.plugin import features
from hgkd_fairseq.teacher.store import DTYPES

ROWS = 256  # number of tokens whose logits are in memory at the same time
# Approximate numbers of distinct ids and of repeated ids per draw, for a teacher of Multi30K at temperature 1.5.
DISTINCT, REPEATED = 0.61, 0.06
DRAWN = {"ids": "distinct", "counts": "repeated"}  # kind "sampled": the array with the number of each per token
LEAST = -1e4  # replaces log 0 in the entropy, where 0 * -inf would be NaN


def bytes_a_token(options: Any, models: Sequence, vocabulary: int) -> float:
    """Estimate the size of a store, in bytes per target token.

    Args:
        options: a `storing.StoreOptions`.
        models: the teacher's models.
        vocabulary: number of the student's target symbols.
    """
    id_bytes = 2 if vocabulary <= 2**16 else 4
    layers = [features.linear_output(model) for model in models]
    kinds = {
        "hidden": sum(layer.in_features for layer in layers if layer is not None) * DTYPES[options.dtype].itemsize,
        "sampled": 2 + options.draws * (DISTINCT * id_bytes + REPEATED),
        "topk": options.tokens * (id_bytes + 4) + 4,
        "gold": 0,
    }
    return 12 + kinds[options.kind]


def of_rows(heads: list[Head], gold: Tensor, options: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Compute the arrays of a store for N tokens.

    Args:
        heads: one head per member of the teacher, hidden (N, D).
        gold: (N,) int64, target tokens.
        options: a `storing.StoreOptions`.
        generator: random generator on the heads' device, for the kind "sampled".

    Returns:
        Tensors on the CPU, by the names of the arrays: "gold" (N, 3) fp32, the three tensors of `signals.Gold` in nats;
        for the kind "hidden" one "hidden-MEMBER" (N, D) per member; for "topk" "ids" and "logprobs" (N, k) and "rest"
        (N,); for "sampled" what :func:`draws` returns.
    """
    parts = []
    for start in range(0, len(gold), ROWS):
        rows = slice(start, start + ROWS)
        some = [head._replace(hidden=head.hidden[rows]) for head in heads]
        parts.append(of_chunk(some, gold[rows], options, generator))
    found = {name: torch.cat([part[name] for part in parts]).cpu() for name in parts[0]}
    if options.kind == "hidden":
        wanted = DTYPES[options.dtype]
        found |= {f"hidden-{member}": head.hidden.to(wanted).cpu() for member, head in enumerate(heads)}
    return found


def of_chunk(heads: list[Head], gold: Tensor, options: Any, generator: torch.Generator) -> dict[str, Tensor]:
    if len(heads) == 1:
        z = logits(heads[0])  # (C, V)
        plain = at(z, gold) - z.logsumexp(1)
        logq = torch.log_softmax(z / options.temperature, dim=1)
    else:
        logq = mean_logprobs(heads, options.temperature)
        plain = at(mean_logprobs(heads, 1.0), gold)
    q = logq.exp()
    found: dict[str, Tensor] = {}
    if options.kind == "sampled":
        found |= draws(q, options.draws, generator)
    if options.kind == "topk":
        logprobs, ids = logq.topk(options.tokens, dim=1)
        rest = logq.scatter(1, ids, -torch.inf).logsumexp(1)
        found |= {"ids": ids, "logprobs": logprobs.float(), "rest": rest.float()}
    tempered = at(logq, gold)
    entropy = -q.mul_(logq.clamp_(min=LEAST)).sum(1)
    return found | {"gold": torch.stack([plain, tempered, entropy], 1).float()}


def at(values: Tensor, index: Tensor) -> Tensor:
    """Select one entry of each row: values (C, V), index (C,) -> (C,)."""
    return values.gather(1, index[:, None]).squeeze(1)


def draws(q: Tensor, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Draw `count` tokens from each row of q (C, V) by systematic sampling.

    The shares of the draws are an unbiased estimate of q, as in random sampling KD (Anshumann et al., ACL 2025,
    arXiv:2503.16870), which draws independently. Here the draws are at equal distances of the cumulative distribution,
    from a random start, so that the number of draws of a token differs from count * q by less than one. 32 such draws
    have a smaller error than 50 independent ones.

    Returns:
        "ids" (E,): the distinct ids of each row, one row after another; within a row, those drawn more than once come
        first. "counts" (R,): how often each of the latter was drawn. "distinct" (C,) and "repeated" (C,): the number of
        ids and of counts of each row.
    """
    ends = q.cumsum(1, dtype=torch.float64)
    start = torch.rand((len(q), 1), generator=generator, dtype=torch.float64, device=q.device)
    points = (torch.arange(count, device=q.device) + start) / count * ends[:, -1:]  # (C, count)
    drawn = torch.searchsorted(ends, points, right=True).clamp_(max=q.size(1) - 1)
    new = torch.ones_like(drawn, dtype=torch.bool)
    new[:, 1:] = drawn[:, 1:] != drawn[:, :-1]
    starts = new.flatten().nonzero().squeeze(1)
    counts = torch.cat([starts[1:], starts.new_tensor([drawn.numel()])]) - starts
    row, once = starts // count, counts == 1
    order = (2 * row + once).sort(stable=True).indices
    repeated = row[~once].bincount(minlength=len(q))
    return {
        "ids": drawn[new][order], "counts": counts[order][~once[order]], "distinct": new.sum(1), "repeated": repeated,
    }  # fmt: skip
