"""Gates: the weights that each one gives, on a batch whose probabilities can be compared by eye."""

import pytest
import torch

from hgkd_fairseq import gates
from hgkd_fairseq.gates import GateWeights, TokenStatistics, get_gate, register_gate
from hgkd_fairseq.loss import gated_distillation

# (sentence, student's p, teacher's q, data and teacher weight of gate token, of gate sentence)
TABLE = [
    # Sentence 0: 0.5 * 0.25 > 0.25 * 0.25, so the teacher has all of it.
    (0, 0.50, 0.25, (0, 1), (0, 1)),
    (0, 0.25, 0.25, (1, 0), (0, 1)),  # equal: the token gate is strict and lets the data teach
    # Sentence 1: 0.9 * 0.1 < 0.5 * 0.4, so the data have all of it.
    (1, 0.90, 0.50, (0, 1), (1, 0)),
    (1, 0.10, 0.40, (1, 0), (1, 0)),
    # Sentence 2 has no token. Sentence 3: 0.5 * 0.2 = 0.2 * 0.5, equal: the data.
    (3, 0.50, 0.20, (0, 1), (1, 0)),
    (3, 0.20, 0.50, (1, 0), (1, 0)),
    # Sentence 4: one token decides.
    (4, 0.75, 0.70, (0, 1), (0, 1)),
    # Sentence 5: two small gains do not outweigh one large loss, 0.3 * 0.3 * 0.1 < 0.2 * 0.2 * 0.9.
    (5, 0.30, 0.20, (0, 1), (1, 0)),
    (5, 0.30, 0.20, (0, 1), (1, 0)),
    (5, 0.10, 0.90, (1, 0), (1, 0)),
]
SENTENCES = 7  # the last one has no token either


def statistics(dtype: torch.dtype) -> TokenStatistics:
    sentence, p, q, _, _ = zip(*TABLE, strict=True)
    return TokenStatistics(
        torch.tensor(p, dtype=dtype).log(), torch.tensor(q, dtype=dtype).log(), torch.tensor(sentence), SENTENCES
    )


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict:
    """The registry, put back after the test."""
    monkeypatch.setattr(gates, "GATES", dict(gates.GATES))
    return gates.GATES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["token", "sentence", "none"])
def test_weights(name: str, dtype: torch.dtype):
    expected = {
        "token": [row[3] for row in TABLE],
        "sentence": [row[4] for row in TABLE],
        "none": [(1, 0)] * len(TABLE),
    }[name]
    weights = get_gate(name).weights(statistics(dtype))
    assert list(zip(weights.data.tolist(), weights.teacher.tolist(), strict=True)) == expected
    assert weights.data.dtype == weights.teacher.dtype == dtype


@pytest.mark.parametrize("name", ["token", "sentence", "none"])
def test_no_tokens(name: str):
    empty = torch.zeros(0)
    weights = get_gate(name).weights(TokenStatistics(empty, empty, empty.long(), 3))
    assert weights.data.shape == weights.teacher.shape == (0,)


def test_sentence_gate_sees_a_small_margin_in_a_long_sentence():
    # 4,096 tokens of log-probability near -5: the sums are near -20,480, where fp32 steps by 2e-3. Every token but the
    # first is equal, so that the sum of differences is exactly the 1e-4 by which the first one is above.
    student = torch.linspace(-8, -2, 4096)
    teacher = student.clone()
    student[0] += 1e-4
    weights = get_gate("sentence").weights(TokenStatistics(student, teacher, torch.zeros(4096).long(), 1))
    assert weights.teacher.sum() == 4096


@pytest.mark.parametrize(
    ("name", "scope", "needs_teacher"),
    [("token", "token", True), ("sentence", "sentence", True), ("none", "token", False)],
)
def test_description(name: str, scope: str, needs_teacher: bool):
    gate = get_gate(name)
    assert (gate.name, gate.scope, gate.needs_teacher) == (name, scope, needs_teacher)
    assert get_gate(gate) is gate


def test_unknown_gate_lists_the_known_ones():
    with pytest.raises(ValueError, match='unknown gate "tokens"; known gates: none, sentence, token'):
        get_gate("tokens")


def test_duplicate_is_refused(registry: dict):
    before = registry["token"]
    with pytest.raises(ValueError, match='"token" is registered already'):
        register_gate("token", equation="", source="")(lambda statistics: None)
    assert registry["token"] is before


def test_wrong_scope_is_refused(registry: dict):
    with pytest.raises(ValueError, match='scope of gate "mine" is "batch"; it must be "token" or "sentence"'):
        register_gate("mine", scope="batch", equation="", source="")
    assert "mine" not in registry


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize("implementation", ["eager", "chunked"])
def test_gate_of_a_user_runs_in_the_loss(implementation: str):
    @register_gate("mixed", equation="data 0.25, teacher 0.5 + p / 2", source="this test")
    def mixed(statistics: TokenStatistics) -> GateWeights:
        p = statistics.student_logprob.exp()
        return GateWeights(data=torch.full_like(p, 0.25), teacher=0.5 + p / 2)

    # Two words. Student's probabilities (1/4, 3/4), teacher's (1/2, 1/2), gold word 0.
    hidden = torch.tensor([[[0.0, 3.0]]])
    hidden[..., 1].log_()
    hidden.requires_grad_()
    out = gated_distillation(
        hidden,
        torch.eye(2),
        torch.zeros(1, 1, 2),
        torch.eye(2),
        torch.tensor([[0]]),
        gate="mixed",
        teacher_temperature=1.0,
        implementation=implementation,
    )
    # CE = -log 1/4; KL = 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4) = 1/2 log 4/3; weights 0.25 and 0.5 + 1/8.
    ce, kl = 1.3862944, 0.1438410
    assert out.nll.item() == pytest.approx(ce, abs=1e-6)
    assert out.kd.item() == pytest.approx(kl, abs=1e-6)
    assert out.loss.item() == pytest.approx(0.25 * ce + 0.625 * kl, abs=1e-6)
    assert out.teacher_tokens.item() == 1
    # d loss / d z = 0.25 (p - onehot) + 0.625 (p - q) = 0.25 (-3/4, 3/4) + 0.625 (-1/4, 1/4): the weight depends on p,
    # and no gradient comes through it.
    out.loss.backward()
    torch.testing.assert_close(hidden.grad, torch.tensor([[[-0.34375, 0.34375]]]), atol=1e-6, rtol=0)
