"""Tests of Loras: the gradients of the student and of the label embedding, against autograd of the equations."""

import pytest
import torch

from hgkd_fairseq.loss import Head, chunked, gated_distillation
from hgkd_fairseq.teacher.loras import DROPOUT, ENTROPY, RANK, Loras

PAD, V, D = 1, 11, 5


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_gradients(training: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 3)
    target = torch.tensor([[4, 4, 9, PAD], [0, 10, 2, 4]])
    hidden, weight = random(2, 4, D, seed=0), random(V, D, seed=1).requires_grad_()
    loras = Loras(V).double().train(training)
    with torch.no_grad():
        loras.embedding.copy_(random(V, RANK, seed=2) / 3)
    torch.manual_seed(0)
    (head,) = loras.signal({"target": target}, hidden.device, hidden.dtype).heads
    out = gated_distillation(
        hidden, weight, head.hidden, head.weight, target, gate="always", teacher_temperature=1.0, padding_idx=PAD
    )
    kept = target != PAD
    zero = loras.objective(Head(hidden[kept], weight), target[kept])
    assert zero.item() == 0
    found = torch.autograd.grad(out.loss + zero, (weight, loras.embedding))

    torch.manual_seed(0)
    embedding = loras.embedding.detach().clone().requires_grad_()
    dropped = torch.nn.functional.dropout(embedding, DROPOUT, training=training)
    assert training == bool((dropped == 0).any())
    z, u = hidden[kept] @ weight.t(), dropped[target[kept]] @ dropped.t()
    p, v = z.softmax(1), u.softmax(1)
    student = torch.autograd.grad(-(v.detach() * p.log()).sum(), weight, retain_graph=True)
    entropy = -(v * v.log()).sum()
    expected = torch.autograd.grad(-(v * p.detach().log()).sum() - ENTROPY * entropy, embedding)
    for got, wanted in zip(found, (*student, *expected), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_it_learns_what_stands_beside_what():
    """If words 0 and 1 are confused with each other, and 2 and 3, a word is smoothed with its partner, not the rest."""
    torch.manual_seed(0)
    p = torch.tensor([[0.5, 0.4, 0.05, 0.05], [0.4, 0.5, 0.05, 0.05], [0.05, 0.05, 0.5, 0.4], [0.05, 0.05, 0.4, 0.5]])
    loras, target = Loras(4), torch.arange(4)
    loras.eval().signal({"target": target[None]}, p.device, p.dtype)  # a validation comes first
    loras.train()
    optimizer = torch.optim.Adam(loras.parameters(), lr=0.02)
    for _ in range(1000):
        loras.signal({"target": target[None]}, p.device, p.dtype)
        optimizer.zero_grad()
        loras.objective(Head(p.log(), None), target).backward()
        optimizer.step()
    (head,) = loras.eval().signal({"target": target[None]}, p.device, p.dtype).heads
    v = (head.hidden[0] @ head.weight.t()).softmax(1)
    pairs = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    assert ((v * pairs).sum(1) > 0.9).all()
