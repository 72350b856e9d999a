"""What the criterion logs, in bits where fairseq's own losses are.

loss            the gated objective
nll_loss, ppl   the student's plain cross-entropy, comparable across methods
kd_loss         the divergence per token that has a teacher weight above 0
teacher_share   the teacher's weight of both weights, mean over the tokens: of a hard gate the share of its tokens
gap             student over teacher, log-probability of the token that the gate reads
on_policy_loss  the divergence per token of the student's own translations, which the four above leave out
on_policy_share  their share of the tokens
accuracy        with --report-accuracy, per cent
ece             in validation: top-1, teacher-forced, with EOS, a fraction
teacher_lost_mass  in validation, of a teacher with symbols that the student lacks: their mean probability

Of a task of several language pairs also PAIR_nll_loss, PAIR_teacher_share and, in validation, PAIR_ece and
PAIR_accuracy of each.
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
    """Of a worker's batch; those of several may be added."""
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
        # Unlike the histogram's update, this takes NaN: of a run that has diverged fairseq logs nan and goes on.
        rows, bins = out.tokens_mask, CalibrationHistogram().bins
        found["calibration"] = tabulate(out.confidence[rows], out.correct[rows], bins)[0]
    return found


def own_sums(out: DistillationOutput, alone: DistillationOutput | None) -> dict[str, Any]:
    """What is added, or is another, where the student's own translations may be trained on.

    Args:
        out: of the other sentences.
        alone: of those; None where there is none in the batch.
    """
    if alone is None:
        return {"own_loss": torch.zeros_like(out.kd), "own_tokens": torch.zeros_like(out.tokens)}
    return {"loss": (out.loss + alone.loss).detach(), "own_loss": alone.kd, "own_tokens": alone.tokens}


def reduce(logging_outputs: Sequence[dict[str, Any]]) -> None:
    """Aggregate what workers and update_freq have summed."""

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
        # Sums per bin, added up by the meter; ECE is derived from them when it is printed.
        metrics.log_scalar("_calibration", total("calibration").cpu())
        metrics.log_derived("ece", functools.partial(by_pair.ece, "_calibration"))
