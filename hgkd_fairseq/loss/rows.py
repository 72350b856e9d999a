"""The row step in plain torch: from a chunk's logits to per-token results and the gradient at the student's logits.

    statistics   max, log-normalizer, gold, E_q[z_t - z_s], ... of each row       one pass over the logits
    gate         (data, teacher, uniform) of each row
    gradient     dz_s = data (p - (1 - eps - eps_i) onehot - eps_i) + teacher (p - q) + uniform (p - 1/V)
                        + data beta p (log p + H)                                  a second pass

All arithmetic is in fp32 (fp64 for fp64 logits), whatever the dtype of the logits is. `row_step` keeps p and q between
the passes; an implementation that fuses each pass may recompute them from the statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq import gates
from hgkd_fairseq.gates import GateWeights, TokenStatistics
from hgkd_fairseq.loss import eager, equations
from hgkd_fairseq.loss.options import Decide, Head, Known, Options, Sparse, TokenResults, decided


class RowStatistics(NamedTuple):
    """Statistics of C rows, (C,) each, log-probabilities and entropies in nats.

    Plain torch leaves those None that the options do not need; the C kernel computes all, `correct` only if needed.
    """

    student_max: Tensor  # m, the largest logit
    student_sum: Tensor  # l = sum exp(z - m)
    teacher_max: Tensor | None  # M, the largest tempered logit (C kernel: untempered); None unless there is one teacher
    teacher_sum: Tensor | None  # L = sum exp(z_t / tau - M) with M tempered; None unless there is one teacher
    student_read: Tensor  # log p of the token that the gate reads
    teacher_read: Tensor  # log q of the same token
    gold: Tensor  # log p of the gold token
    mean: Tensor | None  # mean of log p over the vocabulary
    entropy: Tensor | None  # H(p)
    kl: Tensor  # KL(q || p); 0 without a teacher
    correct: Tensor | None  # bool, whether the argmax is the gold token
    teacher_entropy: Tensor | None = None  # H(q)


def asked(options: Options, teacher_entropy: Tensor | None) -> list[dict[str, Tensor]]:
    """Return the further statistics that the gate requests, as the last arguments of `decided`: one dict or none."""
    return [{"teacher_entropy": teacher_entropy}] if options.gate.asks and teacher_entropy is not None else []


def widen(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()


def logprob(shifted: Tensor, log_sum: Tensor, index: Tensor) -> Tensor:
    """Return log p of one token per row, (C,) nats, from z - max z, (C, V), and log sum exp(z - max z), (C,)."""
    return shifted.gather(1, index[:, None]).squeeze(1) - log_sum


def row_statistics(
    student_logits: Tensor,  # (C, V)
    teacher_logits: list[Tensor],  # (C, V) each, not tempered
    target: Tensor,  # (C,) int64
    inverse_temperature: float,
    options: Options,
) -> tuple[RowStatistics, Tensor, Tensor | None]:
    """Return the statistics, p (C, V), and q (C, V) or None without a teacher."""
    z = widen(student_logits)
    student_max = z.amax(1)
    shifted = z - student_max[:, None]
    # exp(z - m) / l, not exp(z - lse): the rounding error of lse grows with m, which may be large.
    exponential = shifted.exp()
    student_sum = exponential.sum(1)
    p = exponential / student_sum[:, None]
    log_sum = student_sum.log()
    gold = logprob(shifted, log_sum, target)
    mean = shifted.mean(1) - log_sum if options.needs_mean else None
    entropy = None
    if options.confidence_penalty:  # 0 * inf counts as 0, for a token excluded by a bias of minus infinity
        entropy = log_sum - (p * torch.where(p > 0, shifted, torch.zeros_like(p))).sum(1)

    correct = None
    read = target
    if options.needs_argmax:
        argmax = z.argmax(1)
        correct = argmax == target
        read = argmax if options.gate_on == "argmax" else target
    student_read = logprob(shifted, log_sum, read)

    q = teacher_max = teacher_sum = teacher_entropy = None
    if not options.gate.needs_teacher:
        teacher_read, kl = student_read, torch.zeros_like(gold)
    elif len(teacher_logits) == 1:
        z_t = widen(teacher_logits[0]).to(z.dtype)
        tempered = z_t * inverse_temperature
        teacher_max = tempered.amax(1)
        shifted_t = tempered - teacher_max[:, None]
        exponential_t = shifted_t.exp()
        teacher_sum = exponential_t.sum(1)
        q = exponential_t / teacher_sum[:, None]
        # One expectation of a difference, because two nearly equal ones would cancel. 0 * inf where q underflows is 0.
        difference = torch.where(q > 0, shifted_t - shifted, torch.zeros_like(q))
        kl = (q * difference).sum(1) - teacher_sum.log() + log_sum
        if options.reads_untempered:
            gate_shifted = z_t - z_t.amax(1, keepdim=True)
            teacher_read = logprob(gate_shifted, gate_shifted.exp().sum(1).log(), read)
        else:
            teacher_read = logprob(shifted_t, teacher_sum.log(), read)
    else:
        q = mean_probability(teacher_logits, inverse_temperature, z.dtype)
        difference = torch.where(q > 0, q.log() - shifted, torch.zeros_like(q))
        kl = (q * difference).sum(1) + log_sum
        gate_q = mean_probability(teacher_logits, 1.0, z.dtype) if options.reads_untempered else q
        teacher_read = gate_q.gather(1, read[:, None]).squeeze(1).log()
    if options.gate.asks and q is not None:
        teacher_entropy = -(q * torch.where(q > 0, q.log(), torch.zeros_like(q))).sum(1)
    statistics = RowStatistics(
        *(student_max, student_sum, teacher_max, teacher_sum, student_read, teacher_read, gold, mean, entropy, kl),
        *(correct, teacher_entropy),
    )
    return statistics, p, q


UNDECLARED = 'gate "{}" gives a weight to the uniform term: register it with uniform=True'


def row_results(statistics: RowStatistics, weights: GateWeights, vocabulary: int, options: Options) -> TokenResults:
    """Return the results of the rows, including the loss, under the gate's weights."""
    gold_weight, every_weight = options.gold_weight(vocabulary)
    data_term = -gold_weight * statistics.gold
    if options.label_smoothing:
        assert statistics.mean is not None
        data_term = data_term - (every_weight * vocabulary) * statistics.mean
    if options.confidence_penalty:
        assert statistics.entropy is not None
        data_term = data_term - options.confidence_penalty * statistics.entropy
    loss = weights.data * data_term
    if options.gate.needs_teacher:
        loss = loss + equations.weighted(weights.teacher, statistics.kl)
    uniform_term = None
    if weights.uniform is not None:
        if statistics.mean is None:
            raise ValueError(UNDECLARED.format(options.gate.name))
        uniform_term = -statistics.mean
        loss = loss + weights.uniform * uniform_term
    return TokenResults(
        loss=loss,
        nll=-statistics.gold,
        data_term=data_term,
        kl=statistics.kl,
        uniform_term=uniform_term,
        student_read=statistics.student_read,
        teacher_read=statistics.teacher_read,
        teacher_mask=weights.teacher > 0,
        confidence=1 / statistics.student_sum if options.needs_argmax else None,
        correct=statistics.correct,
        teacher_share=weights.teacher_share,
    )


