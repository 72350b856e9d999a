"""Weights of training sentences, learned by looking one step ahead (ALM-KD): meta-gradient and step. No fairseq here.

The weights (data, teacher) of a sentence s shall be such that a gradient step on the weighted loss lowers the plain
cross-entropy of held-out sentences. With features frozen and only the output layer's W (V, D) looking ahead:

    W'  = W - eta sum_s sum_k w_{s,k} sum_{t in s} g_t^k h_t^T             k: data, teacher; g^k: gradient at the logits
    G   = d CE(W') / d W' = sum_v (softmax(W' h_v) - onehot(y_v)) h_v^T / T         over the T held-out tokens v
    d CE(W') / d w_{s,k} = - eta sum_{t in s} (g_t^k)^T G h_t

(Sivasubramanian et al. 2022, ALM-KD, on a translation model's tokens; the data term includes label smoothing and
confidence penalty where the loss has them.) G h_t is what the logits of t would change by along G: a product of a chunk
of tokens with G. No sentence has a (V, D) gradient of its own, and nothing of size tokens x vocabulary outlives a
chunk. A bias stays where it is; a W that is tied to an embedding looks ahead as a variable of its own. All arithmetic
is fp32 (fp64 for fp64 features), whatever the model's dtype is.
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
    """The N target tokens of S training sentences, in order, with frozen features."""

    student: Head  # hidden (N, Ds), weight (V, Ds)
    teachers: Sequence[Head]  # hidden (N, Dt)
    target: Tensor  # (N,) int64
    lengths: Sequence[int]  # of the sentences, summing to N

    def sentence(self) -> Tensor:
        """(N,) int64, 0 to S - 1."""
        lengths = torch.tensor(self.lengths, dtype=torch.int64)
        return torch.arange(len(lengths)).repeat_interleave(lengths).to(self.target.device)


def widen(head: Head) -> Head:
    """The head in the precision of the look-ahead, without gradient."""
    return head.map(lambda tensor: rows.widen(tensor.detach()))


def _output_gradient(group: Group, options: Options) -> Tensor:
    """(V, D) gradient of the group's loss, a sum over tokens, at W."""
    assert group.student.weight is not None
    weight = group.student.weight.detach().requires_grad_()
    student, sentence = group.student._replace(weight=weight), group.sentence()
    every = torch.arange(group.target.numel(), device=group.target.device)
    flat = (student, group.teachers, every, group.target, lambda: sentence, group.lengths, options)
    with torch.enable_grad():
        return torch.autograd.grad(chunked.token_results(*flat, instance=sentence).loss, weight)[0]


def meta_gradient(group: Group, weights: Tensor, held_out: Group, rate: float, options: Options) -> Tensor:
    """(S, 2) gradient of the held-out cross-entropy a token, in nats, after one step, at the data and the teacher
    weight of each sentence.

    Args:
        group: training sentences; heads as `widen` gives them.
        weights: (S, 2) data and teacher weight of each.
        held_out: sentences that are not trained on; without teachers.
        rate: eta, the size of the step on the summed loss.
        options: of the training's loss; its gate is not used.
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
    """For each chunk (C, 2): by how much a token's data and teacher term change as W goes along `direction` (V, D)."""
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
    """The weights (S, 2) after a step against `gradient` (S, 2) whose median size is `change`.

    "independent": each weight for itself, within 0 and 2. "convex": data and teacher weight sum to 1.
    """
    if rule == "convex":
        gradient = gradient[:, 1:] - gradient[:, :1]
    size = gradient.abs().median() if gradient.numel() else gradient.sum()
    move = torch.where(size > 0, change / size, torch.zeros_like(size)) * gradient
    if rule == "convex":
        teacher = (weights[:, 1:] - move).clamp(0, 1)
        return torch.cat([1 - teacher, teacher], 1)
    return (weights - move).clamp(0, Instance.LARGEST)
