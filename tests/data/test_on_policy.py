"""On-policy distillation: what the student translates, alone or with the teacher's help, and what is learnt of it."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import command_line as cl
import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.sequence_generator import SequenceGenerator

from hgkd_fairseq.criterions.on_policy import check
from hgkd_fairseq.data import on_policy
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import forced
from hgkd_fairseq.evaluation.on_policy import MAX_LEN_A, MAX_LEN_B, Translator, accepted
from hgkd_fairseq.evaluation.sampling import uniform
from hgkd_fairseq.loss import DIVERGENCES
from hgkd_fairseq.plugin import checks, training_state

SELF = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", *cl.USER_DIR)
PAD, EOS = 1, 2


def build(data: Path, *options):
    """(task, criterion, model) as fairseq-train builds them."""
    from fairseq import options as fairseq_options
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    arguments = [str(a) for a in (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *SELF, "--save-dir", "new", *options)]
    parser = fairseq_options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(fairseq_options.parse_args_and_arch(parser, arguments))
    task = tasks.setup_task(cfg.task)
    return task, task.build_criterion(cfg.criterion), task.build_model(cfg.model)


# The buffer


def test_sentences_are_drawn_by_seed_and_epoch():
    there = np.arange(10, 50)
    numbers, seed = on_policy.drawn(there, 0.3, 1, 2)
    assert (numbers, seed) == on_policy.drawn(there, 0.3, 1, 2)
    assert numbers == sorted(set(numbers) & set(there.tolist()))
    assert len(numbers) == 12
    others = [on_policy.drawn(there, 0.3, *one) for one in ((1, 3), (2, 2))]
    assert all(found != numbers and other != seed for found, other in others)
    assert on_policy.drawn(there, 1, 1, 2)[0] == there.tolist()


def test_translations_in_place_of_targets():
    """Sentences 7 and 9 of three have a translation; that of 9 is cut to the width of 12 tokens over three."""
    buffer = on_policy.OwnTranslations({})
    target = torch.tensor([[5, 6, EOS], [8, EOS, PAD], [5, 5, EOS]])
    before = torch.tensor([[EOS, 5, 6], [EOS, 8, PAD], [EOS, 5, 5]])
    sample = {"id": torch.tensor([9, 3, 7]), "target": target, "ntokens": 8}
    sample["net_input"] = {"prev_output_tokens": before}
    assert buffer.in_place_of_targets(sample, PAD, EOS, 12) == (sample, None)
    token = torch.tensor([4, EOS, 4, 5, 6, 7, EOS], dtype=torch.int32)
    buffer.fill(torch.tensor([7, 9]), torch.tensor([2, 5]), token)
    made, own = buffer.in_place_of_targets(sample, PAD, EOS, 12)
    assert own == [True, False, True]
    assert made["target"].tolist() == [[4, 5, 6, 7], [8, EOS, PAD, PAD], [4, EOS, PAD, PAD]]
    assert made["net_input"]["prev_output_tokens"].tolist() == [[EOS, 4, 5, 6], [EOS, 8, PAD, PAD], [EOS, 4, PAD, PAD]]
    assert (made["ntokens"], made["target_lengths"]) == (8, [4, 2, 2])
    whole, _ = buffer.in_place_of_targets(sample, PAD, EOS, None)
    assert whole["target"].tolist()[0] == [4, 5, 6, 7, EOS]
    assert sample["target"] is target  # the data are as they were

    (others, lengths), (ours, own_lengths) = on_policy.apart(made["target"], made["target_lengths"], own, PAD)
    assert others.tolist() == [[PAD] * 4, [8, EOS, PAD, PAD], [PAD] * 4]
    assert ours.tolist() == [[4, 5, 6, 7], [PAD] * 4, [4, EOS, PAD, PAD]]
    assert (lengths, own_lengths) == ([0, 2, 0], [4, 0, 2])


# Speculative KD


def test_replaced_types_by_hand():
    """Teacher (1/2, 0.3, 0.15, 0.05): of its two most probable types a proposal stays, another is drawn from all four,
    of which the cumulated probabilities are 0.5, 0.8, 0.95, 1."""
    logq = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()

    def found(proposed: list[int], most: int, drawn: list[float]) -> list[int]:
        rows = logq.expand(len(proposed), 4)
        return accepted(torch.tensor(proposed), rows, most, torch.tensor(drawn, dtype=torch.float64)).tolist()

    assert found([0, 1, 0, 1], 2, [0.99, 0.99, 0.01, 0.01]) == [0, 1, 0, 1]
    assert found([2, 2, 3, 2, 3], 2, [0.49, 0.51, 0.79, 0.94, 0.96]) == [0, 1, 1, 2, 3]
    assert found([0, 1, 2, 3], 4, [0.01] * 4) == [0, 1, 2, 3]
    assert found([3, 1], 1, [0.51, 0.01]) == [1, 0]
    # What is forbidden is not drawn; equally probable types do not count against each other.
    forbidden = torch.tensor([[-math.inf, 0.3, 0.15, 0.05]]).log().nan_to_num(-math.inf, neginf=-math.inf)
    assert accepted(torch.tensor([3]), forbidden, 1, torch.tensor([0.01]).double()).tolist() == [1]
    assert accepted(torch.tensor([3]), torch.zeros(1, 4), 1, torch.tensor([0.01]).double()).tolist() == [3]


@pytest.fixture(scope="module")
def models(data: Path, plain: cl.Run, teacher: cl.Run):
    """(student, teacher, dictionary, a batch of eight training sentences)."""
    (student,), task, _ = forced.load(str(data), str(plain.path()), cpu=True)
    (better,), _, _ = forced.load(str(data), str(teacher.path("checkpoint_best.pt")), cpu=True)
    task.load_dataset("train")
    dataset = task.dataset("train")
    return student, better, task.target_dictionary, dataset.collater([dataset[number] for number in range(20, 28)])


def last(model, sample: dict, row: int, tokens: list[int], ends: bool) -> torch.Tensor:
    """(V,) log-probabilities after some tokens, without incremental state; forbidden: pads, an end before the first
    token, and anything but an end where it must come."""
    inputs = {key: sample["net_input"][key][row : row + 1] for key in ("src_tokens", "src_lengths")}
    with torch.no_grad():
        output = model(**inputs, prev_output_tokens=torch.tensor([tokens]))
    logp = model.get_normalized_probs(output, log_probs=True)[0, -1].double()
    allowed = torch.zeros(len(logp), dtype=torch.bool)
    allowed[EOS if ends else slice(None)] = True
    allowed[PAD] = False
    if len(tokens) == 1:
        allowed[EOS] = False
    return logp.masked_fill(~allowed, -math.inf)


def drawn(logp: torch.Tensor, number: torch.Tensor) -> int:
    sums = logp.softmax(0).cumsum(0)
    return int((sums <= number * sums[-1]).sum())


@pytest.mark.parametrize(("sampling", "speculative"), [(False, None), (True, None), (True, 12), (False, 4)])
def test_the_student_translates(sampling: bool, speculative: int | None, models):
    """Each token as the rule has it, from the two models' whole forward passes."""
    student, better, dictionary, sample = models
    found = Translator(student, [better], dictionary, 1, sampling, speculative, seed=5)(sample)
    limit, kept, replaced = int(MAX_LEN_A * sample["net_input"]["src_tokens"].size(1) + MAX_LEN_B), 0, 0
    for row, number in enumerate(sample["id"]):
        tokens = [EOS]
        while len(tokens) == 1 or tokens[-1] != EOS:
            step = len(tokens) - 1
            p, q = (last(model, sample, row, tokens, step == limit) for model in (student, better))
            numbers = [uniform(5, number, step, torch.tensor(beam)) for beam in (0, 1)]
            proposed = drawn(p, numbers[0]) if sampling else int(p.argmax())
            outside = speculative is not None and int((q > q[proposed]).sum()) >= speculative
            replaced, kept = replaced + outside, kept + (not outside)
            tokens.append(drawn(q, numbers[1]) if outside else proposed)
        assert found[row].tolist() == tokens[1:]
    assert kept > 5
    assert replaced > 5 if speculative else replaced == 0


