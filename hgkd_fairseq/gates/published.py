"""Gates of other papers: constant and scheduled weights, selection by loss, per-token label smoothing, WSL."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

import torch
from torch import Tensor

from hgkd_fairseq.gates.contract import GateWeights, Option, TokenStatistics
from hgkd_fairseq.gates.registry import register_gate
from hgkd_fairseq.gates.tools import KdShare, mixed, smoothed
from hgkd_fairseq.ranges import POSITIVE, SHARE, WEIGHT, Range

KdWeight = Annotated[float, Option("a, weight of the teacher's term", WEIGHT)]
FirstStage = Annotated[float, Option("share of the updates that the first stage takes", SHARE)]
Selected = Annotated[float, Option("share of the tokens that are selected", SHARE)]
# 2**24: the largest input that torch.quantile accepts
QUEUE = Range(1, 2**24, "a number of tokens, 1 to 16 million; the paper's is 30000 to 50000")
Queue = Annotated[int, Option("tokens whose NLL is remembered", QUEUE)]
VirtualGold = Annotated[float, Option("c, the virtual teacher's probability of the gold token", SHARE)]
VirtualTemperature = Annotated[float, Option("temperature of the virtual teacher", POSITIVE)]
VirtualForm = Annotated[
    str,
    Option(
        "what the temperature divides: the virtual teacher's logits, or, as in the released code, its probabilities",
        choices=("logits", "probabilities"),
    ),
]
BetaShape = Annotated[float, Option("c of Beta(c, 1), from which the gold token's probability is drawn", POSITIVE)]


@register_gate(
    "always",
    equation="data 1 - a, teacher a (--kd-weight a)",
    source="Word-KD, Kim and Rush, EMNLP 2016, arXiv:1606.07947; SD, Furlanello et al., ICML 2018, arXiv:1805.04770",
    compares=False,
    constant=True,
)
def always(statistics: TokenStatistics, *, kd_weight: KdShare = 1.0) -> GateWeights:
    return mixed(statistics, kd_weight)


@register_gate(
    "progressive",
    equation="data 1 - a u/U, teacher a u/U at update u of U (--kd-weight a)",
    source="PS-KD, Kim et al., ICCV 2021, arXiv:2006.12000, with updates in place of epochs",
    compares=False,
    constant=True,
    timed=True,
)
def progressive(statistics: TokenStatistics, *, kd_weight: KdShare = 0.8) -> GateWeights:
    return mixed(statistics, kd_weight * statistics.progress)


@register_gate(
    "annealed",
    closes=True,
    equation="teacher 1, data 0 for a share of the updates (--gate-share), then data 1, teacher 0",
    source="Annealing KD, Jafari et al., EACL 2021, arXiv:2104.07163, with KL in place of a regression on logits",
    compares=False,
    constant=True,
    timed=True,
)
def annealed(
    statistics: TokenStatistics,
    *,
    gate_share: FirstStage = 0.7,
) -> GateWeights:
    return mixed(statistics, 1.0 if statistics.progress < gate_share else 0.0)


WSL = "WSL, Zhou et al., ICLR 2021, arXiv:2102.00650, by token"
SELECTIVE = "Selective-KD, Wang et al., ACL 2021, arXiv:2105.12967"


def selected(statistics: TokenStatistics, threshold: Tensor, kd_weight: float) -> GateWeights:
    """Return weights with data 1 for all tokens and teacher `kd_weight` where the student's NLL reaches `threshold`.

    The threshold is 0-d, in nats.
    """
    student = statistics.student_logprob
    return GateWeights(data=torch.ones_like(student), teacher=kd_weight * (-student >= threshold).to(student.dtype))


@register_gate(
    "selective-batch",
    closes=True,
    scope="batch",
    equation="data 1, teacher a 1[NLL_t in the batch's top share] (--kd-weight a, --gate-share)",
    source=SELECTIVE,
    compares=False,
)
def selective_batch(
    statistics: TokenStatistics, *, kd_weight: KdWeight = 1.0, gate_share: Selected = 0.5
) -> GateWeights:
    nll = -statistics.student_logprob
    if not nll.numel():
        return selected(statistics, nll.sum(), kd_weight)
    count = round(gate_share * nll.numel())
    threshold = nll.topk(count).values[-1] if count else torch.full_like(nll[0], torch.inf)
    return selected(statistics, threshold, kd_weight)


@register_gate(
    "selective-global",
    closes=True,
    equation="data 1, teacher a 1[NLL_t >= quantile 1 - share of the last NLLs] (--kd-weight a, --gate-share, "
    "--gate-queue)",
    source=SELECTIVE,
    compares=False,
)
class SelectiveGlobal:
    """Gate that distils the tokens whose NLL reaches a quantile of the NLLs of the last training tokens of all workers.

    The queue holds `gate_queue` tokens. The threshold of a batch is computed before the batch enters the queue; while
    the queue is empty, every token is selected.
    """

    def __init__(self, *, kd_weight: KdWeight = 1.0, gate_share: Selected = 0.5, gate_queue: Queue = 30000):
        self.kd_weight, self.share = kd_weight, gate_share
        self.size = gate_queue
        # The newest NLLs (nats), padded with nan at the front while there are fewer than `size`, and their quantile.
        self.state = {"queue": torch.zeros(0), "threshold": torch.tensor(-torch.inf)}

    def __call__(self, statistics: TokenStatistics) -> GateWeights:
        student = statistics.student_logprob
        threshold = self.state["threshold"].to(student.device, student.dtype, non_blocking=True)
        return selected(statistics, threshold, self.kd_weight)

    def observe(self, output, gather: Callable[[Tensor], Tensor] = lambda values: values) -> None:
        """Add the NLLs of a batch to the queue and update the threshold; see `Observer.observe` for the arguments.

        All sizes are known in advance, so the host never waits for the device.
        """
        nll = -output.token_read.float().masked_fill(~output.tokens_mask, torch.nan).flatten()
        fresh = gather(newest(nll, self.size))
        before = {name: value.to(fresh, non_blocking=True) for name, value in self.state.items()}
        queue = newest(torch.cat([before["queue"], fresh]), self.size)
        threshold = torch.nanquantile(queue.double(), 1 - self.share).float()  # nan if all are nan
        threshold = threshold if self.share else torch.full_like(threshold, torch.inf)  # selects no token
        self.state.update(queue=queue, threshold=torch.where(threshold.isnan(), before["threshold"], threshold))


def newest(values: Tensor, size: int) -> Tensor:
    """Return the last `size` of the `values` (n,) that are not nan, in order, (size,), padded with nan at the front."""
    order = values.isnan().logical_not().to(torch.uint8).argsort(stable=True)  # nan first
    return torch.cat([values.new_full((size,), torch.nan), values[order]])[-size:]


@register_gate(
    "virtual-teacher",
    needs_teacher=False,
    compares=False,
    constant=True,
    uniform=True,
    equation="(1 - a) CE + a CE(q, p), q = c on gold, the rest even, tempered (--kd-weight a, --virtual-gold c, "
    "--virtual-temperature, --virtual-form)",
    source="TF-KD, Yuan et al., CVPR 2020, arXiv:1909.11723",
)
def virtual_teacher(
    statistics: TokenStatistics,
    *,
    kd_weight: KdShare = 0.1,
    virtual_gold: VirtualGold = 0.9,
    virtual_temperature: VirtualTemperature = 1.5,
    virtual_form: VirtualForm = "logits",
) -> GateWeights:
    others = math.log(statistics.vocabulary - 1)
    # `above` is the logit of the gold token minus that of each other token. `odds` are in logarithms, so that no power
    # overflows.
    if virtual_form == "logits":
        known = (math.log(virtual_gold) if virtual_gold else -math.inf) - math.log(max(1 - virtual_gold, 1e-12))
        above = known + others
    else:
        above = virtual_gold - (1 - virtual_gold) / (statistics.vocabulary - 1)
    odds = above / virtual_temperature - others
    gold = torch.full_like(statistics.student_logprob, odds).sigmoid()
    return smoothed(torch.full_like(gold, 1 - kd_weight), kd_weight, gold, statistics.vocabulary)


@register_gate(
    "beta",
    closes=True,
    scope="batch",
    compares=False,
    uniform=True,
    equation="(1 - a) CE + a CE(q_t, p), q_t = b_t on gold, the rest even; b ~ Beta(c, 1), sorted as the teacher's "
    "probability of gold is (--kd-weight a, --beta-shape c)",
    source="Beta smoothing, Zhang and Sabuncu, NeurIPS 2020, arXiv:2006.05065",
)
def beta(
    statistics: TokenStatistics,
    *,
    kd_weight: KdShare = 0.4,
    beta_shape: BetaShape = 4.0,
) -> GateWeights:
    teacher = statistics.teacher_logprob
    # u^(1 / c) with a uniform u has the distribution Beta(c, 1).
    drawn = torch.rand(teacher.shape, device=teacher.device, dtype=teacher.dtype).pow(1 / beta_shape).sort().values
    gold = torch.empty_like(drawn)
    gold[teacher.argsort()] = drawn
    return smoothed(torch.full_like(gold, 1 - kd_weight), kd_weight, gold, statistics.vocabulary)


def wsl_weight(statistics: TokenStatistics, kd_weight: float) -> Tensor:
    """Return the teacher's weight a (1 - exp(-CE_s / CE_t)), (n,): the larger, the further the student is behind."""
    student, teacher = -statistics.student_logprob, -statistics.teacher_logprob
    ratio = student / teacher.clamp(min=torch.finfo(teacher.dtype).tiny)
    return kd_weight * -torch.expm1(-ratio)


@register_gate(
    "wsl",
    equation="data 1, teacher a (1 - exp(-CE_s / CE_t)), CE the gold token's -log p and -log q (--kd-weight a)",
    source=WSL,
)
def wsl(statistics: TokenStatistics, *, kd_weight: KdWeight = 2.5) -> GateWeights:
    teacher = wsl_weight(statistics, kd_weight)
    return GateWeights(torch.ones_like(teacher), teacher)


@register_gate(
    "wsl-normalised",
    equation="as wsl, both weights divided by their sum (--kd-weight a)",
    source=f"{WSL}; the division is ours",
)
def wsl_normalised(statistics: TokenStatistics, *, kd_weight: KdWeight = 2.5) -> GateWeights:
    teacher = wsl_weight(statistics, kd_weight)
    return GateWeights(1 / (1 + teacher), teacher / (1 + teacher))
