"""The loss and the logging outputs of a batch. The equations are in gates/ and loss/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hgkd_fairseq.criterions import by_pair, logged
from hgkd_fairseq.criterions.from_data import from_data, gold_logprob
from hgkd_fairseq.criterions.on_policy import TEACHER_ALONE
from hgkd_fairseq.data import batches, on_policy
from hgkd_fairseq.loss import DistillationOutput, gated_distillation
from hgkd_fairseq.plugin import features, workers
from hgkd_fairseq.plugin.config import divergence_parameters, temperature
from hgkd_fairseq.teacher import Dense, Sparse, TeacherSource
from hgkd_fairseq.teacher.dictionaries import lost_mass

if TYPE_CHECKING:
    from hgkd_fairseq.criterions.hard_gate_kd import HardGateKDCriterion


def teaching(criterion: HardGateKDCriterion) -> TeacherSource | None:
    """Return the teacher, or None if it is not used yet or at all.

    None for a gate that needs no teacher, in training before --distill-start-update, and while a teacher that is a
    previous state of the student does not exist.
    """
    teacher, updates = criterion.teacher(), criterion.state.updates
    training = torch.is_grad_enabled() and updates is not None
    if teacher is None or not teacher.ready or (training and updates < criterion.cfg.distill_start_update):
        return None
    return teacher


def forward(criterion: HardGateKDCriterion, model: torch.nn.Module, sample: dict) -> tuple[Tensor, int, dict[str, Any]]:
    """Return the summed loss of a batch (scalar, nats), the sample size that divides its gradient, and logging outputs.

    Args:
        criterion: the criterion, with its options, gate and teacher.
        model: the student, which may be wrapped.
        sample: batch of fairseq, with targets (B, T).

    The logging outputs are sums, which may be added over batches and workers.
    """
    cfg, state, pad = criterion.cfg, criterion.state, criterion.padding_idx
    skip, validating, teacher = cfg.ignore_prefix_size, not torch.is_grad_enabled(), teaching(criterion)
    own: list[bool] | None = None
    if criterion.on_policy and teacher and not validating:
        sample, own = criterion.on_policy.replaced(sample)
    target = sample["target"][:, skip:]
    lengths = batches.target_lengths(sample, skip, pad)
    student = features.head(model, sample["net_input"])
    signal = teacher and teacher.signal(sample, student.hidden.device, student.hidden.dtype).after(skip)
    student = student._replace(hidden=student.hidden[:, skip:])
    teachers = signal.heads if signal else []
    gate, progress = criterion.gate_in_use(), state.progress(cfg.max_update)
    tau = temperature(cfg, criterion.teacher_temperature, progress)

    def compute(target: Tensor, **how: Any) -> DistillationOutput:
        return gated_distillation(
            student.hidden, student.weight, [one.hidden for one in teachers] or None, [one.weight for one in teachers],
            target,
            padding_idx=pad,
            teacher_temperature=tau,
            divergence=cfg.divergence,
            **divergence_parameters(cfg),
            student_bias=student.bias, teacher_bias=[one.bias for one in teachers],
            implementation=cfg.loss_impl,
            **how,
        )  # fmt: skip

    alone = None
    if own:
        (target, lengths), (theirs, their_lengths) = on_policy.apart(target, lengths, own, pad)
        alone = compute(theirs, gate=TEACHER_ALONE, lengths=their_lengths)
    without_dropout = None
    if cfg.gate_dropout == "off" and signal and not validating:
        how = {"padding_idx": pad, "lengths": lengths, "implementation": cfg.loss_impl}
        without_dropout = gold_logprob(model, sample, target, **how)
    known: dict[str, Tensor | None] = {}
    if signal and signal.gold:
        read = 1.0 if cfg.untempered_gate else tau
        known = {"teacher_gold": signal.gold.at(read), "teacher_entropy": signal.gold.entropy_at(read)}
    out = compute(
        target,
        gate=gate if signal or not gate.needs_teacher else "none",
        gate_on=cfg.gate_on,
        tempered_gate=not cfg.untempered_gate,
        label_smoothing=cfg.label_smoothing,
        confidence_penalty=cfg.confidence_penalty,
        progress=progress,
        top1=validating or cfg.report_accuracy,
        lengths=lengths,
        instance=sample["pair"] if criterion.of_pair else None if validating else sample["id"],
        student_logprob=without_dropout,
        **known,
        teacher_sparse=signal.distribution if isinstance(signal, Sparse) else None,
    )
    loss = out.loss if alone is None else out.loss + alone.loss
    if not validating:
        if teachers and hasattr(criterion, "learned_teacher"):
            kept = target != pad
            seen = student._replace(hidden=student.hidden[kept])
            loss = loss + criterion.learned_teacher.objective(seen, target[kept])
        # Generation is given the language tokens but adds their log-probabilities to the score, so they are learned.
        if "language_tokens" in sample:
            given = sample["language_tokens"][:, skip:]
            loss = loss + from_data(student, given, padding_idx=pad, implementation=cfg.loss_impl).loss
        workers.show(out, criterion.gate, state.idle)
    sample_size = sample["target"].size(0) if cfg.sentence_avg else sample["ntokens"]
    log = logged.sums(out, sample, sample_size, cfg.report_accuracy)
    if criterion.on_policy and not validating:
        log |= logged.own_sums(out, alone)
    log |= by_pair.sums(out, sample, criterion.pairs)
    if validating and signal and criterion.of_pair:
        log |= by_pair.teacher_sums(signal, out, sample, target, criterion.pairs)
    if validating and isinstance(signal, Dense) and signal.whole:
        log["teacher_lost_mass"] = lost_mass(signal, out.tokens_mask).sum()
    return loss, sample_size, log
