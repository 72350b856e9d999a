"""Metrics for each language pair of a multilingual task, and the decisions of gate `pair` that depend on them."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor

from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.calibration.histogram import CORRECT, count, tabulate
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.gates.pairs import Pair
from hgkd_fairseq.loss import DistillationOutput
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.teacher import Signal

logger = logging.getLogger(__name__)

# Prefixes of keys of the logging outputs; the name of the pair follows.
SUMS, TABLE, TEACHER = "pair ", "calibration of pair ", "teacher of pair "
ROWS = 256  # tokens whose logits are in memory at a time


def of_tokens(out: DistillationOutput, sample: dict) -> Tensor:
    """Return the index (N,) of the language pair of each non-pad token."""
    return sample["pair"].to(out.rows.device)[out.rows // max(out.tokens_mask.size(1), 1)]


def sums(out: DistillationOutput, sample: dict, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the sums that are logged for each pair of a batch; those of several batches may be added.

    Args:
        out: output of the loss for the batch.
        sample: batch of fairseq, with "pair" (B,), the index of each sentence's pair.
        names: names of all pairs; if empty, the result is too.

    Returns:
        For each pair, also one that the batch does not contain, by prefix: `SUMS`, a tensor (3,) of the number of
        tokens, their summed NLL (nats) and their summed teacher share; `TABLE`, in validation only, the calibration
        table (3, bins).
    """
    if not names:
        return {}
    of_token, results = of_tokens(out, sample), out.results
    share = results.teacher_mask if results.teacher_share is None else results.teacher_share
    columns = torch.stack([torch.ones_like(results.nll), results.nll, share.to(results.nll.dtype)])
    summed = columns.new_zeros(3, len(names)).index_add_(1, of_token, columns)
    found = {f"{SUMS}{name}": summed[:, place] for place, name in enumerate(names)}
    if not torch.is_grad_enabled():
        assert results.confidence is not None
        assert results.correct is not None
        bins = CalibrationHistogram().bins
        tables = tabulate(results.confidence, results.correct, bins, group=of_token, groups=len(names))
        found |= {f"{TABLE}{name}": table for name, table in zip(names, tables, strict=True)}
    return found


@torch.no_grad()
def teacher_sums(
    signal: Signal, out: DistillationOutput, sample: dict, target: Tensor, names: Sequence[str]
) -> dict[str, Tensor]:
    """Return for each pair, by prefix `TEACHER`, its tokens and the number that the teacher predicts right, (2,).

    Args:
        signal: the teacher's view of the batch, with features (B, T, D).
        out: output of the loss for the batch.
        sample: batch of fairseq, with "pair" (B,).
        target: gold tokens (B, T), which are compared with the teacher's top-1 predictions.
        names: names of all pairs.
    """
    heads = [head._replace(hidden=head.hidden.flatten(0, 1)[out.rows]) for head in signal.heads]  # (N, D)
    gold, correct = target.flatten()[out.rows], []
    for start in range(0, len(gold), ROWS):
        rows = slice(start, start + ROWS)
        some = [head._replace(hidden=head.hidden[rows]) for head in heads]
        correct.append(mean_logprobs(some, 1.0).argmax(1) == gold[rows])
    right = torch.cat(correct).double() if correct else gold.double()
    columns = torch.stack([torch.ones_like(right), right])
    summed = columns.new_zeros(2, len(names)).index_add_(1, of_tokens(out, sample), columns)
    return {f"{TEACHER}{name}": summed[:, place] for place, name in enumerate(names)}


def reduce(key: str, total: Callable[[str], Tensor]) -> None:
    """Log the metrics of a key of the logging outputs if it has one of the prefixes above.

    Args:
        key: key of the logging outputs.
        total: returns the sum of all workers' values of a key.
    """
    if key.startswith(SUMS):
        name = key.removeprefix(SUMS)
        tokens, nll, share = total(key)
        metrics.log_scalar(f"{name}_nll_loss", nll / max(tokens, 1) / math.log(2), tokens, round=3)
        metrics.log_scalar(f"{name}_teacher_share", share / max(tokens, 1), tokens, round=4)
    elif key.startswith(TABLE):
        name, table = key.removeprefix(TABLE), total(key).cpu()
        tokens = float(count(table))
        accuracy = 100 * float(table[CORRECT].sum()) / max(tokens, 1)
        metrics.log_scalar(f"{name}_accuracy", accuracy, tokens, round=3)
        metrics.log_scalar(f"_calibration_{name}", table)
        metrics.log_derived(f"{name}_ece", functools.partial(ece, f"_calibration_{name}"))
    elif key.startswith(TEACHER):
        name = key.removeprefix(TEACHER)
        tokens, correct = total(key)
        metrics.log_scalar(f"{name}_teacher_accuracy", 100 * correct / max(tokens, 1), tokens, round=3)


def ece(table: str, meters: Any) -> float:
    return round(CalibrationHistogram(sums=meters[table].sum).ece(), 4)


def check(cfg: Any, names: Sequence[str]) -> None:
    """Check that gate `pair` can be used.

    Args:
        cfg: options of the criterion.
        names: names of the task's language pairs.

    Raises:
        UserError: if there are no language pairs or no validation.
    """
    if not names:
        raise UserError(
            "--gate pair is for several language pairs: add --task translation_multi_simple_epoch_with_teacher"
        )
    if cfg.disable_validation:
        raise UserError("--gate pair compares student and teacher in validation; drop --disable-validation")


def compare(pair: Pair, names: Sequence[str], subset: str, meters: Any) -> None:
    """Let the gate decide, after a validation, which pairs continue to learn from their teachers, and log it.

    Args:
        pair: the gate.
        names: names of the pairs, in the order of their indices.
        subset: name of the validated subset.
        meters: its meters, with the accuracies of student and teacher for each pair.
    """
    if any(f"{name}_teacher_accuracy" not in meters for name in names):  # no teacher yet, as with previous-epoch
        return
    student, teacher = (
        torch.tensor([float(meters[f"{name}_{whose}accuracy"].avg) for name in names]) for whose in ("", "teacher_")
    )
    pair.compare(student, teacher)
    told = ", ".join(
        f"{name} {'yes' if opened else 'no'} ({mine:.2f} %, teacher {theirs:.2f} %)"
        for name, opened, mine, theirs in zip(names, pair.state["open"], student, teacher, strict=True)
    )
    logger.info("gate pair, by accuracy on %s: learns from the teacher: %s", subset, told)
