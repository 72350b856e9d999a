"""An independent fp64 implementation of the equations of gated distillation, with error bounds.

test_properties.py compares every gate and implementation with it. It uses nothing of the package.

Each number has a bound on the error of an implementation, from the precision u of the arithmetic and the conditioning:

    a = C u (1 + range of the student's logits)          for log p: z - max z is rounded at its own size
    b = C u (1 + largest tempered teacher's logit)       for log q: z / tau is rounded before max z / tau is subtracted
    p (1 +- expm1(2 a)),  q (1 +- expm1(2 b))            for the probabilities
    expm1(2 (a + b)) sum q |log q - log p| + 2 (a + b)   for the KL

The error of the logits themselves, `Tokens.rounding`, is added to a and b. At temperature 0.001 and logits of 10,000 b
is above 1: the bound is then so wide that a test only shows that nothing is nan. A hard decision of a gate whose margin
is below a + b may go either way; `unsure` marks it, and only there the implementation's own decision is used.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

C = 16  # roundings of a softmax over 300 entries, summed in any order


@dataclass
class Tokens:
    """N tokens with exactly the logits that the implementation sees, in fp64, and the options of the loss."""

    student: Tensor  # (N, V)
    teacher: Tensor  # (N, V)
    target: Tensor  # (N,)
    sentence: Tensor  # (N,)
    u: float  # precision of the arithmetic
    rounding: float = 0.0  # error of the logits themselves, where a product computes them
    temperature: float = 1.0
    smoothing: float = 0.0
    penalty: float = 0.0
    divergence: str = "kl"
    parameter: float = 0.5  # beta or alpha of the divergence
    gate_on: str = "gold"
    tempered_gate: bool = True
    parameters: dict = field(default_factory=dict)  # parameters of the gate
    progress: float = 0.0


def log_softmax(z: Tensor) -> Tensor:
    shifted = z - z.amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def plogr(p: Tensor, r: Tensor) -> Tensor:
    """Return (N,), the sums of p r over the vocabulary, in which 0 times anything is 0."""
    return (p * torch.where(p > 0, r, torch.zeros_like(p))).sum(1)


def finite_range(z: Tensor) -> Tensor:
    """Return (N,), the range of the entries of each row that are not minus infinity."""
    return z.amax(1) - torch.where(z.isneginf(), torch.inf, z).amin(1)


@dataclass
class Found:
    """Values of N tokens and bounds on their errors, (N,) each where nothing else is said."""

    logp: Tensor  # (N, V)
    logq: Tensor  # (N, V), at the temperature
    student_read: Tensor
    teacher_read: Tensor
    a: Tensor
    b: Tensor
    data: Tensor
    data_error: Tensor
    kl: Tensor
    kl_error: Tensor
    above: Tensor  # sum p 1[p > q]
    above_error: Tensor
    surprise: Tensor  # -log q of the token that is read minus the entropy of q, as the gate reads q
    surprise_error: Tensor


def find(t: Tokens, known: Tensor | None = None) -> Found:
    """Compute the values of the tokens; `known` (N,) replaces the teacher's log q of the tokens that the gate reads."""
    logp, logq = log_softmax(t.student), log_softmax(t.teacher / t.temperature)
    gate_logq = logq if t.tempered_gate else log_softmax(t.teacher)
    gold = logp.gather(1, t.target[:, None]).squeeze(1)
    read = t.student.argmax(1) if t.gate_on == "argmax" else t.target
    student_read, teacher_read = (x.gather(1, read[:, None]).squeeze(1) for x in (logp, gate_logq))
    largest = torch.where(t.teacher.isneginf(), 0, t.teacher).abs().amax(1)
    teacher_read = teacher_read if known is None else known
    a = C * t.u * (1 + finite_range(t.student)).detach() + 2 * t.rounding
    b = C * t.u * (1 + largest / min(t.temperature, 1.0 if not t.tempered_gate else t.temperature)) + (
        2 * t.rounding / t.temperature
    )
    p, q = logp.exp(), logq.exp()
    vocabulary = logp.size(1)

    # fairseq's smoothing: eps / (V - 1) to every token but the gold one, 1 - eps to that
    data = -(1 - t.smoothing) * gold
    if t.smoothing:
        data = data - t.smoothing / (vocabulary - 1) * (logp.sum(1) - gold)
    entropy = -plogr(p, logp)
    data_error = a.clone()
    if t.penalty:
        data = data - t.penalty * entropy
        data_error = a + t.penalty * (2 * a + torch.expm1(2 * a) * entropy.detach())

    log_ratio = logq - logp
    if t.divergence == "kl":
        kl = plogr(q, log_ratio)
    elif t.divergence == "reverse-kl":
        kl = plogr(p, -log_ratio)
    else:  # js, jsd: b KL(q || m) + (1 - b) KL(p || m); skew-kl: KL(q || m); m = b q + (1 - b) p
        share = t.parameter
        m = torch.logaddexp(logp + math.log(1 - share), logq + math.log(share))
        kl = plogr(q, logq - m)
        if t.divergence != "skew-kl":
            kl = share * kl + (1 - share) * plogr(p, logp - m)
    size = torch.where((q > 0) | (p > 0), log_ratio, torch.zeros_like(q)).detach().nan_to_num(0, 0, 0).abs()
    weight = q if t.divergence == "kl" else p + q
    kl_error = torch.expm1(2 * (a + b)) * (weight.detach() * size).sum(1) + 2 * (a + b)

    difference = (logp - gate_logq).detach().nan_to_num(0, math.inf, -math.inf)
    above = (p * (difference > 0)).sum(1).detach()
    near = (difference.abs() <= (a + b)[:, None]) & (p > 0)
    above_error = (p * near).sum(1).detach() + torch.expm1(2 * a)
    reads = student_read.detach(), teacher_read.detach()
    entropy = -plogr(gate_logq.exp(), gate_logq)
    surprise = -teacher_read - entropy
    surprise_error = b + torch.expm1(2 * b) * entropy + C * t.u * (surprise.abs() + entropy)
    return Found(
        logp, logq, *reads, a, b, data, data_error, kl, kl_error, above, above_error, surprise, surprise_error
    )  # fmt: skip