def test_beam_search_is_fairseqs(models):
    student, _, dictionary, sample = models
    found = Translator(student, [], dictionary, beam=3)(sample)
    expected = SequenceGenerator([student], dictionary, 3, MAX_LEN_A, MAX_LEN_B).generate([], sample)
    assert [one.tolist() for one in found] == [best[0]["tokens"].tolist() for best in expected]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_in_half_precision(device: str, models):
    student, better, dictionary, sample = models
    student, better = (copy.deepcopy(one).to(device, torch.bfloat16) for one in (student, better))
    if device == "cuda":
        sample = utils.move_to_cuda(sample)
    for how in ((1, True, 5), (3, False, None)):
        found = Translator(student, [better], dictionary, *how)(sample)
        assert all(tokens[-1] == EOS and (tokens[:-1] > EOS).all() and len(tokens) > 1 for tokens in found)


# What is learnt


def test_own_translations_are_learnt_from_the_teacher_alone(data: Path, teacher: cl.Run):
    """The loss of a batch, written out: for own translations the divergence at each of their tokens, for the others the
    gate's choice; and before there are any, to the bit what it is without the option."""
    taught = (*cl.distil(teacher.path()), "--gate", "token", "--divergence", "jsd", "--jsd-beta", 0.3, "--dropout", 0)
    given = (*taught, "--label-smoothing", 0.1, "--gate-dropout", "off")
    task, criterion, model = build(data, *given, "--on-policy-share", 0.5, "--on-policy-sampling")
    task.load_dataset("train")
    task.training_state.updates = 0
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[number] for number in range(16)])
    alone = build(data, *given)[1]
    alone.task.training_state.updates = 0
    values = [one(model.train(), sample)[0] for one in (criterion, alone)]
    assert values[0].item() == values[1].item()
    assert "on_policy" not in alone.task.training_state.memory

    task.begin_epoch(1, model)
    assert model.training
    assert model.decoder.training
    buffer = criterion.on_policy.own().by_number()
    assert len(buffer) == 300
    assert all(tokens[-1] == EOS and PAD not in tokens for tokens in buffer.values())
    loss, size, log = criterion(model, sample)
    teaching = task.load_teacher().members[0]
    expected, tokens, own_tokens, own_loss = torch.zeros((), dtype=torch.float64), 0, 0, 0.0
    for number in range(16):
        one = dataset.collater([dataset[number]])
        target = buffer.get(number, one["target"][0]).long()
        inputs = {key: one["net_input"][key] for key in ("src_tokens", "src_lengths")}
        before = torch.cat([torch.tensor([EOS]), target[:-1]])[None]
        logits = [of(**inputs, prev_output_tokens=before)[0][0].double() for of in (model, teaching)]
        logp, logq = logits[0].log_softmax(1), (logits[1] / 1.5).log_softmax(1).detach()
        divergence = DIVERGENCES["jsd"].of(logp, logq, 0.3)
        gold = logp.gather(1, target[:, None])[:, 0]
        rest = 0.1 / (logp.size(1) - 1)
        data_term = -(0.9 - rest) * gold - rest * logp.sum(1)
        opened = gold > logq.gather(1, target[:, None])[:, 0]
        learnt = divergence if number in buffer else torch.where(opened, divergence, data_term)
        expected, tokens = expected + learnt.sum(), tokens + len(target)
        if number in buffer:
            own_tokens, own_loss = own_tokens + len(target), own_loss + divergence.sum().item()
    assert 0 < own_tokens < tokens == size
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (log["own_tokens"].item(), log["tokens"].item()) == (own_tokens, tokens - own_tokens)
    assert log["own_loss"].item() == pytest.approx(own_loss, rel=1e-5)
    assert log["loss"].item() == loss.item()
    found = [torch.autograd.grad(one, list(model.parameters())) for one in (loss, expected)]
    for got, wanted in zip(*found, strict=True):
        # By the norm: single products of fp32 may fall on the other side of a ReLU's corner.
        assert (got - wanted).norm() <= 1e-3 * wanted.norm() + 1e-4
    with torch.no_grad():  # validation is of the data
        validated, other = (one(model, sample)[2] for one in (criterion, alone))
    assert validated.keys() == other.keys()
    assert validated["loss"] == other["loss"]
    task.begin_epoch(1, model)  # a run that is resumed there does not translate again
    assert criterion.on_policy.own().by_number() is buffer
    criterion.cfg.on_policy_every = 2
    for epoch in (2, 3):
        task.begin_epoch(epoch, model)
        assert (criterion.on_policy.own().by_number() is buffer) == (epoch == 3)
        buffer = criterion.on_policy.own().by_number()
    # An epoch whose first update is the first that is distilled; `updates` is what its last one began with.
    criterion.cfg.distill_start_update = 100
    for epoch, updates in ((4, 98), (6, 99)):
        task.training_state.updates = updates
        task.begin_epoch(epoch, model)
        assert (criterion.on_policy.own().by_number() is buffer) == (epoch == 4)


