"""How it is distilled: from hidden states and output heads to a summed loss and its gradients.

One public function, :func:`gated_distillation`; importable and usable without fairseq.
"""

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

# What decides the gate first beside what does the rows; the Triton rows do not.
GATED_STEPS = {rows.row_step: gate_first.gated_step, cpu_rows.row_step: gated.gated_step}
IMPLEMENTATIONS = ("auto", "eager", "chunked", "native", "triton")


@dataclass(frozen=True)
class DistillationOutput:
    """Sums over the non-pad tokens of a batch (never means: the caller divides), in nats.

    Only `loss` carries gradients. Scalars are 0-d tensors on the inputs' device, so that reading none of them costs no
    synchronisation; per-token tensors are (B, T), 0 or False at pads, and made when they are first asked for.
    """

    loss: Tensor  # scalar, the gated objective
    nll: Tensor  # scalar, plain -log p(gold): cross-entropy without smoothing or gate
    kd: Tensor  # scalar, KL(teacher || student) over the tokens that the gate gave to the teacher
    gap: Tensor  # scalar, log p - log q of the token that the gate reads
    teacher_share: Tensor  # scalar, sum over the tokens of teacher weight / (data weight + teacher weight)
    teacher_tokens: Tensor  # scalar int64, those with a teacher weight above 0
    tokens: Tensor  # scalar int64
    tokens_mask: Tensor  # (B, T) bool, False at pads
    rows: Tensor  # (N,) int64, the places of the N tokens in B T
    results: TokenResults  # of the N tokens, in their order

    @functools.cached_property
    def teacher_mask(self) -> Tensor:
        """(B, T) bool, the tokens with a teacher weight above 0."""
        return self._spread(self.results.teacher_mask)

    @functools.cached_property
    def confidence(self) -> Tensor | None:
        """(B, T) probability of the student's argmax; with top1=True."""
        return None if self.results.confidence is None else self._spread(self.results.confidence)

    @functools.cached_property
    def correct(self) -> Tensor | None:
        """(B, T) bool, that argmax is the gold token; with top1=True."""
        return None if self.results.correct is None else self._spread(self.results.correct)

    @functools.cached_property
    def token_read(self) -> Tensor:
        """(B, T) nats, what the gate read of the student."""
        return self._spread(self.results.student_read)

    @functools.cached_property
    def token_nll(self) -> Tensor:
        """(B, T) nats, plain -log p(gold)."""
        return self._spread(self.results.nll)

    def _spread(self, values: Tensor) -> Tensor:
        flat = values.new_zeros(self.tokens_mask.numel()).index_copy_(0, self.rows, values)
        return flat.view(self.tokens_mask.shape)


