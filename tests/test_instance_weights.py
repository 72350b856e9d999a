"""Tests of learned sentence weights: the meta-gradient against finite differences, the step, precision and memory."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hgkd_fairseq.gates import get_gate
from hgkd_fairseq.loss import Head, Options, chunked
from hgkd_fairseq.sentence_weights.meta_gradient import Group, meta_gradient, step, widen

V, D, RATE = 17, 5, 0.05
LENGTHS = (4, 0, 7, 1)  # the second sentence has no token
TRUE = torch.float64


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=TRUE)


def make(lengths: Sequence[int] = LENGTHS, teachers: int = 1, bias: bool = True, vocabulary: int = V, seed: int = 0):
    """Return a group of training sentences and one of held-out sentences, with the same output layer."""
    tokens = sum(lengths)
    weight, b = random(vocabulary, D, seed=seed), random(vocabulary, seed=seed + 1) if bias else None

    def head(n: int, seed: int) -> Head:
        return Head(random(n, D, seed=seed), weight, b)

    ensemble = [
        Head(random(tokens, 4, seed=seed + 20 + i), random(vocabulary, 4, seed=seed + 30 + i)) for i in range(teachers)
    ]
    generator = torch.Generator().manual_seed(seed)
    target, other = torch.randint(vocabulary, (tokens + 9,), generator=generator).split([tokens, 9])
    return Group(head(tokens, seed + 2), ensemble, target, lengths), Group(head(9, seed + 3), [], other, (5, 4))


def options(smoothing: float = 0.0, penalty: float = 0.0) -> Options:
    return Options(get_gate("instance"), label_smoothing=smoothing, confidence_penalty=penalty)


def held_out_loss(group: Group, held_out: Group, weights: Tensor, o: Options) -> float:
    """Return the cross-entropy per held-out token after the step, by autograd of the equations alone."""
    w = group.student.weight.clone().requires_grad_()

    def logp(hidden: Tensor, weight: Tensor) -> Tensor:
        z = hidden @ weight.t()
        return (z if group.student.bias is None else z + group.student.bias).log_softmax(1)

    p = logp(group.student.hidden, w)
    q = torch.stack([(t.hidden @ t.weight.t() / o.teacher_temperature).softmax(1) for t in group.teachers]).mean(0)
    gold = p.gather(1, group.target[:, None]).squeeze(1)
    data = -(1 - o.label_smoothing) * gold - o.label_smoothing / (V - 1) * (p.sum(1) - gold)
    data = data - o.confidence_penalty * -(p.exp() * p).sum(1)
    kl = (q * (q.log() - p)).sum(1)
    of_token = weights.repeat_interleave(torch.tensor(group.lengths), 0)
    loss = (of_token * torch.stack([data, kl], 1)).sum()
    ahead = (w - RATE * torch.autograd.grad(loss, w)[0]).detach()
    there = logp(held_out.student.hidden, ahead).gather(1, held_out.target[:, None])
    return -there.mean().item()


@pytest.mark.parametrize("rule", ["independent", "convex"])
@pytest.mark.parametrize(
    ("smoothing", "penalty", "teachers", "bias"),
    [(0.0, 0.0, 1, True), (0.1, 0.0, 1, False), (0.1, 0.3, 2, True)],
)
def test_meta_gradient_by_finite_differences(
    rule: str, smoothing: float, penalty: float, teachers: int, bias: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(chunked.CHUNK_TOKENS, "cpu", 5)  # chunks that cut sentences
    (group, held_out), o = make(teachers=teachers, bias=bias), options(smoothing, penalty)
    weights = torch.rand(len(LENGTHS), 2, generator=torch.Generator().manual_seed(7), dtype=TRUE)
    # Directions: each weight by itself, or the one of the convex rule, the teacher's weight up and the data's down.
    along = {"independent": [[1.0, 0.0], [0.0, 1.0]], "convex": [[-1.0, 1.0]]}[rule]
    gradient = meta_gradient(group, weights, held_out, RATE, o)
    assert gradient.dtype == TRUE
    for sentence in range(len(LENGTHS)):
        for direction in torch.tensor(along, dtype=TRUE):
            values = []
            for size in (1e-4, -1e-4, 2e-4, -2e-4):
                moved = weights.clone()
                moved[sentence] += size * direction
                values.append(held_out_loss(group, held_out, moved, o))
            # A central difference of fourth order, whose error is far below the tolerance.
            expected = (8 * (values[0] - values[1]) - (values[2] - values[3])) / 12e-4
            found = (gradient[sentence] * direction).sum().item()
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-11)
            assert (found == 0) == (LENGTHS[sentence] == 0)


def test_a_sentence_that_pulls_the_held_out_way_gains_weight():
    # Two tokens with the features of the held-out one: the first has its target, the second another one.
    weight = torch.zeros(3, 2)
    hidden = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    teacher = Head(hidden, torch.tensor([[9.0, 0.0], [0.0, 0.0], [0.0, 0.0]]))  # sure of token 0
    group = Group(Head(hidden, weight), [teacher], torch.tensor([0, 1]), (1, 1))
    held_out = Group(Head(hidden[:1], weight), [], torch.tensor([0]), (1,))
    gradient = meta_gradient(group, torch.tensor([[0.1, 0.9]] * 2), held_out, 1e-3, options())
    (good_data, good_teacher), (bad_data, bad_teacher) = gradient.tolist()
    # W = 0: p = 1/3 each; G h = p - onehot(0) = (-2, 1, 1)/3. Target 0: -eta (-2, 1, 1)/3 . (-2, 1, 1)/3 = -eta 2/3;
    # target 1: -eta (1, -2, 1)/3 . (-2, 1, 1)/3 = eta 1/3. eta is so small that W' is nearly W.
    assert good_data == pytest.approx(-1e-3 * 2 / 3, rel=1e-2)
    assert bad_data == pytest.approx(1e-3 / 3, rel=1e-2)
    assert good_teacher == bad_teacher < 0  # the teacher is right in both


@pytest.mark.parametrize(
    ("rule", "before", "gradient", "after"),
    [
        # torch's median of 1, 2, 4, 8 is 2, the lower one: a gradient of 2 moves a weight by 0.1.
        ("independent", [[0.1, 0.9], [0.5, 1.9]], [[1.0, 2.0], [4.0, -8.0]], [[0.05, 0.8], [0.3, 2.0]]),
        ("independent", [[0.1, 0.9], [0.5, 1.9]], [[8.0, 2.0], [1.0, 4.0]], [[0.0, 0.8], [0.45, 1.7]]),
        ("independent", [[0.1, 0.9]], [[0.0, 0.0]], [[0.1, 0.9]]),
        # Gradients of the teacher minus those of the data: 1 and 3, median 1.
        ("convex", [[0.1, 0.9], [0.2, 0.8]], [[1.0, 2.0], [-1.0, 2.0]], [[0.2, 0.8], [0.5, 0.5]]),
        ("convex", [[0.1, 0.9], [0.2, 0.8]], [[2.0, 1.0], [2.0, -1.0]], [[0.0, 1.0], [0.0, 1.0]]),
    ],
)
def test_step(rule: str, before: list, gradient: list, after: list):
    moved = step(torch.tensor(before), torch.tensor(gradient), 0.1, rule)
    torch.testing.assert_close(moved, torch.tensor(after))


def test_step_of_no_sentence():
    assert step(torch.zeros(0, 2), torch.zeros(0, 2), 0.1, "independent").shape == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_models_look_ahead_in_fp32(dtype: torch.dtype):
    (group, held_out), weights = make(), torch.full((len(LENGTHS), 2), 0.5)

    def cast(heads: Group, dtypes: Sequence[torch.dtype]) -> Group:
        def convert(head: Head) -> Head:
            for each in dtypes:
                head = Head(*[None if x is None else x.to(each) for x in head])
            return head

        return heads._replace(student=convert(heads.student), teachers=[convert(head) for head in heads.teachers])

    def widened(heads: Group) -> Group:
        return heads._replace(student=widen(heads.student), teachers=[widen(head) for head in heads.teachers])

    rounded = [widened(cast(heads, (dtype,))) for heads in (group, held_out)]
    exact = [cast(heads, (dtype, TRUE)) for heads in (group, held_out)]
    found = meta_gradient(rounded[0], weights, rounded[1], RATE, options(0.1))
    expected = meta_gradient(exact[0], weights.double(), exact[1], RATE, options(0.1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(result) if isinstance(x, Tensor))])
        return result


def test_no_gradient_of_its_own_for_a_sentence_and_no_tokens_times_vocabulary():
    tokens, vocabulary = 2048, 300
    group, held_out = make((16,) * (tokens // 16), vocabulary=vocabulary)
    weights = torch.full((tokens // 16, 2), 0.5, dtype=TRUE)
    with LargestTensor() as largest:
        meta_gradient(group, weights, held_out, RATE, options(0.1))
    assert largest.elements == chunked.CHUNK_TOKENS["cpu"] * vocabulary
