"""Support for teachers whose dictionaries contain all symbols of the student's dictionaries, in any order, and others.

The student's token ids are mapped to the teacher's, and only the rows of the teacher's output layer for the student's
symbols are used. The softmax over these rows is the teacher's distribution renormalised over the student's symbols; the
probability of all other symbols is lost.
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
ROWS = 256  # number of tokens whose logits are in memory at the same time
# Share of the teacher's probability above which a warning is logged. The remaining probabilities are then divided by
# 0.95, which changes a token's NLL by 0.07 bits: as much as the methods in scripts/study/results differ by.
MOST_LOST = 0.05
# Share of unknown tokens above which a warning is logged: with another segmentation, many more tokens are unknown than
# rare symbols alone would be.
MOST_UNKNOWN = 0.01


def difference(teacher: Dictionary, student: Dictionary) -> str | None:
    """Return why a teacher's dictionary cannot serve a student's, or None if it can.

    The teacher's dictionary must have the same special symbols and contain all symbols of the student's.
    """
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
    """Return the teacher's id of each of the student's V symbols, (V,) int64, or None if all ids are the same.

    Raises:
        KeyError: the teacher's dictionary lacks a symbol; check with :func:`difference` first.
    """
    same = all(getattr(teacher, name)() == getattr(student, name)() for name in SPECIAL)
    if same and teacher.symbols == student.symbols:
        return None
    return torch.tensor([teacher.indices[symbol] for symbol in student.symbols])


class Selection:
    """Maps the student's token ids to those of a model with other dictionaries, and its output layer back.

    Args:
        source, target: (V,) int64, the model's id of each of the student's symbols, as :func:`ids` returns them; None:
            the ids are the same.
    """

    def __init__(self, source: Tensor | None, target: Tensor | None):
        self.source, self.target = source, target
        self._layer: tuple[Tensor, Head] | None = None  # cache: an output weight, and the rows selected from it

    @property
    def fingerprint(self) -> str:
        """Hash of the two id mappings, 16 hexadecimal digits; "" if the ids are the same on both sides."""
        if self.source is None and self.target is None:
            return ""
        parts = [b"" if one is None else one.cpu().numpy().tobytes() for one in (self.source, self.target)]
        return hashlib.sha256(b"|".join(parts)).hexdigest()[:16]

    def inputs(self, net_input: dict) -> dict:
        """Return a copy of a batch's ``net_input`` with the model's token ids in place of the student's."""
        found = dict(net_input)
        for name, side in (("src_tokens", "source"), ("prev_output_tokens", "target")):
            if (of_side := getattr(self, side)) is not None:
                of_side = of_side.to(found[name].device)
                setattr(self, side, of_side)  # moved to the device once, for the first batch
                found[name] = of_side[found[name]]
        return found

    @torch.no_grad()
    def head(self, whole: Head) -> Head:
        """Restrict a head of the model to the student's V symbols.

        Args:
            whole: features (..., D) with the model's output layer, or log-probabilities over all of its symbols.

        Returns:
            The features with the student's rows of the output layer, or the student's columns of the log-probabilities;
            these are not renormalised.
        """
        if self.target is None:
            return whole
        rows = self.target.to(whole.hidden.device)
        if whole.weight is None:
            return Head(whole.hidden[..., rows], None)
        weight = whole.weight.detach()  # shares the parameter's storage, which may be replaced
        kept = self._layer
        if kept is None or kept[0].data_ptr() != weight.data_ptr() or kept[0].dtype != weight.dtype:
            bias = None if whole.bias is None else whole.bias[rows]
            kept = self._layer = weight, Head(whole.hidden[:0], weight[rows], bias)
        return kept[1]._replace(hidden=whole.hidden)


@torch.no_grad()
def lost_mass(signal: Dense, kept: Tensor) -> Tensor:
    """Return the probability that the teacher assigns to symbols that are not in the student's dictionary.

    The probabilities are at temperature 1 and, for an ensemble, averaged over its members.

    Args:
        signal: the teacher's output for a batch, with `whole`.
        kept: (B, T) bool, the N target tokens for which the probability is computed.

    Returns:
        (N,) probabilities, from 0 to 1.
    """
    lost = [
        torch.zeros(int(kept.sum()), device=kept.device)
        if whole.vocabulary == head.vocabulary
        else 1 - (log_sums(head, kept) - log_sums(whole, kept)).exp()
        for head, whole in zip(signal.heads, signal.whole, strict=True)
    ]
    return torch.stack(lost).mean(0).clamp(min=0)


def log_sums(head: Head, kept: Tensor) -> Tensor:
    """Return the log-sum-exp (N,) of the logits of the N tokens that `kept` (B, T) bool selects."""
    rows = head.hidden[kept]
    return torch.cat([logits(head._replace(hidden=some)).logsumexp(1) for some in rows.split(ROWS)])


def report(signals: Sequence[tuple[dict, Dense]], source: Dictionary, target: Dictionary) -> None:
    """Log how much a student's smaller dictionary loses on a sample of the training data, and warn if it is too much.

    The loss is measured by the teacher's probability of missing symbols (:func:`lost_mass`) and by the share of unknown
    tokens; the warnings start at `MOST_LOST` and `MOST_UNKNOWN`.

    Args:
        signals: pairs of a fairseq batch and the teacher's output for it; at least one.
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
