"""The public function of the loss, :func:`gated_distillation`, and its output. Independent of fairseq."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hgkd_fairseq.gates import Gate, TokenStatistics, get_gate
from hgkd_fairseq.loss import checked, chunked, eager, equations, gate_first, rows
from hgkd_fairseq.loss.native import gated
from hgkd_fairseq.loss.native import rows as cpu_rows
from hgkd_fairseq.loss.options import (
    FUSED,
    JSD_BETA,
    SKEW_ALPHA,
    TEACHER_TEMPERATURE,
    Head,
    Options,
    Sparse,
    TokenResults,
)

__all__ = ["IMPLEMENTATIONS", "DistillationOutput", "Head", "Options", "Sparse", "gated_distillation", "unusable"]

logger = logging.getLogger(__name__)

# For each row step the one that evaluates the gate first; there is none for Triton.
GATED_STEPS = {rows.row_step: gate_first.gated_step, cpu_rows.row_step: gated.gated_step}
IMPLEMENTATIONS = ("auto", "eager", "chunked", "native", "triton")


@dataclass(frozen=True)
class DistillationOutput:
    """Sums (never means) over the non-pad tokens of a batch, in nats, and per-token results.

    Only `loss` carries gradients. Scalars are 0-d tensors on the inputs' device, so that computing them does not
    synchronise; per-token tensors are (B, T), 0 or False at pads, and computed on first access.
    """

    loss: Tensor  # scalar, the gated objective
    nll: Tensor  # scalar, plain -log p(gold): cross-entropy without smoothing or gate
    kd: Tensor  # scalar, unweighted divergence, KL(teacher || student), of the tokens with a teacher weight above 0
    gap: Tensor  # scalar, log p - log q of the token that the gate reads
    teacher_share: Tensor  # scalar, sum over the tokens of teacher weight / (data weight + teacher weight)
    teacher_tokens: Tensor  # scalar int64, number of tokens with a teacher weight above 0
    tokens: Tensor  # scalar int64, number N of non-pad tokens
    tokens_mask: Tensor  # (B, T) bool, False at pads
    rows: Tensor  # (N,) int64, indices of the N tokens in the flattened (B T) batch
    results: TokenResults  # results of the N tokens, in order

    @functools.cached_property
    def teacher_mask(self) -> Tensor:
        """Tokens with a teacher weight above 0, (B, T) bool."""
        return self._spread(self.results.teacher_mask)

    @functools.cached_property
    def confidence(self) -> Tensor | None:
        """Probability of the student's argmax, (B, T); None unless it was needed, as with ``top1=True``."""
        return None if self.results.confidence is None else self._spread(self.results.confidence)

    @functools.cached_property
    def correct(self) -> Tensor | None:
        """Whether the student's argmax is the gold token, (B, T) bool; None unless needed, as with ``top1=True``."""
        return None if self.results.correct is None else self._spread(self.results.correct)

    @functools.cached_property
    def token_read(self) -> Tensor:
        """Student's log-probability that the gate read, (B, T) nats."""
        return self._spread(self.results.student_read)

    @functools.cached_property
    def token_nll(self) -> Tensor:
        """Negative log-likelihood of the gold token, plain -log p(gold), (B, T) nats."""
        return self._spread(self.results.nll)

    def _spread(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.tokens_mask.numel()).index_copy_(0, self.rows, values)
        return flat.view(self.tokens_mask.shape)


