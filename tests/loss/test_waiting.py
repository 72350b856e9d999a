"""The loss queues its work on a GPU without waiting for a result, whatever the gate; shown on the CPU."""

import pytest
import torch
from waiting import NoWaiting, Waited

from hgkd_fairseq.gates import GATES, get_gate
from hgkd_fairseq.loss import gated_distillation

PAD, VOCABULARY, DIMENSION = 1, 252, 16
IN_VIEW = sorted(GATES.keys() - {"instance"})  # which reads a table of the training set's sentences


def step(gate: str, implementation: str, smoothing: float) -> None:
    """Compute the loss of three sentences, two of which have pads, and its gradients."""
    torch.manual_seed(0)
    hidden, teacher = torch.randn(3, 7, DIMENSION, requires_grad=True), torch.randn(3, 7, DIMENSION)
    weight, other = torch.randn(VOCABULARY, DIMENSION, requires_grad=True), torch.randn(VOCABULARY, DIMENSION)
    target = torch.randint(4, VOCABULARY, (3, 7))
    target[0, 5:] = target[1, 6:] = PAD
    found = gated_distillation(
        hidden, weight, teacher, other, target, gate=get_gate(gate), padding_idx=PAD, lengths=[5, 6, 7],
        implementation=implementation, teacher_temperature=1.3, progress=0.4, label_smoothing=smoothing,
    )  # fmt: skip
    found.loss.backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("gate", IN_VIEW)
def test_a_loss_waits_for_nothing(gate: str, smoothing: float):
    with NoWaiting():
        step(gate, "chunked", smoothing)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.equal(x, x),
    ],
)
def test_what_waits(wait):
    with pytest.raises(Waited), NoWaiting():
        wait(torch.ones(3))
