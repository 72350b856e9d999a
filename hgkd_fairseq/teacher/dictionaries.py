"""A teacher whose dictionaries hold all symbols of the student's, in any order, and others: its own ids go into it, and
of its output layer the rows of the student's symbols are taken. The softmax over those is the teacher's distribution
renormalised; what it gave to other symbols is lost.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence

import torch
from fairseq.data import Dictionary
from torch import Tensor

from hgkd_fairseq.loss import Head
from hgkd_fairseq.loss.eager import logits
from hgkd_fairseq.teacher.signals import Dense

logger = logging.getLogger(__name__)

SPECIAL = ("bos", "pad", "eos", "unk")
ROWS = 256  # of the vocabulary's width that are alive at a time
# Of the teacher's probability: what remains is divided by 0.95, which is 0.07 bits a token, as much as the methods of
# scripts/study/results differ by.
MOST_LOST = 0.05
# Of the tokens: pieces that another segmentation made are unknown to a dictionary more often than a rare symbol is.
MOST_UNKNOWN = 0.01


def difference(teacher: Dictionary, student: Dictionary) -> str | None:
    """Why the student's symbols are no part of the teacher's; None where they are."""
    for name in SPECIAL:
        theirs, ours = (one.symbols[getattr(one, name)()] for one in (teacher, student))
        if theirs != ours:
            return f"{name} is {theirs!r} for the teacher and {ours!r} for the student"
    for index, symbol in enumerate(student.symbols):
        if symbol not in teacher.indices:
            return (
                f"type {index} of the student's, {symbol!r}, is none of the teacher's (the teacher's has "
                f"{len(teacher)} types, the student's {len(student)})"
            )
    return None


def ids(teacher: Dictionary, student: Dictionary) -> Tensor | None:
    """(V,) the teacher's id of each of the student's symbols, all of which it has; None where the ids are the same."""
    same = all(getattr(teacher, name)() == getattr(student, name)() for name in SPECIAL)
    if same and teacher.symbols == student.symbols:
        return None
    return torch.tensor([teacher.indices[symbol] for symbol in student.symbols])


class Selection:
    """What a student's dictionaries select of a model with others.

    Args:
        source, target: (V,) the model's id of each of the student's, as `ids` gives them; None: the same.
    """

    def __init__(self, source: Tensor | None, target: Tensor | None):
        self.source, self.target = source, target
        self._layer: tuple[Tensor, Head] | None = None  # a weight and what was selected of it

    @property
    def fingerprint(self) -> str:
        """Of the ids; "" where both are the same."""
        if self.source is None and self.target is None:
            return ""
        parts = [b"" if one is None else one.cpu().numpy().tobytes() for one in (self.source, self.target)]
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]

    def inputs(self, net_input: dict) -> dict:
        """A batch's ``net_input`` with the model's ids in place of the student's."""
        found = dict(net_input)
        for name, side in (("src_tokens", "source"), ("prev_output_tokens", "target")):
            if (of_side := getattr(self, side)) is not None:
                of_side = of_side.to(found[name].device)
                setattr(self, side, of_side)  # moved for the first batch
                found[name] = of_side[found[name]]
        return found

    @torch.no_grad()
    def head(self, whole: Head) -> Head:
        """The student's rows of the model's output layer, or columns of its log-probabilities."""
        if self.target is None:
            return whole
        rows = self.target.to(whole.hidden.device)
        if whole.weight is None:
            return Head(whole.hidden[..., rows], None)
        weight = whole.weight.detach()  # of the parameter, whose storage may become another
        kept = self._layer
        if kept is None or kept[0].data_ptr() != weight.data_ptr() or kept[0].dtype != weight.dtype:
            bias = None if whole.bias is None else whole.bias[rows]
            kept = self._layer = weight, Head(whole.hidden[:0], weight[rows], bias)
        return kept[1]._replace(hidden=whole.hidden)


@torch.no_grad()
def lost_mass(signal: Dense, kept: Tensor) -> Tensor:
    """(N,) probability at temperature 1, mean of an ensemble's members, that the teacher gives to symbols which the
    student does not have, before each of the N target tokens where `kept` (B, T) is True."""
    lost = [
        torch.zeros(int(kept.sum()), device=kept.device)
        if whole.vocabulary == head.vocabulary
        else 1 - (log_sums(head, kept) - log_sums(whole, kept)).exp()
        for head, whole in zip(signal.heads, signal.whole, strict=True)
    ]
    return torch.stack(lost).mean(0).clamp(min=0)


def log_sums(head: Head, kept: Tensor) -> Tensor:
    """(N,) log-sum-exp of the logits of the kept tokens."""
    rows = head.hidden[kept]
    return torch.cat([logits(head._replace(hidden=some)).logsumexp(1) for some in rows.split(ROWS)] or [rows[:, 0]])


def report(signals: Sequence[tuple[dict, Dense]], source: Dictionary, target: Dictionary) -> None:
    """Log, of a sample of the training data, what can be told of a pruned dictionary, and warn of one that loses much.

    Args:
        signals: batches, and what the teacher says of them.
        source, target: the student's dictionaries.
    """
    lost = float(torch.cat([lost_mass(signal, one["target"] != target.pad()) for one, signal in signals]).mean())
    unknown = []
    for side, dictionary in enumerate((source, target)):
        both = [(one["net_input"]["src_tokens"], one["target"])[side].flatten() for one, _ in signals]
        tokens = torch.cat(both)
        unknown.append(float((tokens[tokens != dictionary.pad()] == dictionary.unk()).float().mean()))
    logger.info(
        "the teacher's dictionary has symbols that the student's lacks: on a sample of the training set they have %.4f "
        "of its probability (teacher_lost_mass); %.2f %% of the source's and %.2f %% of the target's tokens are "
        "unknown to the student",
        lost, *[100 * share for share in unknown],
    )  # fmt: skip
    if lost > MOST_LOST:
        logger.warning(
            "the teacher gives %.1f %% of its probability to symbols that the student's dictionary lacks, more than "
            "%g %%: the student learns another distribution; keep more symbols",
            *(100 * lost, 100 * MOST_LOST),
        )
    if max(unknown) > MOST_UNKNOWN:
        logger.warning(
            "%.1f %% of a side's tokens are unknown to the student's dictionary, more than %g %%: segment the data "
            "with the teacher's pieces, and keep those that occur",
            *(100 * max(unknown), 100 * MOST_UNKNOWN),
        )
