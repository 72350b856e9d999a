"""Tests of the gates: the weights that each one gives for a batch whose probabilities can be compared by eye."""

import math
from collections.abc import Iterator
from typing import Annotated

import pytest
import torch

from hgkd_fairseq import gates
from hgkd_fairseq.gates import GateWeights, TokenStatistics, get_gate, hard, listing, register_gate
from hgkd_fairseq.gates.contract import Option
from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.plugin import workers
from hgkd_fairseq.sentence_weights import gate as _instance  # noqa: F401  registers the gate instance

# (sentence, student's p, teacher's q, data and teacher weight of gate token, of gate sentence)
TABLE = [
    # Sentence 0: 0.5 * 0.25 > 0.25 * 0.25, so the teacher has weight 1.
    (0, 0.50, 0.25, (0, 1), (0, 1)),
    (0, 0.25, 0.25, (1, 0), (0, 1)),  # equal: the token gate compares strictly, so the data
    # Sentence 1: 0.9 * 0.1 < 0.5 * 0.4, so the data have weight 1.
    (1, 0.90, 0.50, (0, 1), (1, 0)),
    (1, 0.10, 0.40, (1, 0), (1, 0)),
    # Sentence 2 has no token. Sentence 3: 0.5 * 0.2 = 0.2 * 0.5, equal, so the data.
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
P = [row[1] for row in TABLE]
Q = [row[2] for row in TABLE]
VOCABULARY = 11
E = math.exp(0.989 / 20)
VIRTUAL = 90 ** (1 / 1.5)

# (gate, its parameters, progress) -> (data, teacher) of each token of TABLE, or (data, teacher, uniform)
WEIGHTS = {
    ("none",): [(1, 0)] * 10,
    ("token",): [row[3] for row in TABLE],
    ("sentence",): [row[4] for row in TABLE],
    # The comparison is reversed, but where both are equal it is still the data: the second token, and sentence 3.
    ("token-reversed",): [(1, 0) if p >= q else (0, 1) for p, q in zip(P, Q, strict=True)],
    ("sentence-reversed",): [(0, 1) if row[0] in (1, 5) else (1, 0) for row in TABLE],
    ("floor",): [(0.3, 0.7) if row[3] == (0, 1) else (0.7, 0.3) for row in TABLE],
    ("floor", "gate_floor", "0.9,0.5"): [(0.5, 0.5) if row[3] == (0, 1) else (0.1, 0.9) for row in TABLE],
    ("sentence-floor",): [(0.3, 0.7) if row[4] == (0, 1) else (0.7, 0.3) for row in TABLE],
    ("sentence-floor", "gate_floor", "0.7,1"): [(0, 1) if row[4] == (0, 1) else (0.3, 0.7) for row in TABLE],
    # CE_s / CE_t = log p / log q
    ("wsl",): [(1, 2.5 * (1 - math.exp(-math.log(p) / math.log(q)))) for p, q in zip(P, Q, strict=True)],
    ("wsl", "kd_weight", 1.0): [(1, 1 - math.exp(-math.log(p) / math.log(q))) for p, q in zip(P, Q, strict=True)],
    ("wsl-normalised", "kd_weight", 1.0): [
        (1 / (1 + w), w / (1 + w))
        for w in (1 - math.exp(-math.log(p) / math.log(q)) for p, q in zip(P, Q, strict=True))
    ],
    ("wsl-normalised",): [  # a = 2.5
        (1 / (1 + w), w / (1 + w))
        for w in (2.5 * (1 - math.exp(-math.log(p) / math.log(q))) for p, q in zip(P, Q, strict=True))
    ],
    ("expected",): [(1 - p, p) for p in P],  # `statistics` gives P for whatever a gate asks for
    # Means over a sentence of -log q - P (`statistics` gives P for the entropy): 1.01, 0.30, 0.80, -0.39, 0.87
    ("typical",): [(0, 1) if row[0] == 0 else pytest.approx((0.3, 0.7)) for row in TABLE],
    ("typical", "kd_weight", 0.25, "typical_margin", 0.31): [
        (0.75, 0.25) if row[0] in (1, 4) else (0, 1) for row in TABLE
    ],
    ("typical", "untypical_weight", 0.0): [(0, 0) if row[0] == 0 else pytest.approx((0.3, 0.7)) for row in TABLE],
    ("typical", "kd_weight", 0.4, "untypical_weight", 0.4): [
        (0, 0.4) if row[0] == 0 else pytest.approx((0.6, 0.4)) for row in TABLE
    ],
    ("pair",): [(0.5, 0.5)] * 10,  # before student and teacher are compared
    ("always",): [(0, 1)] * 10,
    ("always", "kd_weight", 0.25): [(0.75, 0.25)] * 10,
    ("progressive", "kd_weight", 0.5, "progress", 0.5): [(0.75, 0.25)] * 10,
    ("progressive", "progress", 0.5): [pytest.approx((0.6, 0.4))] * 10,  # a = 0.8
    ("annealed", "progress", 0.69): [(0, 1)] * 10,  # the first stage takes 0.7 of the updates
    ("annealed", "progress", 0.7): [(1, 0)] * 10,
    ("annealed", "gate_share", 0.5, "progress", 0.4): [(0, 1)] * 10,
    ("annealed", "gate_share", 0.5, "progress", 0.5): [(1, 0)] * 10,
    # sigmoid(log p - log q) = p / (p + q)
    ("soft",): [(q / (p + q), p / (p + q)) for p, q in zip(P, Q, strict=True)],
    ("soft-learned",): [(q / (p + q), p / (p + q)) for p, q in zip(P, Q, strict=True)],  # untrained
    ("soft", "gate_sharpness", 2.0): [
        (q * q / (p * p + q * q), p * p / (p * p + q * q)) for p, q in zip(P, Q, strict=True)
    ],
    # The tokens least probable under the student: the lower half of ten is 0.1, 0.1, 0.2, 0.25 and 0.3.
    ("selective-batch",): [(1, int(p <= 0.3)) for p in P],  # two tokens have 0.3
    ("selective-batch", "gate_share", 0.3): [(1, int(p <= 0.2)) for p in P],
    ("selective-batch", "gate_share", 0.0): [(1, 0)] * 10,
    ("selective-batch", "gate_share", 0.2, "kd_weight", 0.5): [(1, 0.5 * (p <= 0.1)) for p in P],
    ("selective-global",): [(1, 1)] * 10,  # an empty queue
    ("instance",): [pytest.approx((0.1, 0.9))] * 10,  # sentences outside the training set
    # a = 1/2 and c = 6/11 at temperature 1 of 11 types: 12 to 1 odds, the others have 1/22 each. Half of that target is
    # 1/4 onehot + 1/4 uniform.
    ("virtual-teacher", "kd_weight", 0.5, "virtual_gold", 6 / 11, "virtual_temperature", 1.0): [(0.75, 0, 0.25)] * 10,
    # a = 0.1, 90 to 1 odds at temperature 1.5.
    ("virtual-teacher",): [(0.9 + 0.1 * (VIRTUAL - 1) / (VIRTUAL + 10), 0, 0.1 * 11 / (VIRTUAL + 10))] * 10,
    # All but gold alike, 1/10 each: half of that target is 11/20 uniform - 1/20 onehot.
    ("virtual-teacher", "kd_weight", 0.5, "virtual_gold", 0.0): [(0.45, 0, 0.55)] * 10,
    # Probabilities 0.2 and 0.08 over 0.1: odds exp(1.2).
    ("virtual-teacher", "virtual_form", "probabilities", "virtual_gold", 0.2, "virtual_temperature", 0.1): [
        (0.9 + 0.1 * (math.exp(1.2) - 1) / (math.exp(1.2) + 10), 0, 0.1 * 11 / (math.exp(1.2) + 10))
    ]
    * 10,
    # Probabilities 0.99 and 0.001 over 20: odds exp(0.989 / 20); gold has e / (e + 10), each other one 1 / (e + 10).
    ("virtual-teacher", "virtual_form", "probabilities", "virtual_gold", 0.99, "virtual_temperature", 20.0): [
        (0.9 + 0.1 * (E - 1) / (E + 10), 0, 0.1 * 11 / (E + 10))
    ]
    * 10,
}
RANDOM = ("random", "beta")


def statistics(dtype: torch.dtype, progress: float = 0.0) -> TokenStatistics:
    sentence = torch.tensor([row[0] for row in TABLE])
    student, teacher = (torch.tensor(values, dtype=dtype).log() for values in (P, Q))
    asked = dict.fromkeys(gates.contract.ASKED, torch.tensor(P, dtype=dtype))
    return TokenStatistics(student, teacher, sentence, SENTENCES, VOCABULARY, progress, asked=asked)


@pytest.fixture
def registry() -> Iterator[dict]:
    """Yield the registry of gates, and restore it after the test."""
    before = dict(gates.GATES)
    yield gates.GATES
    gates.GATES.clear()
    gates.GATES.update(before)


def rows(weights: GateWeights) -> list[tuple]:
    return list(zip(*[part.tolist() for part in weights if part is not None], strict=True))


def test_every_gate_is_in_the_table():
    assert {key[0] for key in WEIGHTS} | set(RANDOM) == set(gates.GATES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", WEIGHTS, ids=lambda key: " ".join(map(str, key)))
def test_weights(key: tuple, dtype: torch.dtype):
    values = dict(zip(key[1::2], key[2::2], strict=True))
    progress = values.pop("progress", 0.0)
    weights = get_gate(key[0], **values).weights(statistics(dtype, progress))
    assert rows(weights) == [pytest.approx(row, abs=1e-6) for row in WEIGHTS[key]]
    assert {part.dtype for part in weights if part is not None} == {dtype}


def test_hard_gates_are_exactly_0_or_1():
    for name in ("token", "sentence", "token-reversed", "sentence-reversed", "random", "selective-batch"):
        assert {value for row in rows(get_gate(name).weights(statistics(torch.float32))) for value in row} <= {0.0, 1.0}


@pytest.mark.parametrize("name", sorted(set(gates.GATES) - set(RANDOM)))
def test_constant_gates_are_those_that_read_no_probability(name: str):
    gate, seen = get_gate(name), statistics(torch.float32, progress=0.4)
    if name == "selective-global":
        gate.weights.state["threshold"] = torch.tensor(1.0)
    unread = torch.zeros_like(seen.student_logprob)
    blind = gate.weights(
        seen._replace(student_logprob=unread, teacher_logprob=unread, asked=dict.fromkeys(seen.asked, unread))
    )
    assert gate.constant == (rows(blind) == rows(gate.weights(seen)))


def test_random_shuffles_the_decisions_of_the_token_gate():
    torch.manual_seed(0)
    gate, seen = get_gate("random"), torch.zeros(len(TABLE))
    for _ in range(400):
        weights = gate.weights(statistics(torch.float32))
        assert weights.teacher.sum() == 6  # as many as the token gate gives to the teacher
        assert torch.equal(weights.data, 1 - weights.teacher)
        seen += weights.teacher
    assert (seen / 400 - 0.6).abs().max() < 0.1  # each position, within 4 standard deviations


def test_random_with_a_share():
    torch.manual_seed(0)
    many = torch.zeros(20000)
    weights = get_gate("random", gate_share=0.3).weights(TokenStatistics(many, many, many.long(), 1))
    assert abs(weights.teacher.mean() - 0.3) < 0.015


def test_beta_smooths_less_where_the_teacher_is_sure():
    torch.manual_seed(0)
    teacher = torch.rand(5000).log()
    view = TokenStatistics(torch.zeros(5000), teacher, torch.zeros(5000).long(), 1, VOCABULARY)
    data, none, uniform = get_gate("beta", kd_weight=0.4, beta_shape=3.0).weights(view)
    assert not none.any()
    assert torch.equal(data.argsort(), teacher.argsort())
    # The target is a distribution: what is not on gold is spread. E[Beta(3, 1)] = 3/4 on gold.
    torch.testing.assert_close(data + uniform, torch.ones(5000))
    gold = (data + uniform / VOCABULARY - 0.6) / 0.4
    assert abs(gold.mean() - 0.75) < 0.02


class Output:
    """The part of a step's output that the queue reads."""

    def __init__(self, nll: list[float], pads: int = 0):
        self.token_read = -torch.tensor([nll + [0.0] * pads])
        self.tokens_mask = torch.tensor([[True] * len(nll) + [False] * pads])


def test_the_queue_forgets_and_is_shared():
    gate = get_gate("selective-global", gate_queue=4, gate_share=0.5).weights
    gate.observe(Output([1.0, 2.0, 3.0], pads=2))
    assert gate.state["queue"].isnan().tolist() == [True, False, False, False]
    assert gate.state["queue"][1:].tolist() == [1, 2, 3]
    assert gate.state["threshold"] == 2
    gate.observe(Output([7.0, 9.0]))
    assert gate.state["queue"].tolist() == [2, 3, 7, 9]
    assert gate.state["threshold"] == 5
    assert rows(gate(statistics(torch.float32))) == [(1, 0)] * 10
    # A batch of padding alone adds nothing.
    gate.observe(Output([], pads=3))
    assert gate.state["queue"].tolist() == [2, 3, 7, 9]
    # Two workers, each with a tensor of the queue's size.
    gate.observe(Output([0.5]), gather=lambda values: torch.cat([values, values + 1]))
    assert gate.state["queue"].tolist() == [7, 9, 0.5, 1.5]
    # The threshold decides: NLL >= log 2 for the median of 0 and 2 log 2.
    gate.observe(Output([0.0, 2 * 0.6931471, 0.0, 2 * 0.6931473]))
    assert [row[1] for row in rows(gate(statistics(torch.float32)))] == [p <= 0.5 for p in P]


def test_listing(registry: dict):
    """An option of several gates is listed once for each of its meanings."""
    registry.clear()
    first, second = (Annotated[float, Option(text)] for text in ("size | a", "size b"))
    form = Annotated[str, Option("how", choices=("up", "down"))]

    def one(statistics, *, size: first = 0.5, form: form = "up"): ...

    def two(statistics, *, size: first = 1.5): ...

    def three(statistics, *, size: second = 2.5): ...

    for function, source in ((one, "Someone, arXiv:2301.01234."), (two, "b"), (three, "c")):
        register_gate(function.__name__, equation=f"w {function.__name__}", source=source)(function)
    register_gate("four", equation="w four", source="d")(lambda statistics: None)
    assert listing.text().splitlines() == [
        *("one", "    w one", "    Someone, arXiv:2301.01234.", "    --size 0.5, --form up"),
        *("two", "    w two", "    b", "    --size 1.5"),
        *("three", "    w three", "    c", "    --size 2.5"),
        *("four", "    w four", "    d"),
    ]
    assert listing.markdown().splitlines() == [
        "| `--gate` | weights | source |",
        "| --- | --- | --- |",
        "| `one` | w one | Someone, [arXiv:2301.01234](https://arxiv.org/abs/2301.01234). |",
        "| `two` | w two | b |",
        "| `three` | w three | c |",
        "| `four` | w four | d |",
        "",
        "| option | meaning | gates, defaults |",
        "| --- | --- | --- |",
        "| `--size` | size \\| a | `one` 0.5, `two` 1.5 |",
        "| `--size` | size b | `three` 2.5 |",
        "| `--form` | how: up or down | `one` up |",
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_sentences(dtype: torch.dtype):
    gate = get_gate("instance").weights
    of_token = torch.tensor([2, 2, 0, 0, 3, 3, 1, 4, 4, 4])  # numbers of the sentences in the training set
    view = statistics(dtype)._replace(instance=of_token)
    with pytest.raises(gates.GateError, match=r"no table yet: call its begin\(\)"):
        gate(view)
    gate.begin(torch.tensor([False] * 4 + [True]))
    assert rows(gate(view)) == [pytest.approx((0.1, 0.9))] * 10
    gate.state["data"], gate.state["teacher"] = torch.tensor([[0.0, 0.25, 0.5, 2.0, 1.0], [2.0, 1.5, 0.5, 0.0, 0.75]])
    table = [(0.0, 2.0), (0.25, 1.5), (0.5, 0.5), (2.0, 0.0), (1.0, 0.75)]
    assert rows(gate(view)) == [table[number] for number in of_token]
    assert {part.dtype for part in gate(view)[:2]} == {dtype}
    assert rows(gate(statistics(dtype))) == [pytest.approx((0.1, 0.9))] * 10


def test_published_defaults_of_the_gates_with_a_state():
    instance, pair, queue = (get_gate(name).weights for name in ("instance", "pair", "selective-global"))
    assert (instance.held_out, instance.interval, instance.change, instance.rule) == ("0.02", 10, 0.1, "independent")
    assert (pair.weight, pair.margin) == (0.5, 1.0)
    assert (queue.kd_weight, queue.share, queue.size) == (1.0, 0.5, 30_000)


def test_a_pair_learns_while_it_is_below_its_teacher():
    gate, view = get_gate("pair", kd_weight=0.4).weights, statistics(torch.float32)
    gate.compare(torch.tensor([50.0, 61.5, 60.9]), torch.tensor([49.9, 60.5, 60.0]))  # margin 1, compared strictly
    of_token = torch.tensor([2, 2, 0, 0, 1, 1, 1, 0, 2, 1])
    taught = [pytest.approx((0.6, 0.4)) if pair != 1 else (1, 0) for pair in of_token]
    assert rows(gate(view._replace(instance=of_token))) == taught
    assert rows(gate(view)) == [pytest.approx((0.6, 0.4))] * 10  # unknown pair: the constant


@pytest.mark.parametrize("name", sorted(gates.GATES))
def test_no_tokens(name: str):
    empty = torch.zeros(0)
    asked = dict.fromkeys(gates.contract.ASKED, empty)
    seen = TokenStatistics(empty, empty, empty.long(), 3, vocabulary=VOCABULARY, asked=asked)
    weights = get_gate(name).weights(seen)
    assert {part.shape for part in weights if part is not None} == {(0,)}


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
    with pytest.raises(ValueError, match=r'unknown gate "tokens"; known gates: always, annealed, .*, token'):
        get_gate("tokens")


def test_a_parameter_of_another_gate_is_refused():
    with pytest.raises(
        gates.GateError, match='gate "token" does not take it; it belongs to annealed, random, sel'
    ) as caught:
        get_gate("token", gate_share=0.5)
    assert caught.value.option == "gate_share"


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("always", "kd_weight", 1.5),
        ("annealed", "gate_share", -1.0),
        ("selective-global", "gate_queue", 0),
        ("floor", "gate_floor", "0.3"),
        ("floor", "gate_floor", "0.3,1.1"),
        ("floor", "gate_floor", "nan,0.5"),
        ("instance", "refresh_interval", 0),
        ("instance", "refresh_change", 0.0),
        ("instance", "weight_rule", "sum"),
        ("selective-global", "gate_queue", 3.5),
        ("floor", "gate_floor", 0.3),
        ("always", "kd_weight", "half"),
        ("always", "kd_weight", True),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(name: str, option: str, value: object):
    with pytest.raises(gates.GateError) as caught:
        get_gate(name, **{option: value})
    assert caught.value.option == option
    assert str(value) in str(caught.value)


def test_duplicate_is_refused(registry: dict):
    before = registry["token"]
    with pytest.raises(ValueError, match='"token" is registered already'):
        register_gate("token", equation="", source="")(lambda statistics: None)
    assert registry["token"] is before


def test_wrong_scope_is_refused(registry: dict):
    with pytest.raises(ValueError, match='scope of gate "mine" is "word"; it must be one of "token"'):
        register_gate("mine", scope="word", equation="", source="")
    assert "mine" not in registry


def test_asking_for_what_there_is_not_is_refused(registry: dict):
    with pytest.raises(ValueError, match='gate "mine" asks for entropy; there are student_above, student_entropy'):
        register_gate("mine", asks=("entropy",), equation="", source="")
    with pytest.raises(ValueError, match='gate "mine" learns, and such a gate may ask for nothing'):
        register_gate("mine", asks=("student_above",), equation="", source="")(torch.nn.Linear)
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


def test_the_queue_and_the_gate_read_the_same():
    """The queue holds what the gate reads, also if `student_logprob` replaces the student's own log-probabilities, as
    with --gate-dropout off."""
    gate = get_gate("selective-global", gate_share=0.5)
    given, hidden = -torch.arange(1.0, 9.0)[None], torch.zeros(1, 8, 3)
    for share in (8, 4):  # with an empty queue, and then with a filled one
        out = gated_distillation(
            hidden, torch.eye(3), hidden, torch.eye(3), torch.full((1, 8), 2), gate=gate, student_logprob=given
        )
        assert out.teacher_tokens == share
        assert out.token_read.tolist() == given.tolist()
        workers.show(out, gate, idle=False)
    assert gate.weights.state["threshold"] == 4.5
    none = get_gate("selective-global", gate_share=0.0).weights
    none.observe(Output([1.0, 2.0, 3.0]))
    assert not any(teacher for _, teacher in rows(none(statistics(torch.float32))))


def test_a_gate_is_given_by_name_or_bound():
    with pytest.raises(gates.GateError, match='this is the gate "always" itself; give its name, with parameters'):
        get_gate(gates.GATES["always"], kd_weight=0.3)
    with pytest.raises(gates.GateError, match='this is the gate "pair" itself'):
        get_gate(gates.GATES["pair"])
    bound = get_gate("always", kd_weight=0.3)
    assert get_gate(bound) is bound


def test_a_gate_that_observes_is_called_as_documented():
    """A class with the documented method is an Observer, and other gates are not; an Observer sees no tokens of a batch
    that is only repeated to keep the workers in step."""

    class Mine:
        def __call__(self, statistics):
            return hard.none(statistics)

        def observe(self, output, gather):
            self.seen = gather(output.tokens_mask)

    mine = Mine()
    assert isinstance(mine, gates.Observer)
    hidden = torch.zeros(1, 3, 4)
    out = gated_distillation(hidden, torch.eye(4), None, None, torch.tensor([[2, 3, 1]]), gate="none")
    for idle, seen in ((False, [True, True, False]), (True, [False] * 3)):
        workers.show(out, gates.Gate("mine", mine), idle)
        assert mine.seen.tolist() == [seen]
    assert isinstance(gates.get_gate("selective-global").weights, gates.Observer)
    assert not isinstance(gates.get_gate("soft-learned").weights, gates.Observer)
    assert not isinstance(gates.get_gate("token").weights, gates.Observer)