@pytest.fixture(scope="module")
def built(data: Path, teacher: cl.Run):
    return build(data, "--teacher-path", teacher.path())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("--on-policy-beam", 2), "--on-policy-beam is about the student's own translations: add --on-policy-share"),
        (("--on-policy-share", 1.5), "--on-policy-share 1.5: it must be between 0 and 1"),
        (("--on-policy-share", math.nan), "--on-policy-share nan: it must be between 0 and 1"),
        (("--on-policy-share", 1, "--on-policy-every", 0), "--on-policy-every 0: it must be at least 1"),
        (("--on-policy-share", 1, "--on-policy-speculative", 0), "--on-policy-speculative 0: it must be at least 1"),
        (("--on-policy-share", 1, "--gate", "none"), "--on-policy-share 1: of its own translations a student learns"),
        (
            ("--on-policy-share", 1, "--on-policy-beam", 4, "--on-policy-sampling", True),
            "--on-policy-beam 4 is a search, --on-policy-sampling draws; drop one",
        ),
        (
            ("--on-policy-share", 1, "--on-policy-beam", 4, "--on-policy-speculative", 25),
            "--on-policy-beam 4 is a search, --on-policy-speculative draws; drop one",
        ),
        (("--on-policy-share", 1, "--ignore-prefix-size", 1), "--on-policy-share 1: the student's translations begin"),
        (
            ("--on-policy-share", 1, "--left-pad-target", True),
            "--on-policy-share 1 needs targets that are padded on the",
        ),
        (("--jsd-beta", 0.5), "--jsd-beta is of --divergence jsd, not kl; drop one of them"),
        (("--divergence", "jsd", "--skew-alpha", 0.5), "--skew-alpha is of --divergence skew-kl, not jsd"),
        (("--divergence", "jsd", "--jsd-beta", 1.5), "--jsd-beta 1.5: it must be between 0 and 1"),
        (("--divergence", "skew-kl", "--skew-alpha", 1), "--skew-alpha 1.0: it must be at least 0 and below 1"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_refused_before_it_starts(given: tuple, expected: str, built):
    """By what a criterion asks before it trains."""
    task, criterion, _ = built
    cfg, of_task = copy.deepcopy(criterion.cfg), copy.deepcopy(task.cfg)
    for option, value in zip(given[::2], given[1::2], strict=True):
        name = option.removeprefix("--").replace("-", "_")
        setattr(cfg if hasattr(cfg, name) else of_task, name, value)

    def ask() -> None:
        gate = checks.make_gate(cfg)
        checks.check_options(cfg, gate, training_state.of(task))
        of_ours = {
            "pair_names": task.pair_names,
            "language_tokens": task.language_tokens,
            "load_teacher": task.load_teacher,
        }
        check(cfg, gate, SimpleNamespace(cfg=of_task, **of_ours))

    with pytest.raises(UserError) as caught:
        ask()
    assert str(caught.value).startswith(expected)


def test_other_teachers_and_two_folders_are_refused(data: Path, teacher: cl.Run, tmp_path: Path):
    from hgkd_fairseq import cli

    with pytest.raises(UserError, match="--on-policy-share 1 numbers the training sentences"):
        build(f"{data}:{data}", "--teacher-path", teacher.path(), "--on-policy-share", 1)
    with pytest.raises(
        UserError, match="--on-policy-share 1 needs --teacher-path CHECKPOINT, not --teacher-source unigram"
    ):
        build(data, "--teacher-source", "unigram", "--gate", "always", "--on-policy-share", 1)
    words = ("store", data, "--teacher-path", teacher.path(), "--output", tmp_path / "store", "--subset", "valid")
    assert cli.main([str(word) for word in (*words, "--kind", "hidden", "--cpu")]) == 0
    with pytest.raises(UserError, match="--on-policy-share 1: --teacher-store knows no translations"):
        build(data, "--teacher-store", tmp_path / "store", "--on-policy-share", 1)
