"""The metrics that the criterion logs; losses and log-probabilities are in bits, as fairseq's are.

loss            the objective, per unit of the sample size
nll_loss, ppl   plain cross-entropy of the student per token, comparable between methods, and its perplexity
kd_loss         mean divergence of the tokens with a teacher weight above 0
teacher_share   mean over the tokens of teacher weight / (data weight + teacher weight): with a hard gate, the share of
                the tokens that learn from the teacher
gap             mean log-probability of the token that the gate reads, under the student minus under the teacher
on_policy_loss  mean divergence of the tokens of the student's own translations, which only "loss" includes otherwise
on_policy_share  share of the tokens that are in these translations
accuracy        top-1 accuracy, in per cent, with --report-accuracy
ece             in validation: expected calibration error, a fraction (top-1, teacher-forced, including EOS)
teacher_lost_mass  in validation, if the teacher has symbols that the student lacks: their mean total probability

For each pair of a task with several language pairs: PAIR_nll_loss, PAIR_teacher_share and, in validation, PAIR_ece and
PAIR_accuracy; with gate `pair` also PAIR_teacher_accuracy.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from fairseq import utils
from fairseq.logging import metrics

from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.calibration.histogram import tabulate
from hgkd_fairseq.criterions import by_pair
from hgkd_fairseq.loss import DistillationOutput


def sums(out: DistillationOutput, sample: dict, sample_size: int, accuracy: bool) -> dict[str, Any]:
    """Return the sums that a worker logs for a batch; those of several batches may be added.

    Args:
        out: output of the loss for the batch.
        sample: batch of fairseq.
        sample_size: number that divides the gradient.
        accuracy: whether to include the number of correct top-1 predictions.
    """
    found = {
        "loss": out.loss.detach(),
        "nll_loss": out.nll,
        "kd_loss": out.kd,
        "gap": out.gap,
        "teacher_share": out.teacher_share,
        "teacher_tokens": out.teacher_tokens,
        "tokens": out.tokens,
        "ntokens": sample["ntokens"],
        "nsentences": sample["target"].size(0),
        "sample_size": sample_size,
    }
    if accuracy:
        assert out.correct is not None
        found["n_correct"] = out.correct.sum()
    if not torch.is_grad_enabled():
        assert out.confidence is not None
        assert out.correct is not None
        # Unlike CalibrationHistogram.update, tabulate accepts NaN: fairseq logs nan for a diverged run and continues.
        rows, bins = out.tokens_mask, CalibrationHistogram().bins
        found["calibration"] = tabulate(out.confidence[rows], out.correct[rows], bins)[0]
    return found


def own_sums(out: DistillationOutput, alone: DistillationOutput | None) -> dict[str, Any]:
    """Return the entries that on-policy distillation adds to :func:`sums`, or replaces in it.

    Args:
        out: output of the loss for the sentences with targets from the data.
        alone: the same for the student's own translations; None if the batch contains none.
    """
    if alone is None:
        return {"own_loss": torch.zeros_like(out.kd), "own_tokens": torch.zeros_like(out.tokens)}
    return {"loss": (out.loss + alone.loss).detach(), "own_loss": alone.kd, "own_tokens": alone.tokens}


def reduce(logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Log the metrics of the summed logging outputs of all workers and, with --update-freq, of several batches."""

    def total(key):
        return sum(log.get(key, 0) for log in logging_outputs)

    bits = 1 / math.log(2)
    sample_size, tokens, teacher_tokens = total("sample_size"), total("tokens"), total("teacher_tokens")
    metrics.log_scalar("loss", total("loss") / max(sample_size, 1) * bits, sample_size, round=3)
    metrics.log_scalar("nll_loss", total("nll_loss") / max(tokens, 1) * bits, tokens, round=3)
    metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
    metrics.log_scalar("kd_loss", total("kd_loss") / max(teacher_tokens, 1) * bits, teacher_tokens, round=3)
    metrics.log_scalar("teacher_share", total("teacher_share") / max(tokens, 1), tokens, round=4)
    metrics.log_scalar("gap", total("gap") / max(tokens, 1) * bits, tokens, round=3)
    if any("own_tokens" in log for log in logging_outputs):
        own = total("own_tokens")
        metrics.log_scalar("on_policy_loss", total("own_loss") / max(own, 1) * bits, own, round=3)
        metrics.log_scalar("on_policy_share", own / max(tokens + own, 1), tokens + own, round=4)
    if any("n_correct" in log for log in logging_outputs):
        metrics.log_scalar("accuracy", 100 * total("n_correct") / max(tokens, 1), tokens, round=3)
    for key in logging_outputs[0] if logging_outputs else ():
        by_pair.reduce(key, total)
    if any("teacher_lost_mass" in log for log in logging_outputs):
        metrics.log_scalar("teacher_lost_mass", total("teacher_lost_mass") / max(tokens, 1), tokens, round=4)
    if any("calibration" in log for log in logging_outputs):
        # The meter adds up the table; the ECE is derived from it when it is printed.
        metrics.log_scalar("_calibration", total("calibration").cpu())
        metrics.log_derived("ece", functools.partial(by_pair.ece, "_calibration"))
