"""The row step that evaluates the gate first, in plain torch.

The teacher's log-probabilities of the gold tokens are known in advance, so that the teacher's logits are computed only
for the rows to which the gate gives a teacher weight:

    z_s = h_s W_s^T,  log p of the gold tokens      gate      z_t = h_t W_t^T / tau of the rows with a teacher weight
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from hgkd_fairseq.gates import GateWeights
from hgkd_fairseq.loss import rows
from hgkd_fairseq.loss.options import Decide, Options, TokenResults

GatedStep = Callable[..., tuple[TokenResults, Tensor | None]]  # with the signature of gated_step


def gated_step(
    student_logits: Tensor,  # (C, V)
    teacher_logits: Callable[[Tensor | None], list[Tensor]],  # (G, V) each, of the rows with these indices (None: all)
    target: Tensor,  # (C,) int64
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    teacher_read: Tensor,  # (C,) nats, what the gate reads of the teacher
) -> tuple[TokenResults, Tensor | None]:
    """Compute what :func:`hgkd_fairseq.loss.rows.row_step` computes, with the gate evaluated first.

    In the results, `kl` is 0 in rows without a teacher weight. `teacher_read` is not the argument: it comes from the
    teacher's logits or, in rows without a teacher weight, is equal to `student_read`.
    """
    weights = decide
    if not isinstance(weights, GateWeights):
        weights = weights(gold_logprob(student_logits, target), teacher_read)
    open_ = weights.teacher != 0
    if bool(open_.all()):
        return rows.row_step(student_logits, teacher_logits(None), target, weights, options, gradient_scale)
    parts = []
    for places, some in ((~open_, options.without_teacher), (open_, options)):
        places = places.nonzero().squeeze(1)
        if not len(places):
            continue
        others = teacher_logits(places) if some is options else []
        here = GateWeights(*[None if part is None else part[places] for part in weights])  # type: ignore[arg-type]
        found = rows.row_step(student_logits[places], others, target[places], here, some, gradient_scale)
        parts.append((places, *found))
    columns = zip(*[found for _, found, _ in parts], strict=True)
    results = TokenResults(*[joined(parts, column) for column in columns])  # type: ignore[arg-type]
    return results, joined(parts, [dz for *_, dz in parts])


def gold_logprob(logits: Tensor, target: Tensor) -> Tensor:
    """Return log p of the gold tokens, (C,) nats, computed with the operations of `rows.row_statistics`."""
    z = rows.widen(logits)
    shifted = z - z.amax(1, keepdim=True)
    return rows.logprob(shifted, shifted.exp().sum(1).log(), target)


def joined(parts: list, values: Sequence[Tensor | None]) -> Tensor | None:
    """Merge values of the rows of each part into one tensor in the order of the rows; None if no part has values."""
    given = [value for value in values if value is not None]
    if not given:
        return None
    whole = given[0].new_empty(sum(map(len, given)), *given[0].shape[1:])
    for (places, *_), value in zip(parts, given, strict=True):
        whole[places] = value
    return whole