def gated_distillation(
    student_hidden: Tensor,  # (B, T, Ds), or (B, T, V) where student_weight is None
    student_weight: Tensor | None,  # (V, Ds)
    teacher_hidden: Tensor | Sequence[Tensor] | None,  # (B, T, Dt), or one per member of an ensemble
    teacher_weight: Tensor | Sequence[Tensor | None] | None,  # (V, Dt), or one per member
    target: Tensor,  # (B, T) int64
    *,
    padding_idx: int = 1,
    gate: str | Gate = "token",
    gate_on: str = "gold",
    teacher_temperature: float = TEACHER_TEMPERATURE,
    tempered_gate: bool = True,
    divergence: str = FUSED,
    jsd_beta: float = JSD_BETA,
    skew_alpha: float = SKEW_ALPHA,
    label_smoothing: float = 0.0,
    confidence_penalty: float = 0.0,
    progress: float = 0.0,
    student_bias: Tensor | None = None,  # (V,)
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,  # (V,), or one per member
    top1: bool = False,
    lengths: Sequence[int] | None = None,
    instance: Tensor | None = None,  # (B,) int64
    student_logprob: Tensor | None = None,  # (B, T)
    teacher_gold: Tensor | None = None,  # (B, T)
    teacher_sparse: Sparse | None = None,  # (B, T, K)
    teacher_entropy: Tensor | None = None,  # (B, T)
    implementation: str = "auto",
) -> DistillationOutput:
    """Compute the loss of gated distillation, summed over tokens (hard gate: Lee et al., EMNLP 2022, arXiv:2210.12427).

        loss = sum_t  data_t * CE(y_t, P_student)  +  teacher_t * KL(P_teacher^tau || P_student)

    The gate chooses the weights data_t and teacher_t from the log-probabilities of a token under student and teacher;
    some gates also weight a third term, uniform_t * CE(1/V, P_student). The loss has gradients with respect to
    student_hidden, student_weight, student_bias and the parameters of a learned gate, not with respect to the teacher.
    It can be differentiated once, except with ``implementation="eager"``.

    Args:
        student_hidden: hidden states of the student's decoder; with ``student_weight=None`` the logits.
        student_weight: output projection of the student.
        teacher_hidden: hidden states of the teacher. A sequence is an ensemble, whose probabilities are averaged. None
            for a gate that needs no teacher (``gate="none"`` is plain cross-entropy).
        teacher_weight: output projection(s) of the teacher; None as for the student.
        target: gold tokens; tokens equal to ``padding_idx`` are ignored.
        gate: name registered in :mod:`hgkd_fairseq.gates`, or a bound `Gate`.
        gate_on: token whose probability the gate compares: "gold", the student's "argmax", or a token sampled from
            the student's ("student-draw") or the teacher's distribution ("teacher-draw").
        teacher_temperature: tau; it divides only the teacher's logits, so the loss has no factor tau^2.
        tempered_gate: whether the gate, too, reads the teacher at temperature tau, rather than at 1.
        divergence: divergence of the student from the teacher: "kl", as above, or another key of
            `equations.DIVERGENCES`.
        jsd_beta: the teacher's share of the mixture in "jsd"; 0 and 1 select the limits "kl" and "reverse-kl".
        skew_alpha: the teacher's share of the mixture that replaces the student in "skew-kl".
        label_smoothing: fairseq's eps, applied to the data term: every other token gets eps / (V - 1).
        confidence_penalty: beta; beta H(P_student) is subtracted from the data term (Pereyra et al. 2017,
            arXiv:1701.06548).
        progress: fraction of the training that is done, 0 to 1, for gates that depend on it.
        top1: whether to return the probability of the student's argmax and whether it is correct.
        lengths: number of non-pad targets of each sentence, as host integers, checked on the CPU only. If given, the
            host never waits for the device; otherwise it waits once, to count them.
        student_bias: bias of the student's output layer.
        teacher_bias: bias(es) of the teacher's output layer.
        instance: index of each sentence in the training set, for gates with per-sentence weights
            (``gate="instance"``), or of its language pair (``gate="pair"``).
        student_logprob: log p of the gold tokens (nats) that the gate reads in place of the one computed from
            student_hidden, for example that of the student without dropout.
        teacher_gold: log q of the gold tokens (nats) as the gate reads it, known in advance: at temperature tau, or at
            1 without `tempered_gate`. A gate that closes (`Gate.closes`) is then evaluated first, and "chunked" and
            "native" compute the teacher's logits only for tokens with a teacher weight. Not so for a gate that is
            learned or requests further statistics. Ignored unless ``gate_on="gold"``.
        teacher_sparse: known part of the teacher's distribution at temperature tau, in place of `teacher_hidden`. It
            needs `teacher_gold`, ``gate_on="gold"`` and the divergence "kl".
        teacher_entropy: entropy of the teacher's distribution (nats) as the gate reads it, known in advance, for a gate
            that requests it. It needs `teacher_gold`.
        implementation: "eager" (the reference: full logits, autograd), "chunked" (chunks of tokens, gradients computed
            in the forward pass, fp32 softmax and accumulation), "native" (chunked, rows in a C kernel, on the CPU),
            "triton" (chunked, rows in Triton kernels), or "auto": "triton" on a GPU and "native" on the CPU if their
            kernels pass a self-check, else "chunked"; "eager" for heads without a weight.

    Raises:
        ValueError: an unknown gate, divergence or implementation, an implementation that cannot be used, an option out
            of its range, a missing teacher, or shapes that do not match.
        IndexError: a target outside the vocabulary ("native").
        MemoryError: the C kernel cannot allocate its buffers ("native").
    """
    options = Options(
        get_gate(gate),
        gate_on,
        float(teacher_temperature),
        bool(tempered_gate),
        float(label_smoothing),
        float(confidence_penalty),
        float(progress),
        top1,
        divergence,
        float(jsd_beta),
        float(skew_alpha),
    )
    if divergence not in equations.DIVERGENCES:
        raise ValueError(f'unknown divergence "{divergence}"; known are: {", ".join(equations.DIVERGENCES)}')
    if student_logprob is not None:
        options = options.asked_outside
    student = Head(student_hidden, student_weight, student_bias)
    known = checked.known(teacher_gold, teacher_sparse, student_logprob, teacher_entropy, options)
    teachers = []
    if known.sparse is None:
        teachers = checked.teacher_heads(teacher_hidden, teacher_weight, teacher_bias, options)
    elif teacher_hidden is not None:
        raise ValueError("teacher_hidden and teacher_sparse are two teachers; give one of them")
    checked.shapes(student, teachers, target)
    checked.known_shapes(known, target, student.vocabulary)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f'unknown implementation "{implementation}"; it must be one of {", ".join(IMPLEMENTATIONS)}')
    linear = all(head.weight is not None for head in (student, *teachers))
    if implementation not in ("auto", "eager") and not linear:
        raise ValueError(f'implementation="{implementation}" needs linear heads; logits (weight=None) take "eager"')
    row_step = _row_step(implementation, student) if linear else None

    # Pads are dropped before anything is computed, so that values at pads cannot affect the loss or the gradient.
    kept = target != padding_idx  # (B, T)
    if lengths is None:
        lengths = kept.sum(1).tolist()
    elif not target.is_cuda and list(lengths) != kept.sum(1).tolist():  # on a GPU the host would have to wait
        raise ValueError(f"lengths are {list(lengths)} and target has {kept.sum(1).tolist()} tokens beside padding")
    # The index of the k-th kept token is the first position with k kept tokens up to it. nonzero() would make the host
    # wait for the device to count them.
    so_far = kept.flatten().cumsum(0)
    kept_rows = torch.searchsorted(so_far, torch.arange(1, sum(lengths) + 1, device=target.device))  # (N,)
    student, *teachers = [_flat(head) for head in (student, *teachers)]
    gold = target.flatten()[kept_rows]
    known = known.map(lambda tensor: tensor.detach().to(target.device).flatten(0, 1)[kept_rows])
    # Computed only if it is needed: on a GPU each operation costs the host some 15 microseconds.
    sentence = functools.cache(functools.partial(_sentence_index, kept, kept_rows))
    if instance is not None:
        instance = instance.to(target.device)[:, None].expand_as(target).flatten()[kept_rows]  # (N,)
    if row_step is None:
        student, *teachers = [head._replace(hidden=head.hidden[kept_rows]) for head in (student, *teachers)]
        results = eager.token_results(student, teachers, gold, sentence(), target.size(0), options, instance, known)
    else:
        flat = (student, teachers, kept_rows, gold, sentence, lengths, options)
        results = chunked.token_results(*flat, instance, row_step, known, GATED_STEPS.get(row_step))
    if known.student is not None:
        results = results._replace(student_read=known.student)
    if options.gate.learned and torch.is_grad_enabled():
        gate_gradient = _gate_gradient(results, sentence(), instance, options, student)
        results = results._replace(loss=results.loss.sum() + gate_gradient)
    return _output(results, kept, kept_rows)