def gated_distillation(
    student_hidden: Tensor,  # (B, T, Ds), or (B, T, V) where student_weight is None
    student_weight: Tensor | None,  # (V, Ds)
    teacher_hidden: Tensor | Sequence[Tensor] | None,  # (B, T, Dt), or one for each member of an ensemble
    teacher_weight: Tensor | Sequence[Tensor | None] | None,  # (V, Dt), likewise
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
    teacher_bias: Tensor | Sequence[Tensor | None] | None = None,  # (V,), likewise
    top1: bool = False,
    lengths: Sequence[int] | None = None,
    instance: Tensor | None = None,  # (B,) int64
    student_logprob: Tensor | None = None,  # (B, T)
    teacher_gold: Tensor | None = None,  # (B, T)
    teacher_sparse: Sparse | None = None,  # (B, T, K)
    teacher_entropy: Tensor | None = None,  # (B, T)
    implementation: str = "auto",
) -> DistillationOutput:
    """Distillation gated token by token (hard-gate KD: Lee et al., EMNLP 2022, arXiv:2210.12427).

        loss = sum_t  data_t * CE(y_t, P_student)  +  teacher_t * KL(P_teacher^tau || P_student)

    where the gate chooses (data_t, teacher_t), and for some a uniform_t * CE(1/V, P_student) beside them, from how
    probable a token is under the student and under the teacher.
    Differentiable once, in student_hidden, student_weight and student_bias; the teacher gets no gradient.

    Args:
        student_hidden: features of the student's decoder. With ``student_weight=None`` they are taken as the logits.
        student_weight: the output projection.
        teacher_hidden: the teacher's features. A sequence is an ensemble: its members are averaged in probability
            space. None for a gate that needs no teacher (``gate="none"`` is plain cross-entropy).
        teacher_weight: the teacher's output projection(s); None as for the student.
        target: gold tokens; those equal to ``padding_idx`` count for nothing.
        gate: a name registered in :mod:`hgkd_fairseq.gates`, or a `Gate`.
        gate_on: the token whose probability the gate compares: the "gold" one, the student's "argmax", or one drawn
            from the student's or the teacher's distribution, "student-draw" and "teacher-draw".
        teacher_temperature: tau; divides the teacher's logits only, so no tau^2 factor belongs to the loss.
        tempered_gate: whether the gate's teacher probability is tempered too.
        divergence: of the student from the teacher: "kl", as above, or another of `equations.DIVERGENCES`.
        jsd_beta: of "jsd", the teacher's share of the mixture; 0 and 1 stand for the limits, "kl" and "reverse-kl".
        skew_alpha: of "skew-kl", the teacher's share of the mixture that takes the student's place.
        label_smoothing: fairseq's eps on the data term: every token gets eps / (V - 1).
        confidence_penalty: beta; the data term loses beta H(P_student) (Pereyra et al. 2017, arXiv:1701.06548).
        progress: share of the training that is over, for gates that change with it.
        top1: also return the student's top-1 confidence and whether it is right.
        lengths: number of non-pad targets of each sentence, as host integers. Given, the host never waits for the
            device; otherwise it waits once, to count them.
        teacher_gold: log q (nats) of the gold tokens as the gate reads it, known beforehand: at the teacher's
            temperature, or at 1 without `tempered_gate`. A gate that closes (`Gate.closes`) then decides first, and the
            teacher's product is made for its tokens alone ("chunked", "native"; "triton" makes it for all). Not used
            where the gate reads another token (``gate_on="argmax"``), and a gate that learns needs all products.
        teacher_sparse: what is known of the teacher's distribution at its temperature, in place of `teacher_hidden`;
            with `teacher_gold`, and for the divergence "kl".
        teacher_entropy: nats, of the teacher's distribution as the gate reads it, known beforehand with `teacher_gold`,
            for a gate that asks for it.
        instance: number of each sentence in the training set, for gates that know sentences (``gate="instance"``).
        student_logprob: nats, of the gold token, what the gate reads in place of what student_hidden gives: of the
            student without dropout, say.
        implementation: "eager" (the oracle: full logits, autograd), "chunked" (chunks of tokens, gradients made in
            the forward pass, fp32 softmax and accumulation), "native" (chunked, with the rows in a C kernel, on the
            CPU), "triton" (chunked, with the rows in Triton kernels), or "auto": triton on a GPU and native on the CPU
            where their kernels pass a self-check, else chunked; eager without linear heads.

    Raises:
        ValueError: an unknown gate or implementation, an option out of its range, shapes that do not fit together.
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

    # Pads are dropped before anything is computed: what stands at a pad can reach neither loss nor gradient.
    kept = target != padding_idx  # (B, T)
    if lengths is None:
        lengths = kept.sum(1).tolist()
    # Their indices, in order: the k-th is the first row with k tokens up to it. nonzero() would make the host wait for
    # the device to count them.
    so_far = kept.flatten().cumsum(0)
    kept_rows = torch.searchsorted(so_far, torch.arange(1, sum(lengths) + 1, device=target.device))  # (N,)
    student, *teachers = [_flat(head) for head in (student, *teachers)]
    gold = target.flatten()[kept_rows]
    known = known.map(lambda tensor: tensor.detach().to(target.device).flatten(0, 1)[kept_rows])
    # Made where a gate asks for it: on a GPU each operation costs the host some 15 microseconds.
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
    """0, with the gradient of the loss in the gate's own parameters."""
    view = (sentence, results.nll.numel(), student.vocabulary, options.progress, instance)
    weights = options.gate.weights(TokenStatistics(results.student_read, results.teacher_read, *view))
    loss = weights.data * results.data_term + weights.teacher * results.kl
    if weights.uniform is not None:
        assert results.uniform_term is not None
        loss = loss + weights.uniform * results.uniform_term
    total = loss.sum()
    return total - total.detach()


def _row_step(implementation: str, student: Head) -> chunked.RowStep | None:
    """What does the rows of a chunk; None for the eager implementation."""
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
    """(why it cannot be used on this device, or None; what it does the rows with)."""
    if implementation == "native":
        return cpu_rows.usable(device), cpu_rows.row_step
    from hgkd_fairseq.loss.triton import rows as triton_rows

    return triton_rows.usable(device), triton_rows.row_step


def unusable(implementation: str, device: torch.device | str) -> str | None:
    """Why an implementation cannot be used on a device; None where it can. (Some need linear heads besides.)"""
    return _kernel(implementation, torch.device(device))[0] if implementation in ("native", "triton") else None


@functools.cache
def _log_once(message: str) -> None:
    logger.warning(message)


def _flat(head: Head) -> Head:
    """Its features as (B T, D)."""
    return head._replace(hidden=head.hidden.reshape(-1, head.hidden.size(-1)))


def _sentence_index(kept: Tensor, kept_rows: Tensor) -> Tensor:
    """(N,) number of the sentence that each token belongs to, counting only sentences that have tokens: of k
    neighbouring tokens the numbers differ by less than k. Made on the device: a copy from the host could not be part of
    a CUDA graph."""
    rank = kept.any(1).cumsum(0) - 1  # (B,) of each sentence among those that have tokens
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
