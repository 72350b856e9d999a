"""The row mathematics of one chunk in plain torch: logits in, per-token results and the gradient at the logits out.

    lse_s, lse_t, gold_s, gold_t, E_q[z_t - z_s]   ->   gate   ->   (data, teacher)
    dz_s = data (p - (1 - eps - eps_i) onehot - eps_i) + teacher (p - q)

Everything is fp32 (fp64 for fp64 logits), whatever the logits' dtype is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq.gates import TokenStatistics
from hgkd_fairseq.loss.options import Options, TokenResults


class _Softmax(NamedTuple):
    shifted: Tensor  # (C, V) z - max z
    probability: Tensor  # (C, V)
    log_normalizer: Tensor  # (C,) log sum exp(z - max z)

    def logprob(self, index: Tensor) -> Tensor:
        """(C,) log-probability of one token a row."""
        return self.shifted.gather(1, index[:, None]).squeeze(1) - self.log_normalizer


def _softmax(z: Tensor) -> _Softmax:
    shifted = z - z.amax(1, keepdim=True)
    # exp(z - m) / l, not exp(z - lse): lse is rounded at the size of m, which may be large.
    exponential = shifted.exp()
    normalizer = exponential.sum(1)
    return _Softmax(shifted, exponential / normalizer[:, None], normalizer.log())


def _widen(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def row_step(
    student_logits: Tensor,  # (C, V)
    teacher_logits: list[Tensor],  # (C, V) each, not tempered
    target: Tensor,  # (C,) int64
    sentence: Tensor,  # (C,) int64, from 0
    sentence_count: int,
    options: Options,
    gradient_scale: float | None,
) -> tuple[TokenResults, Tensor | None]:
    """Results for a chunk of C tokens and the gradient of the summed loss at the student's logits.

    The gradient (C, V), in the logits' dtype, is multiplied by `gradient_scale`; None: no gradient is made. An
    implementation of this function may write it over `student_logits`.
    """
    z = _widen(student_logits)
    student = _softmax(z)
    gold = student.logprob(target)
    gold_weight, every_weight = options.gold_weight(z.size(1))
    data_term = -gold_weight * gold
    if every_weight:
        data_term = data_term - every_weight * (student.shifted.sum(1) - z.size(1) * student.log_normalizer)

    confidence = correct = None
    read = target
    if options.needs_argmax:
        argmax = z.argmax(1)
        confidence, correct = (-student.log_normalizer).exp(), argmax == target
        read = argmax if options.gate_on == "argmax" else target
    student_read = student.logprob(read)

    q = None
    if not options.gate.needs_teacher:
        teacher_read, kl = student_read, torch.zeros_like(gold)
    elif len(teacher_logits) == 1:
        z_t = _widen(teacher_logits[0]).to(z.dtype)
        teacher = _softmax(z_t / options.teacher_temperature)
        q = teacher.probability
        # One expectation of the difference: two of nearly equal size would cancel. 0 * inf where q underflows is 0.
        difference = torch.where(q > 0, teacher.shifted - student.shifted, torch.zeros_like(q))
        kl = (q * difference).sum(1) - teacher.log_normalizer + student.log_normalizer
        teacher_read = (teacher if options.gate_temperature else _softmax(z_t)).logprob(read)
    else:
        q = mean_probability(teacher_logits, options.teacher_temperature, z.dtype)
        difference = torch.where(q > 0, q.log() - student.shifted, torch.zeros_like(q))
        kl = (q * difference).sum(1) + student.log_normalizer
        gate_q = q if options.gate_temperature else mean_probability(teacher_logits, 1.0, z.dtype)
        teacher_read = gate_q.gather(1, read[:, None]).squeeze(1).log()

    data, teacher_weight = options.gate.weights(TokenStatistics(student_read, teacher_read, sentence, sentence_count))
    loss = data * data_term
    if options.gate.needs_teacher:
        loss = loss + teacher_weight * kl
    mask = teacher_weight > 0
    results = TokenResults(
        loss=loss,
        nll=-gold,
        kd=torch.where(mask, kl, torch.zeros_like(kl)),
        teacher_mask=mask,
        gap=student_read - teacher_read,
        confidence=confidence,
        correct=correct,
    )
    if gradient_scale is None:
        return results, None
    gradient = student.probability * (data + teacher_weight)[:, None]
    if q is not None:
        gradient = gradient - q * teacher_weight[:, None]
    if every_weight:
        gradient = gradient - (data * every_weight)[:, None]
    gradient = gradient.scatter_add(1, target[:, None], (-gold_weight * data)[:, None])
    return results, (gradient * gradient_scale).to(student_logits.dtype)


def mean_probability(logits: list[Tensor], temperature: float, dtype: torch.dtype) -> Tensor:
    """(C, V) mean over an ensemble of the tempered probabilities."""
    total = torch.softmax(_widen(logits[0]).to(dtype) / temperature, dim=1)
    for z in logits[1:]:
        total = total + torch.softmax(_widen(z).to(dtype) / temperature, dim=1)
    return total / len(logits)