def row_gradient(
    p: Tensor,  # (C, V)
    q: Tensor | None,  # (C, V)
    weights: GateWeights,
    entropy: Tensor | None,  # (C,)
    scale: float,
    options: Options,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of the summed loss at the student's logits, times `scale`, in two parts.

    They are (C, V) without the onehot term, and the onehot term (C,), which the caller adds at the gold tokens. Without
    `q` the teacher's part -q is missing; without `entropy` (H(p), nats) so is the confidence penalty.
    """
    gold_weight, every_weight = options.gold_weight(p.size(1))
    data, teacher, uniform = weights
    whole = data + teacher
    every = data * every_weight if options.label_smoothing else None  # weight of each token in the smoothed target
    if uniform is not None:
        whole = whole + uniform
        every = uniform / p.size(1) if every is None else every + uniform / p.size(1)
    gradient = p * (whole * scale)[:, None]
    if q is not None:
        gradient = gradient - q * (teacher * scale)[:, None]
    if every is not None:
        gradient = gradient - (every * scale)[:, None]
    if entropy is not None:
        # p log p is 0 where p underflows.
        surprise = torch.where(p > 0, p.log(), torch.zeros_like(p)) + entropy[:, None]
        gradient = gradient + p * surprise * (data * (options.confidence_penalty * scale))[:, None]
    return gradient, data * (-gold_weight * scale)


def row_step(
    student_logits: Tensor,  # (C, V)
    teacher_logits: list[Tensor],  # (C, V) each, not tempered
    target: Tensor,  # (C,) int64
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    sparse: Sparse | None = None,  # (C, K) in place of `teacher_logits`
) -> tuple[TokenResults, Tensor | None]:
    """Return the results of a chunk of C tokens and the gradient of the summed loss at the student's logits.

    `decide` is the gate's weights or computes them from the log-probabilities that the gate reads. The gradient (C, V),
    in the dtype of the logits, is multiplied by `gradient_scale`; if that is None, no gradient is computed and None is
    returned. Other implementations of this function may write the gradient over `student_logits`.
    """
    if not options.fused or sparse is not None:
        return autograd_step(student_logits, teacher_logits, target, decide, options, gradient_scale, sparse)
    statistics, p, q = row_statistics(student_logits, teacher_logits, target, 1 / options.teacher_temperature, options)
    more = asked(options, statistics.teacher_entropy)
    weights = decided(decide, statistics.student_read, statistics.teacher_read, *more)
    results = row_results(statistics, weights, p.size(1), options)
    if gradient_scale is None:
        return results, None
    gradient, gold = row_gradient(p, q, weights, statistics.entropy, gradient_scale, options)
    return results, gradient.scatter_add_(1, target[:, None], gold[:, None]).to(student_logits.dtype)


def autograd_step(
    student_logits: Tensor,
    teacher_logits: list[Tensor],
    target: Tensor,
    decide: Decide,
    options: Options,
    gradient_scale: float | None,
    sparse: Sparse | None = None,
) -> tuple[TokenResults, Tensor | None]:
    """Do what `row_step` does for any divergence and any statistic, with the equations of `eager` and autograd.

    It needs several times the memory of a chunk's logits.
    """
    logq, gate_logq = eager.teacher_logprobs([Head(logits, None) for logits in teacher_logits], options)
    with torch.set_grad_enabled(gradient_scale is not None):
        z = widen(student_logits).detach().requires_grad_(gradient_scale is not None)
        results = eager.from_logits(z, logq, gate_logq, target, decide, options, Known(sparse=sparse))
        if gradient_scale is None:
            return results, None
        (gradient,) = torch.autograd.grad(results.loss.sum() * gradient_scale, z)
    return results._replace(loss=results.loss.detach()), gradient.to(student_logits.dtype)


def mean_probability(logits: list[Tensor], inverse_temperature: float, dtype: torch.dtype) -> Tensor:
    """Return the mean of an ensemble's tempered probabilities, (C, V), from the logits (C, V) of each member."""
    total = torch.softmax(widen(logits[0]).to(dtype) * inverse_temperature, dim=1)
    for z in logits[1:]:
        total = total + torch.softmax(widen(z).to(dtype) * inverse_temperature, dim=1)
    return total / len(logits)


# The self-check of the kernels that implement `row_step`.

LARGEST_DIFFERENCE = 1e-4  # allowed between a kernel and plain torch, on logits of order 1


def difference_of(step: Callable, device: torch.device) -> float:
    """Return the largest absolute difference of `step` from `row_step`, on four random rows with the gate "token"."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn((2, 4, 40), generator=generator).to(device)
    target = torch.arange(4, device=device)
    options = Options(gates.GATES["token"], teacher_temperature=1.5, label_smoothing=0.1)

    def decide(student_read: Tensor, teacher_read: Tensor) -> GateWeights:
        return options.gate.weights(TokenStatistics(student_read, teacher_read, target, len(target)))

    found = []
    for made in (row_step, step):
        result, dz = made(student.clone(), [teacher], target, decide, options, 1.0)
        assert dz is not None
        reads = (result.student_read, result.teacher_read)
        found.append(torch.cat([result.loss, result.nll, result.data_term, result.kl, *reads, dz.flatten()]))
    return (found[0] - found[1]).abs().max().item()
