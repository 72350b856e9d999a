"""The oracle: the equations of gated distillation in plain torch over full [tokens x vocabulary] logits and autograd.

    z_s = h_s W_s^T + b_s        z_t = (h_t W_t^T + b_t) / tau
    log p = log_softmax(z_s)     q = mean over teachers of softmax(z_t)
    data term     (1 - eps - eps_i) * -log p(gold) + eps_i * sum_v -log p(v) - beta H(p),     eps_i = eps / (V - 1)
    teacher term  KL(q || p) = sum_v q (log q - log p)
    uniform term  - 1/V sum_v log p(v)
    loss_t = data_t * data term + teacher_t * teacher term + uniform_t * uniform term

with weights from the gate and no gradient through it (arXiv:2210.12427; label smoothing is fairseq's; the entropy bonus
beta H(p) is Pereyra et al.'s, arXiv:1701.06548).
Softmax arithmetic is fp32, or fp64 for fp64 inputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hgkd_fairseq.gates import TokenStatistics
from hgkd_fairseq.loss.options import Head, Options, TokenResults


def logits(head: Head) -> Tensor:
    """(N, V) logits in fp32 (fp64 for fp64 inputs); the product itself runs in the inputs' dtype."""
    z = head.hidden if head.weight is None else F.linear(head.hidden, head.weight, head.bias)
    return z if z.dtype == torch.float64 else z.float()


def mean_logprobs(heads: Sequence[Head], temperature: float) -> Tensor:
    """(N, V) log of the mean over an ensemble of the probabilities at that temperature."""
    members = [F.log_softmax(logits(head) / temperature, dim=-1) for head in heads]
    return members[0] if len(members) == 1 else torch.logsumexp(torch.stack(members), dim=0) - math.log(len(members))


def token_results(
    student: Head,  # hidden (N, Ds)
    teachers: Sequence[Head],  # hidden (N, Dt) each; empty for a gate that needs none
    target: Tensor,  # (N,) int64
    sentence: Tensor,  # (N,) int64
    sentence_count: int,
    options: Options,
    instance: Tensor | None = None,  # (N,) int64, number of the token's sentence in the training set
) -> TokenResults:
    z = logits(student)  # (N, V)
    logp = F.log_softmax(z, dim=-1)
    gold = logp.gather(1, target[:, None]).squeeze(1)
    gold_weight, every_weight = options.gold_weight(logp.size(1))
    data_term = -gold_weight * gold
    if every_weight:
        data_term = data_term - every_weight * logp.sum(1)
    if options.confidence_penalty:
        data_term = data_term - options.confidence_penalty * -(logp.exp() * logp).sum(1)

    confidence = correct = None
    read = target
    if options.needs_argmax:
        argmax = z.detach().argmax(1)  # the lowest index where several are equal
        confidence, correct = logp.detach().gather(1, argmax[:, None]).squeeze(1).exp(), argmax == target
        read = argmax if options.gate_on == "argmax" else target

    student_read = logp.detach().gather(1, read[:, None]).squeeze(1)
    if not options.gate.needs_teacher:
        teacher_read, kl = student_read, torch.zeros_like(gold)
    else:
        with torch.no_grad():
            logq = mean_logprobs(teachers, options.teacher_temperature)  # (N, V)
            gate_logq = logq if options.gate_temperature else mean_logprobs(teachers, 1.0)
            teacher_read = gate_logq.gather(1, read[:, None]).squeeze(1).to(gold.dtype)
            q = logq.exp()
        # Where q underflows to 0 its token contributes 0, whatever the difference of logarithms is.
        kl = torch.where(q > 0, q * (logq - logp), torch.zeros_like(q)).sum(1).to(gold.dtype)

    view = (sentence, sentence_count, logp.size(1), options.progress, instance)
    weights = options.gate.weights(TokenStatistics(student_read, teacher_read, *view))
    loss = weights.data.detach() * data_term
    if options.gate.needs_teacher:
        loss = loss + weights.teacher.detach() * kl
    uniform_term = None
    if weights.uniform is not None:
        uniform_term = -logp.mean(1)
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
    )
