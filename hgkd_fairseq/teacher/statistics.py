"""What is kept of a teacher's distributions: of each token the gold statistics, and as the kind of the store has it the
hidden state, draws or the most probable tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hgkd_fairseq.loss import Head
from hgkd_fairseq.loss.eager import logits, mean_logprobs
from hgkd_fairseq.plugin import features
from hgkd_fairseq.teacher.store import DTYPES

ROWS = 256  # of the vocabulary's width that are alive at a time
DISTINCT, REPEATED = 0.61, 0.06  # of each draw, about: of a teacher of Multi30K at temperature 1.5
DRAWN = {"ids": "distinct", "counts": "repeated"}  # of the kind "sampled": how many of them a token has
LEAST = -1e4  # of a log-probability whose probability is 0, which contributes nothing to the entropy


def bytes_a_token(options: Any, models: Sequence, vocabulary: int) -> float:
    """About; of `options` see storing.StoreOptions."""
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
    """Of N tokens; `heads` with hidden (N, D). Of the kind "sampled" see :func:`draws`."""
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
    """(C,) the entry of each row."""
    return values.gather(1, index[:, None]).squeeze(1)


def draws(q: Tensor, count: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Of `count` draws from each row of q (C, V): the distinct ids of a row, those drawn more than once first, one row
    behind another; how often those were drawn; and how many of both a row has.

    An unbiased estimate of q, as that of random sampling KD (Anshumann et al., ACL 2025, arXiv:2503.16870), whose draws
    are independent. These are systematic: at equal distances of the cumulative distribution, from a random start. A
    token is drawn count * q times but for less than one. 32 such draws have a smaller error than 50 independent ones.
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