def _gate_gradient(
    results: TokenResults, sentence: Tensor, instance: Tensor | None, options: Options, student: Head
) -> Tensor:
    """Return a scalar 0 whose gradient is that of the loss with respect to the gate's own parameters."""
    view = (sentence, results.nll.numel(), student.vocabulary, options.progress, instance)
    weights = options.gate.weights(TokenStatistics(results.student_read, results.teacher_read, *view))
    # A weight of 0 may have a gradient, so that equations.weighted does not fit here.
    divergence = results.kl.masked_fill((weights.teacher == 0) & results.kl.isinf(), 0.0)
    loss = weights.data * results.data_term + weights.teacher * divergence
    if weights.uniform is not None:
        assert results.uniform_term is not None
        loss = loss + weights.uniform * results.uniform_term
    total = loss.sum()
    return total - total.detach()


def _row_step(implementation: str, student: Head) -> chunked.RowStep | None:
    """Return the function that computes the rows of a chunk; None for the eager implementation.

    Raises:
        ValueError: the implementation cannot be used on the student's device.
    """
    if implementation == "eager":
        return None
    if implementation == "chunked":
        return rows.row_step
    device = student.hidden.device
    auto = "triton" if device.type == "cuda" else "native"
    problem, step = _kernel(auto if implementation == "auto" else implementation, device)
    if problem is None:
        return step
    if implementation != "auto":
        raise ValueError(f'implementation="{implementation}" cannot be used: {problem}')
    _log_once(f"the loss runs in plain torch, slower: {problem}")
    return rows.row_step


