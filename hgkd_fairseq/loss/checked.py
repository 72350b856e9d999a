"""Checks of the arguments of the loss."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hgkd_fairseq.loss.options import FUSED, FUSED_ASKS, Head, Known, Options, Sparse


def teacher_heads(hidden, weight, bias, options: Options) -> list[Head]:
    if not options.gate.needs_teacher:
        return []
    if hidden is None:
        raise ValueError(f'gate "{options.gate.name}" needs a teacher, but teacher_hidden is None')
    if isinstance(hidden, Tensor):
        hidden, weight, bias = [hidden], [weight], [bias]
    weight = [None] * len(hidden) if weight is None else weight
    bias = [None] * len(hidden) if bias is None else bias
    if not len(hidden) == len(weight) == len(bias) > 0:
        raise ValueError(
            f"an ensemble needs one teacher_hidden, teacher_weight and teacher_bias a member, "
            f"not {len(hidden)}, {len(weight)} and {len(bias)}"
        )
    return [Head(*member) for member in zip(hidden, weight, bias, strict=True)]


def known(
    gold: Tensor | None, sparse: Sparse | None, student: Tensor | None, entropy: Tensor | None, options: Options
) -> Known:
    """Return the given values that the loss can use: none of the teacher's without a teacher.

    If the gate reads another token than the gold one, `gold` and `entropy` are ignored.

    Raises:
        ValueError: a value lacks another one that it needs, or does not provide what gate and divergence read.
    """
    if student is not None and (options.gate_on != "gold" or options.gate.asks):
        raise ValueError("student_logprob is of the gold token: with it a gate reads no other and asks for nothing")
    if not options.gate.needs_teacher:
        return Known(student=student)
    for name, given in (("teacher_sparse", sparse), ("teacher_entropy", entropy)):
        if given is not None and gold is None:
            raise ValueError(f"{name} needs teacher_gold, the log-probabilities of the gold tokens")
    asks = set(options.gate.asks)
    if sparse is not None and asks and (entropy is None or asks - FUSED_ASKS):
        raise ValueError(f'gate "{options.gate.name}" asks for what a sparse teacher does not say')
    if sparse is not None and (options.gate_on != "gold" or options.divergence != FUSED):
        raise ValueError(
            f'of a sparse teacher a gate reads the gold token, not the "{options.gate_on}", and the divergence is '
            f'"{FUSED}", not "{options.divergence}"'
        )
    if options.gate_on != "gold":
        return Known(None, sparse, student)
    return Known(gold, sparse, student, entropy if "teacher_entropy" in asks else None)


def known_shapes(known: Known, target: Tensor, vocabulary: int) -> None:
    for name, given in (
        ("teacher_gold", known.gold),
        ("student_logprob", known.student),
        ("teacher_entropy", known.entropy),
    ):
        if given is not None and given.shape != target.shape:
            raise ValueError(f"{name} is {tuple(given.shape)} and target {tuple(target.shape)}")
    if known.sparse is not None:
        sizes = [tuple(part.shape) for part in known.sparse if part is not None]
        ids, probability, *others = sizes
        if len(ids) != 3 or ids != probability or any(one != target.shape for one in (ids[:2], *others)):
            raise ValueError(f"teacher_sparse is {sizes} and target {tuple(target.shape)}")
        if known.sparse.ids.size(2) >= vocabulary:
            raise ValueError(f"teacher_sparse has {known.sparse.ids.size(2)} tokens of a vocabulary of {vocabulary}")


def shapes(student: Head, teachers: Sequence[Head], target: Tensor) -> None:
    for name, head in [("student", student), *[("teacher", teacher) for teacher in teachers]]:
        if head.hidden.dim() != 3 or head.hidden.shape[:2] != target.shape:
            raise ValueError(
                f"{name}_hidden is {tuple(head.hidden.shape)} and target {tuple(target.shape)}; "
                "they must be (batch, length, dimension) and (batch, length)"
            )
        if head.weight is not None and head.weight.size(1) != head.hidden.size(2):
            raise ValueError(
                f"{name}_weight {tuple(head.weight.shape)} does not fit {name}_hidden {tuple(head.hidden.shape)}"
            )
        if head.vocabulary != student.vocabulary:
            raise ValueError(f"the vocabularies differ: student {student.vocabulary}, teacher {head.vocabulary} tokens")
