"""The reference implementation (the oracle): gated distillation in plain torch, with full logits and autograd.

    z_s = h_s W_s^T + b_s        z_t = (h_t W_t^T + b_t) / tau
    log p = log_softmax(z_s)     q = mean over teachers of softmax(z_t)
    loss_t = data_t * data term + teacher_t * divergence of p from q + uniform_t * uniform term

The terms are those of equations.py; the weights come from the gate, through which no gradient passes
(arXiv:2210.12427). Softmax arithmetic is in fp32, or in fp64 for fp64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd_fairseq.gates import GateWeights, TokenStatistics
from hgkd_fairseq.loss import equations
from hgkd_fairseq.loss.options import DRAWN, NOTHING, Decide, Head, Known, Options, TokenResults, decided


def logits(head: Head) -> Tensor:
    """Return the logits (N, V) in fp32 (fp64 for fp64 inputs); the product itself is computed in the inputs' dtype."""
    z = head.hidden if head.weight is None else F.linear(head.hidden, head.weight, head.bias)
    return z if z.dtype == torch.float64 else z.float()


def mean_logprobs(heads: Sequence[Head], temperature: float) -> Tensor:
    """Return the log of the mean of an ensemble's probabilities at that temperature, (N, V)."""
    members = [F.log_softmax(logits(head) / temperature, dim=-1) for head in heads]
    return members[0] if len(members) == 1 else torch.logsumexp(torch.stack(members), dim=0) - math.log(len(members))


@torch.no_grad()
def teacher_logprobs(teachers: Sequence[Head], options: Options) -> tuple[Tensor | None, Tensor | None]:
    """Return log q (N, V) at the teacher's temperature and as the gate reads it; (None, None) without teachers."""
    if not options.gate.needs_teacher or not teachers:
        return None, None
    logq = mean_logprobs(teachers, options.teacher_temperature)
    return logq, mean_logprobs(teachers, 1.0) if options.reads_untempered else logq


def from_logits(
    z: Tensor,  # (N, V), the student's logits, in fp32 or fp64
    logq: Tensor | None,  # (N, V), the teacher's log-probabilities at its temperature; None without a teacher
    gate_logq: Tensor | None,  # (N, V), the teacher's log-probabilities as the gate reads them
    target: Tensor,  # (N,) int64
    decide: Decide,
    options: Options,
    known: Known = NOTHING,
) -> TokenResults:
    """Return the results of N tokens; `loss` (N,) is differentiable with respect to `z`."""
    logp = F.log_softmax(z, dim=-1)
    gold = logp.gather(1, target[:, None]).squeeze(1)
    data_term = equations.data_term(logp, target, options)
    confidence = correct = None
    read = target
    if options.needs_argmax:
        argmax = z.detach().argmax(1)  # the lowest index among equal ones
        confidence, correct = logp.detach().gather(1, argmax[:, None]).squeeze(1).exp(), argmax == target
        read = argmax if options.gate_on == "argmax" else target
    if logq is not None and gate_logq is not None and options.gate_on in DRAWN:
        read = equations.drawn(logp.detach() if options.gate_on == "student-draw" else gate_logq)
    student_read = logp.detach().gather(1, read[:, None]).squeeze(1)
    teacher_read, kl = student_read, torch.zeros_like(gold)
    if known.sparse is not None:
        kl = equations.sparse_kl(logp, known.sparse).to(gold.dtype)
    elif logq is not None and gate_logq is not None:
        teacher_read = gate_logq.gather(1, read[:, None]).squeeze(1).to(gold.dtype)
        kl = equations.divergence(logp, logq, options).to(gold.dtype)
    if known.gold is not None:
        teacher_read = known.gold.to(gold.dtype)

    asked = []
    if options.gate.asks and gate_logq is not None:
        asked = [{name: equations.STATISTICS[name](logp.detach(), gate_logq) for name in options.gate.asks}]
    weights = decided(decide, student_read, teacher_read, *asked)
    loss = weights.data.detach() * data_term
    if options.gate.needs_teacher:
        loss = loss + equations.weighted(weights.teacher.detach(), kl)
    uniform_term = None
    if weights.uniform is not None:
        uniform_term = equations.uniform_term(logp)
        loss = loss + weights.uniform.detach() * uniform_term
    return TokenResults(
        loss=loss,
        nll=-gold.detach(),
        data_term=data_term.detach(),
        kl=kl.detach(),
        uniform_term=None if uniform_term is None else uniform_term.detach(),
        student_read=student_read,
        teacher_read=teacher_read,
        teacher_mask=weights.teacher > 0,
        confidence=confidence,
        correct=correct,
        teacher_share=weights.teacher_share.detach(),
    )


def token_results(
    student: Head,  # hidden (N, Ds)
    teachers: Sequence[Head],  # hidden (N, Dt) each; empty without a teacher
    target: Tensor,  # (N,) int64
    sentence: Tensor,  # (N,) int64
    sentence_count: int,
    options: Options,
    instance: Tensor | None = None,  # (N,) int64, index of the token's sentence in the training set
    known: Known = NOTHING,
) -> TokenResults:
    logq, gate_logq = teacher_logprobs(teachers, options)

    def decide(student_read: Tensor, teacher_read: Tensor, *asked: dict[str, Tensor]) -> GateWeights:
        read = student_read if known.student is None else known.student.to(student_read.dtype)
        view = (sentence, sentence_count, student.vocabulary, options.progress, instance)
        return options.gate.weights(TokenStatistics(read, teacher_read, *view, *known.asked(asked, read.dtype)))

    return from_logits(logits(student), logq, gate_logq, target, decide, options, known)
