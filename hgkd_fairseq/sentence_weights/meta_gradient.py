"""Meta-gradient and update of the sentence weights of ALM-KD (Sivasubramanian et al., 2022), independent of fairseq.

The weights (data, teacher) of a sentence s are updated so that a gradient step on the weighted loss lowers the plain
cross-entropy (CE) of held-out sentences. The features are frozen, and only the output layer's weight W (V, D) takes the
look-ahead step:

    W'  = W - eta sum_s sum_k w_{s,k} sum_{t in s} g_t^k h_t^T             k: data, teacher; g^k: gradient at the logits
    G   = d CE(W') / d W' = sum_v (softmax(W' h_v) - onehot(y_v)) h_v^T / T         over the T held-out tokens v
    d CE(W') / d w_{s,k} = - eta sum_{t in s} (g_t^k)^T G h_t

This applies the published method to the tokens of a translation model; the data term includes label smoothing and
confidence penalty if the loss uses them. G h_t is the derivative of token t's logits as W moves along G, computed for
a chunk of tokens by one matrix product. No (V, D) gradient is computed per sentence, and no tensor of size
tokens x vocabulary is kept beyond its chunk. The bias is not updated, and a W that is tied to an embedding is treated
as a separate variable. All arithmetic is in fp32 (fp64 for fp64 features), whatever the model's dtype is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq.gates import GATES, Gate, GateWeights, TokenStatistics
from hgkd_fairseq.loss import chunked, rows
from hgkd_fairseq.loss.options import Head, Options
from hgkd_fairseq.sentence_weights.gate import Instance


class Group(NamedTuple):
    """Batch of S sentences with N target tokens in total, in order, with detached features."""

    student: Head  # hidden (N, Ds), weight (V, Ds)
    teachers: Sequence[Head]  # hidden (N, Dt)
    target: Tensor  # (N,) int64
    lengths: Sequence[int]  # number of target tokens of each sentence; the sum is N

    def sentence(self) -> Tensor:
        """Return the index of each token's sentence within the group, (N,) int64 from 0 to S - 1."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.arange(len(lengths)).repeat_interleave(lengths).to(self.target.device)


def widen(head: Head) -> Head:
    """Return a copy of a head that is detached and in fp32 (fp64 stays fp64), as the look-ahead requires."""
    return head.map(lambda tensor: rows.widen(tensor.detach()))


def _output_gradient(group: Group, options: Options) -> Tensor:
    """Return the gradient (V, D) of the group's loss, summed over its tokens, with respect to W."""
    assert group.student.weight is not None
    weight = group.student.weight.detach().requires_grad_()
    student, sentence = group.student._replace(weight=weight), group.sentence()
    every = torch.arange(group.target.numel(), device=group.target.device)
    flat = (student, group.teachers, every, group.target, lambda: sentence, group.lengths, options)
    with torch.enable_grad():
        return torch.autograd.grad(chunked.token_results(*flat, instance=sentence).loss, weight)[0]


def meta_gradient(group: Group, weights: Tensor, held_out: Group, rate: float, options: Options) -> Tensor:
    """Return the gradient of the held-out loss after one look-ahead step with respect to the sentence weights.

    The held-out loss is the mean cross-entropy per token, in nats. The result has shape (S, 2): the derivatives with
    respect to the data weight and the teacher weight of each sentence (Sivasubramanian et al., 2022; the equations are
    in this module's docstring).

    Args:
        group: S training sentences, with heads that :func:`widen` has converted.
        weights: (S, 2) data weight and teacher weight of each sentence.
        held_out: held-out sentences, without teachers and with heads that :func:`widen` has converted.
        rate: eta, the step size for the loss summed over the group's tokens.
        options: loss options of the training; their gate is replaced by `weights`.
    """

    def of_sentence(statistics: TokenStatistics) -> GateWeights:
        return GateWeights(*weights[statistics.instance].unbind(1))

    weighted = replace(options, gate=Gate("weights of sentences", of_sentence))
    assert group.student.weight is not None
    ahead = group.student.weight - rate * _output_gradient(group, weighted)
    there = held_out._replace(student=held_out.student._replace(weight=ahead))
    direction = _output_gradient(there, Options(GATES["none"])) / max(held_out.target.numel(), 1)
    change = torch.cat([weights.new_zeros(0, 2), *_changes(group, direction, weighted)])
    return -rate * torch.zeros_like(weights).index_add_(0, group.sentence(), change)


@torch.no_grad()
def _changes(group: Group, direction: Tensor, options: Options):
    """Yield for each chunk of C tokens the directional derivatives (C, 2) of the data term and of the teacher term of
    each token, as W moves along `direction` (V, D)."""
    tokens = group.target.numel()
    size = chunked.chunk_tokens(group.target.device, group.student.hidden.dtype, group.student.vocabulary)
    for start, end in chunked.chunk_bounds(tokens, None, size):
        target = group.target[start:end]
        logits = chunked.project(group.student.hidden[start:end], group.student)
        teacher_logits = [chunked.project(teacher.hidden[start:end], teacher) for teacher in group.teachers]
        statistics, p, q = rows.row_statistics(logits, teacher_logits, target, 1 / options.teacher_temperature, options)
        slope = group.student.hidden[start:end] @ direction.t()  # (C, V)
        one, none = torch.ones_like(statistics.gold), torch.zeros_like(statistics.gold)
        gradient, gold = rows.row_gradient(p, None, GateWeights(one, none), statistics.entropy, 1.0, options)
        data = torch.linalg.vecdot(gradient, slope) + gold * slope.gather(1, target[:, None]).squeeze(1)
        toward_teacher, _ = rows.row_gradient(p, q, GateWeights(none, one), None, 1.0, options)
        teacher = torch.linalg.vecdot(toward_teacher, slope)
        yield torch.stack([data, teacher], 1)


def step(weights: Tensor, gradient: Tensor, change: float, rule: str) -> Tensor:
    """Return the weights (S, 2) after a step against the gradient that has a median absolute change of `change`.

    The step is `gradient` scaled by one factor; if the median absolute gradient is 0, the weights do not move.

    Args:
        weights: (S, 2) data weight and teacher weight of each sentence.
        gradient: (S, 2) as :func:`meta_gradient` returns it.
        change: median absolute change of a weight, before clamping.
        rule: "independent": the two weights move separately and are clamped to [0, 2]. "convex": the teacher weight
            moves within [0, 1], and the data weight is 1 minus the teacher weight.
    """
    if rule == "convex":
        gradient = gradient[:, 1:] - gradient[:, :1]
    size = gradient.abs().median() if gradient.numel() else gradient.sum()
    move = torch.where(size > 0, change / size, torch.zeros_like(size)) * gradient
    if rule == "convex":
        teacher = (weights[:, 1:] - move).clamp(0, 1)
        return torch.cat([1 - teacher, teacher], 1)
    return (weights - move).clamp(0, Instance.LARGEST)