def _kernel(implementation: str, device: torch.device) -> tuple[str | None, chunked.RowStep]:
    """Return (reason why the kernel cannot be used on this device, or None; its row step)."""
    if implementation == "native":
        return cpu_rows.usable(device), cpu_rows.row_step
    from hgkd_fairseq.loss.triton import rows as triton_rows

    return triton_rows.usable(device), triton_rows.row_step


def unusable(implementation: str, device: torch.device | str) -> str | None:
    """Return the reason why an implementation cannot be used on a device, or None if it can.

    All but "eager" and "auto" also need linear heads, which this function does not know.
    """
    return _kernel(implementation, torch.device(device))[0] if implementation in ("native", "triton") else None


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def _flat(head: Head) -> Head:
    """Return the head with hidden states (B T, D)."""
    return head._replace(hidden=head.hidden.reshape(-1, head.hidden.size(-1)))


def _sentence_index(kept: Tensor, kept_rows: Tensor) -> Tensor:
    """Return the index of each token's sentence, (N,) int64, among the sentences that have tokens.

    The indices of k consecutive tokens therefore differ by less than k. They are computed on the device, because a copy
    from the host could not be part of a CUDA graph.
    """
    rank = kept.any(1).cumsum(0) - 1  # (B,), index of each sentence among those that have tokens
    return rank[kept_rows // max(kept.size(1), 1)]


def _output(results: TokenResults, kept: Tensor, kept_rows: Tensor) -> DistillationOutput:
    return DistillationOutput(
        loss=results.loss.sum() if results.loss.dim() else results.loss,
        nll=results.nll.sum(),
        kd=torch.where(results.teacher_mask, results.kl, torch.zeros_like(results.kl)).sum(),
        gap=(results.student_read - results.teacher_read).sum(),
        teacher_share=(results.teacher_mask if results.teacher_share is None else results.teacher_share).sum(),
        teacher_tokens=results.teacher_mask.sum(),
        tokens=kept.sum(),
        tokens_mask=kept,
        rows=kept_rows,
        results=results,
    )
