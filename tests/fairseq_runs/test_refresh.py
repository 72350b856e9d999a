"""Tests of a refresh of sentence weights: which sentences it visits, and the weights that it computes."""

import logging
from pathlib import Path

import binarised_corpus
import command_line as cl
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf, open_dict

from hgkd_fairseq import plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head, Options
from hgkd_fairseq.sentence_weights import refresh
from hgkd_fairseq.sentence_weights.meta_gradient import Group, meta_gradient, step

plugin.register()

TRAINED, OTHERS, LONGEST = 90, 24, 8
INTERVAL, CHANGE, RATES = 3, 0.2, (0.004, 0.002)
SELF = (*cl.USER_DIR, "--task", "translation_with_teacher", "--criterion", "hard_gate_kd", "--gate", "instance")
RATE = (
    "--optimizer",
    "adam",
    "--lr",
    ",".join(map(str, RATES)),
    "--max-tokens",
    60,
    "--batch-size",
    7,
    "--dropout",
    0.3,
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("refreshed"), np.random.default_rng(5)
    dictionary = binarised_corpus.dictionary_of(f"w{i}" for i in range(20))
    for subset, count in {"train": TRAINED, "valid": OTHERS, "test": OTHERS}.items():
        sides = [
            [" ".join(f"w{i}" for i in rng.integers(20, size=rng.integers(1, LONGEST + 3))) for _ in range(count)]
            for _ in range(2)
        ]
        binarised_corpus.write(folder, subset, "de-en", sides, (dictionary, dictionary))
    return folder


def build(data: Path, *options):
    """Return (configuration, task, model) as fairseq-train builds them; more than LONGEST words are too many."""
    from fairseq import options as fairseq_options
    from fairseq import tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    longest = ("--max-source-positions", LONGEST + 1, "--max-target-positions", LONGEST + 1)
    arguments = [data, *cl.SIZE, *cl.TIED, *RATE, *longest, *cl.LOGS, *SELF, "--save-dir", "new", *options]
    parser = fairseq_options.get_training_parser()
    args = fairseq_options.parse_args_and_arch(parser, [str(argument) for argument in arguments])
    cfg = convert_namespace_to_omegaconf(args)
    task = tasks.setup_task(cfg.task)
    torch.manual_seed(3)
    return cfg, task, task.build_model(cfg.model)


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of an untrained model with its weights times 3, so that its predictions are not uniform."""
    cfg, _, model = build(data)
    with open_dict(cfg):
        cfg.model.data = str(data)
    state = {name: 3 * value for name, value in model.state_dict().items()}
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    history = [
        {"criterion_name": "CrossEntropyCriterion", "optimizer_name": "FairseqAdam", "num_updates": 1, "best_loss": 1.0}
    ]
    parts = {"model": state, "extra_state": {}, "optimizer_history": history}
    torch.save({"cfg": OmegaConf.to_container(cfg), **parts}, path)
    return path


def refreshing(data: Path, teacher: Path, *options):
    cfg, task, model = build(data, "--teacher-path", teacher, "--refresh-interval", INTERVAL, *options)
    task.load_dataset("train", combine=True)
    criterion = task.build_criterion(cfg.criterion)
    found = refresh.Refresh(criterion)
    return found, task, model


def short(dataset) -> set[int]:
    pairs = ((dataset[i]["source"], dataset[i]["target"]) for i in range(len(dataset)))
    return {i for i, (source, target) in enumerate(pairs) if max(len(source), len(target)) <= LONGEST + 1}


@torch.no_grad()
def one_by_one(model, teacher, dataset, numbers, skip: int) -> Group:
    """Return the features of sentences, each computed in a batch of its own."""
    students, teachers, targets = [], [], []
    layers = {}
    for number in numbers:
        sample = dataset.collater([dataset[int(number)]])
        targets.append(sample["target"][0, skip:])
        for who, found in ((model, students), (teacher, teachers)):
            if who is not None:
                features = who.eval()(**sample["net_input"], features_only=True)[0]
                found.append(features[0, skip:])
                layers[who] = who.decoder.output_projection.weight.detach()
    heads = [Head(torch.cat(found), layers[who]) for who, found in ((model, students), (teacher, teachers)) if found]
    return Group(heads[0], heads[1:], torch.cat(targets), [len(target) for target in targets])


@pytest.mark.parametrize(
    ("held_out", "rule", "options"),
    [
        ("0.2", "independent", ()),
        ("test", "convex", ("--sentence-avg",)),
        ("0.2", "convex", ("--ignore-prefix-size", 1, "--label-smoothing", 0.1, "--confidence-penalty", 0.2)),
    ],
)
def test_a_refresh(
    held_out: str, rule: str, options: tuple, data: Path, teacher: Path, caplog: pytest.LogCaptureFixture
):
    given = ("--held-out", held_out, "--weight-rule", rule, "--refresh-change", CHANGE, *options)
    found, task, model = refreshing(data, teacher, *given)
    model.train()
    found.begin_training(1, model)
    gate, training = found.gate(), task.dataset("train")
    found.begin_training(1, model)  # as in a resumed run
    gate.state["lengths"] += 1
    with pytest.raises(UserError, match="the checkpoint has weights of other training sentences, or in another order"):
        found.begin_training(1, model)
    aside = gate.state["held_out"].nonzero().flatten().tolist()
    assert len(aside) == (18 if held_out == "0.2" else 0)
    before = {name: value.clone() for name, value in gate.state.items()}
    for epoch in range(1, INTERVAL):
        found.begin_epoch(epoch, model)
    assert cl.differences(gate.state, before) == {}
    assert not gate.state["learned"].any()

    # The sentences: every one that is trained on, once, in groups of two batches, in random order.
    other, groups = found.plan(INTERVAL, model)
    walked = [int(number) for batches, _ in groups for batch in batches for number in batch]
    trained = short(training) - set(aside)
    assert sorted(walked) == sorted(trained)
    assert 40 < len(trained) < TRAINED - len(aside)
    assert [len(batches) for batches, _ in groups[:-1]] == [2] * (len(groups) - 1)
    assert len(groups[-1][0]) in (1, 2)
    sizes = [[max(training.sizes[i].max() for i in batch) * len(batch) for batch in batches] for batches, _ in groups]
    assert max(map(max, sizes)) <= 60
    assert max(len(batch) for batches, _ in groups for batch in batches) <= 7
    assert other is (training if held_out == "0.2" else task.dataset("test"))
    against = {int(number) for _, batch in groups for number in batch}
    assert against == (short(other) & set(aside) if held_out == "0.2" else short(other))
    lengths = [np.mean([training.sizes[i].max() for i in batch]) for batches, _ in groups for batch in batches]
    assert lengths != sorted(lengths)

    caplog.set_level(logging.INFO)
    found.begin_epoch(INTERVAL, model)
    assert gate.state["epoch"] == INTERVAL
    assert gate.state["learned"].nonzero().flatten().tolist() == sorted(trained)
    assert model.training

    # The weights, computed from features of one sentence at a time.
    (source,) = task.load_teacher().models
    skip = 1 if "--ignore-prefix-size" in options else 0
    o = Options(
        found.criterion.gate,
        teacher_temperature=found.criterion.teacher_temperature,
        label_smoothing=0.1 if skip else 0.0,
        confidence_penalty=0.2 if skip else 0.0,
    )
    expected = torch.stack([before["data"], before["teacher"]], 1)
    start = expected.clone()
    for batches, there in groups:
        numbers = np.concatenate(batches)
        group = one_by_one(model, source, training, numbers, skip)
        held = one_by_one(model, None, other, there, skip)
        divisor = len(numbers) if "--sentence-avg" in options else len(group.target)
        for _ in range(5):
            rate = RATES[-1] / divisor
            weights = expected[numbers]
            expected[numbers] = step(weights, meta_gradient(group, weights, held, rate, o), CHANGE / 5, rule)
    table = torch.stack([gate.state["data"], gate.state["teacher"]], 1)
    torch.testing.assert_close(table, expected, rtol=1e-3, atol=2e-4)
    moved = (expected - start)[sorted(trained)]
    assert moved.abs().median() > CHANGE / 4

    # The logged numbers.
    (line,) = [record.getMessage() for record in caplog.records if " refreshed in " in record.getMessage()]
    assert line.startswith(f"weights of {len(trained)} sentences refreshed in ")
    data_change, teacher_change = moved.abs().median(0).values.tolist()
    data_now, teacher_now = expected[sorted(trained)].median(0).values.tolist()
    logged = [float(word.strip(",;")) for word in line.split() if word.strip(",;").replace(".", "", 1).isdigit()]
    assert logged[2:] == pytest.approx([data_change, teacher_change, data_now, teacher_now], abs=2e-3)

    # A refresh is done once per epoch, also if the run is resumed in it.
    again = {name: value.clone() for name, value in gate.state.items()}
    found.begin_epoch(INTERVAL, model)
    found.begin_epoch(INTERVAL + 1, model)
    assert cl.differences(gate.state, again) == {}


def test_of_other_data(data: Path, teacher: Path):
    found, _, model = refreshing(data, teacher, "--held-out", "0.2")
    found.gate().begin(torch.zeros(TRAINED, dtype=torch.bool))
    with pytest.raises(UserError, match=rf"the checkpoint has weights of {TRAINED} training sentences of which others"):
        found.begin_training(1, model)


def test_no_held_out_sentence_is_short_enough(data: Path, teacher: Path):
    found, _, model = refreshing(data, teacher, "--held-out", "test", "--max-source-positions", 1)
    with pytest.raises(UserError, match=r"--held-out test: none of its sentences is short enough; keep more aside"):
        found.begin_training(1, model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--divergence", "js"), "--divergence js: gate instance learns its weights with kl; drop the option"),
        (
            ("--teacher-temperature-start", 4, "--max-update", 9),
            "--teacher-temperature-start: gate instance learns its weights at one temperature; drop it",
        ),
        (("--held-out", 0.51), r"--held-out 0.51: a share of the training sentences above 0, at most 0.5"),
        (("--held-out", 0), r"--held-out 0.0: a share of the training sentences above 0"),
        (("--upsample-primary", 2), "--held-out: with --upsample-primary copies of the sentences kept aside"),
        (("--held-out", "train12"), "--held-out train12: that is trained on; name another subset"),
        (("--held-out", "valid"), "--held-out valid: --valid-subset chooses the checkpoint by it"),
        (
            ("--held-out", "valid1", "--combine-valid-subsets", "--valid-subset", "test"),
            "--held-out valid1: --valid-subset chooses the checkpoint by it",
        ),
        (("--held-out", "other"), "--held-out other: there is no such subset in"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_refreshed(options: tuple, message: str, data: Path, teacher: Path):
    cfg, task, _ = build(data, "--teacher-path", teacher, *options)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        task.build_criterion(cfg.criterion)