@dataclass
class Weights:
    """Weights of the terms of the loss, (N,) each; `error` bounds the error of each, and `unsure` marks the tokens
    whose hard decision is within rounding."""

    data: Tensor
    teacher: Tensor
    uniform: Tensor | None = None
    error: Tensor | None = None
    unsure: Tensor | None = None
    high: float = 1.0  # the teacher's weight where a hard gate is open

    def with_decision(self, opened: Tensor) -> Weights:
        """Return the weights with the implementation's decisions, `opened` (N,) bool, where they are unsure."""
        if self.unsure is None or not self.unsure.any():
            return self
        hard = opened.to(self.teacher.dtype)
        teacher = torch.where(self.unsure, hard * self.high, self.teacher)
        return replace(self, teacher=teacher, data=torch.where(self.unsure, 1 - teacher, self.data))


def hard(margin: Tensor, noise: Tensor, low: float = 0.0, high: float = 1.0) -> Weights:
    teacher = low + (high - low) * (margin > 0).double()
    return Weights(1 - teacher, teacher, unsure=margin.abs() <= noise, high=high)


def weights(gate: str, t: Tokens, f: Found) -> Weights:
    """Return the weights that a gate gives to the tokens; for gates that do not draw at random."""
    n, ones = len(t.target), torch.ones(len(t.target), dtype=torch.float64)
    s, q, noise, has = f.student_read, f.teacher_read, f.a + f.b, t.parameters
    gap = s - q

    def mixed(teacher: Tensor | float, error: Tensor | None = None) -> Weights:
        return Weights(1 - teacher * ones, teacher * ones, error=error)

    def sums(values: Tensor) -> Tensor:
        made = torch.zeros(int(t.sentence.max()) + 1 if n else 0, dtype=torch.float64).index_add_(0, t.sentence, values)
        return made[t.sentence]

    if gate == "none":
        return mixed(0.0)
    if gate in ("token", "token-reversed"):
        return hard(gap if gate == "token" else -gap, noise)
    by_sentence = sums(noise + C * t.u * gap.abs())  # rounding of the sum
    if gate in ("sentence", "sentence-reversed"):
        total = sums(gap)
        return hard(total if gate == "sentence" else -total, by_sentence)
    if gate in ("floor", "sentence-floor"):
        low, high = has["floor"]
        made = hard(gap, noise, low, high) if gate == "floor" else hard(sums(gap), by_sentence, low, high)
        return replace(made, error=torch.where(made.unsure, abs(high - low), 0.0), unsure=None)
    if gate == "typical":
        above = f.surprise - has["margin"]
        noise = sums(f.surprise_error + C * t.u * above.abs())
        weight, rest = has["kd_weight"], has["untypical_weight"]
        made = hard(sums(above), noise, weight, rest)
        data = torch.where(sums(above) > 0, 0.0, 1 - weight)
        error = torch.where(made.unsure, max(abs(rest - weight), 1 - weight), 0.0)
        return replace(made, data=data, error=error, unsure=None)
    if gate in ("soft", "soft-learned"):
        k = has["sharpness"]
        return mixed(torch.sigmoid(k * gap), (k * noise / 4 + 8 * t.u).clamp(max=1))
    if gate == "expected":
        return mixed(f.above, f.above_error)
    if gate in ("wsl", "wsl-normalised"):
        a = has["kd_weight"]

        def of(student: Tensor, teacher: Tensor) -> Tensor:
            return a * -torch.expm1(-student.clamp(min=0) / teacher.clamp(min=1e-300))

        low, teacher, high = (of(-s - f.a, -q + f.b), of(-s, -q), of(-s + f.a, -q - f.b))
        error = (high - low).abs() + 8 * t.u * a
        if gate == "wsl":
            return Weights(ones, teacher, error=error)
        return Weights(1 / (1 + teacher), teacher / (1 + teacher), error=error)
    if gate == "always":
        return mixed(has["kd_weight"])
    if gate == "progressive":
        return mixed(has["kd_weight"] * t.progress)
    if gate == "annealed":
        return mixed(1.0 if t.progress < has["share"] else 0.0)
    if gate in ("selective-batch", "selective-global"):
        threshold = has.get("threshold", -math.inf)
        if gate == "selective-batch":
            count = round(has["share"] * n)
            threshold = float((-s).sort(descending=True).values[count - 1]) if count else math.inf
        opened = -s >= threshold
        near = ((-s - threshold).abs() <= 2 * f.a.max()) if n else torch.zeros(0, dtype=torch.bool)
        return Weights(ones, has["kd_weight"] * opened.double(), error=near.double() * has["kd_weight"])
    if gate == "virtual-teacher":
        # q: c on gold, (1 - c) / (V - 1) elsewhere, its logits divided by the temperature
        v, c, tau = t.student.size(1), has["gold"], has["temperature"]
        powers = c ** (1 / tau), ((1 - c) / (v - 1)) ** (1 / tau)
        gold = powers[0] / (powers[0] + (v - 1) * powers[1])
        return smoothed(1 - has["kd_weight"], has["kd_weight"], gold * ones, v)
    if gate in ("instance", "pair"):
        return Weights(has["data"], has["teacher"])
    raise ValueError(f"no equations for gate {gate}")


def smoothed(data: float, weight: float, gold: Tensor, vocabulary: int) -> Weights:
    """Return the weights of the one-hot and the uniform term that make up, times `weight` and added to `data`, the
    cross-entropy with a target of `gold` (N,) on the gold token and the rest spread evenly."""
    rest = (1 - gold) / (vocabulary - 1)
    return Weights(data + weight * (gold - rest), 0 * gold, weight * vocabulary * rest, error=1e-6 * (1 + 0 * gold))


@dataclass
class Expected:
    """Sums over the batch and bounds on their errors; gradients at the logits (N, V) and a bound per token, (N, 1)."""

    loss: float
    loss_error: float
    nll: float
    nll_error: float
    kd: float
    kd_error: float
    dz: Tensor
    dz_error: Tensor


def expected(t: Tokens, w: Weights, f: Found, z: Tensor, with_teacher: bool = True) -> Expected:
    """Compute the expected results; `f` is `find(t)` with the student's logits `z` (N, V), which require a gradient."""
    error = torch.zeros_like(f.a) if w.error is None else w.error.double()
    loss = w.data * f.data
    # The sum of a batch of N is rounded N times.
    loss_error = w.data * f.data_error + error * f.data.detach().abs() + C * t.u * (w.data * f.data).detach().abs()
    if with_teacher:
        loss = loss + torch.where(w.teacher != 0, w.teacher * f.kl, torch.zeros_like(f.kl))
        more = w.teacher * f.kl_error + (error + C * t.u * w.teacher) * f.kl.detach().abs()
        loss_error = loss_error + torch.where((w.teacher != 0) | (error > 0), more, 0)
    if w.uniform is not None:
        uniform = -f.logp.mean(1)
        loss = loss + w.uniform * uniform
        loss_error = loss_error + w.uniform * f.a + (error + C * t.u) * uniform.detach().abs()
    (dz,) = torch.autograd.grad(loss.sum(), z)
    on_p, on_q = torch.expm1(2 * f.a), torch.expm1(2 * (f.a + f.b))
    entropy_size = 1 + math.log(t.student.size(1))
    each = w.data * on_p * (1 + t.penalty * entropy_size) + 2 * error + 4 * t.u
    if with_teacher:
        ratio = 0.0
        if t.divergence != "kl":  # p (log p - log q - ...) is as large as the logarithms
            ratio = (f.logp - f.logq).detach().nan_to_num(0, 0, 0).abs().amax(1)
        each = each + w.teacher * on_q * (1 + ratio) + error * ratio
    if w.uniform is not None:
        each = each + w.uniform * on_p
    opened = w.teacher > 0
    nll = -f.logp.detach().gather(1, t.target[:, None]).squeeze(1)
    kl = f.kl.detach()
    return Expected(
        float(loss.detach().sum()), float(loss_error.sum()),
        float(nll.sum()), float((f.a + C * t.u * nll).sum()),
        float(kl[opened].sum()), float((f.kl_error + C * t.u * kl.abs())[opened].sum()),
        dz, each[:, None],
    )  # fmt: skip
