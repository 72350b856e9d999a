"""Tests of the teacher: frozen, outside every module and every checkpoint, of any architecture."""

import io
import math
from argparse import Namespace
from pathlib import Path

import command_line as cl
import pytest
import torch
from fairseq.logging import metrics
from fairseq.optim.sgd import SGD
from omegaconf import OmegaConf

from hgkd_fairseq.criterions.from_data import gold_logprob
from hgkd_fairseq.gates import get_gate
from hgkd_fairseq.loss.eager import mean_logprobs


@pytest.fixture(scope="module")
def parts(data: Path, teacher: cl.Run):
    """Return (task, model, criterion, batch) as fairseq-train builds them, in train mode."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    arguments = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *cl.distil(teacher.path("checkpoint_best.pt")))
    extra = ("--eval-bleu", "--dropout", 0.3, "--report-accuracy")
    parser = options.get_training_parser()
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, [str(a) for a in (*arguments, *extra)]))
    task = tasks.setup_task(cfg.task)
    assert task.teacher is None  # setting up for generation never loads it
    model = task.build_model(cfg.model)
    assert task.teacher is None  # nor does building the student
    criterion = task.build_criterion(cfg.criterion)
    task.load_dataset("train")
    sample = task.dataset("train").collater([task.dataset("train")[i] for i in range(8)])
    model.train()
    criterion.train()
    return task, model, criterion, sample


def test_frozen_and_without_dropout(parts):
    task, model, criterion, sample = parts
    before = [p.detach().clone() for p in task.teacher.models[0].parameters()]
    one, other = (task.teacher.signal(sample, torch.device("cpu"), torch.float32).heads[0].hidden for _ in range(2))
    assert torch.equal(one, other)
    assert not one.requires_grad
    # The student's dropout is active at the same time; otherwise the comparison shows nothing.
    student = [model(**sample["net_input"])[0] for _ in range(2)]
    assert not torch.equal(*student)

    loss, _, _ = criterion(model, sample)
    loss.backward()
    for module in task.teacher.models[0].modules():
        assert not module.training
    for parameter, old in zip(task.teacher.models[0].parameters(), before, strict=True):
        assert not parameter.requires_grad
        assert parameter.grad is None
        assert torch.equal(parameter, old)


def test_the_gate_reads_the_student_without_dropout(parts):
    """With --gate-dropout off the gate reads the model in eval mode, and the loss keeps its dropout and its random
    numbers."""
    task, model, criterion, sample = parts
    target = sample["target"]
    kept = target != task.target_dictionary.pad()
    model.eval()
    with torch.no_grad():
        logp = model(**sample["net_input"])[0].log_softmax(-1).gather(2, target[..., None]).squeeze(2)
    model.train()
    frozen = model.encoder.layers[0]
    frozen.eval()  # a module that is in eval mode stays in it
    torch.manual_seed(3)
    read = gold_logprob(model, sample, target, padding_idx=task.target_dictionary.pad(), implementation="auto")
    torch.testing.assert_close(read[kept], logp[kept], rtol=1e-4, atol=1e-4)
    assert model.training
    assert not frozen.training
    nothing = target[:, :0]  # with --ignore-prefix-size, for a batch of short lines
    assert gold_logprob(model, sample, nothing, padding_idx=1, implementation="auto").shape == nothing.shape
    frozen.train()
    results, gate = {}, criterion.gate
    criterion.gate = get_gate("soft")  # its share shows what the gate reads of each token
    for dropout in ("on", "off"):
        criterion.cfg.gate_dropout = dropout
        torch.manual_seed(3)
        results[dropout] = criterion(model, sample)[2]
    criterion.cfg.gate_dropout, criterion.gate = "on", gate
    assert results["on"]["nll_loss"] == results["off"]["nll_loss"]
    teacher = task.teacher.signal(sample, torch.device("cpu"), torch.float32).heads
    logq = mean_logprobs(teacher, 1.5).gather(2, target[..., None]).squeeze(2)
    expected = (logp - logq).sigmoid()[kept].sum()
    torch.testing.assert_close(results["off"]["teacher_share"], expected, rtol=1e-4, atol=0)
    assert abs(results["on"]["teacher_share"] - expected) > 1e-3 * expected


def test_outside_every_module(parts):
    task, model, criterion, _ = parts
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}
    assert list(criterion.modules()) == [criterion]
    theirs = {id(p) for p in task.teacher.models[0].parameters()}
    assert theirs.isdisjoint(id(p) for p in model.parameters())
    assert not any("teacher" in str(key).lower() for key in task.state_dict())


def test_generator_holds_the_student(parts):
    task, model, _, _ = parts
    assert task.teacher is not None
    assert list(task.sequence_generator.model.models) == [model]


def test_prefix_and_sentence_average(parts):
    """--ignore-prefix-size leaves the first tokens out of every sum; --sentence-avg divides by sentences."""
    _, model, criterion, sample = parts
    from fairseq.utils import strip_pad

    model.eval()
    usual = criterion.cfg
    try:
        with torch.no_grad():
            logp = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
            expected = 0.0
            for row, target in zip(logp, sample["target"], strict=True):
                gold = strip_pad(target, 1)
                expected -= float(row[: len(gold)].gather(1, gold[:, None])[2:].sum())
            criterion.cfg = OmegaConf.merge(usual, {"ignore_prefix_size": 2, "sentence_avg": True})
            _, sample_size, log = criterion(model, sample)
    finally:
        criterion.cfg = usual
        model.train()
    lengths = sample["target"].ne(1).sum(1)
    assert log["nll_loss"].item() == pytest.approx(expected, rel=1e-5)
    assert log["tokens"].item() == (lengths - 2).clamp(min=0).sum().item()
    assert sample_size == 8


def test_an_idle_batch_is_not_remembered(parts):
    """No gate remembers the batch that fairseq repeats, without its gradient, for a worker that has no more batches."""
    task, model, criterion, sample = parts
    usual, criterion.gate = criterion.gate, get_gate("selective-global")
    optimizer = SGD(Namespace(lr=[0.1], momentum=0.0, weight_decay=0.0), model.parameters())
    try:
        for idle in (True, False):
            model.zero_grad()
            task.train_step(sample, model, criterion, optimizer, 1, ignore_grad=idle)
            queue = task.training_state.memory["gate"]["queue"]
            assert bool(queue.isfinite().any()) is not idle
            assert any(bool(p.grad.any()) for p in model.parameters() if p.grad is not None) is not idle
    finally:
        criterion.gate = usual
        task.training_state.memory.clear()
        task.training_state.updates, task.training_state.idle = None, False


def test_a_student_of_nan_is_validated(parts):
    """A run that has diverged in its last update is validated with metrics of nan, as with fairseq's cross_entropy."""
    _, model, criterion, sample = parts
    layer = model.decoder.output_projection.weight
    kept = layer.detach().clone()
    model.eval()
    try:
        with torch.no_grad():
            layer.fill_(torch.nan)
            loss, _, log = criterion(model, sample)
            diverged = aggregated(criterion, [log])
            layer.copy_(kept)
            fine = aggregated(criterion, [criterion(model, sample)[2]])
    finally:
        model.train()
    assert loss.isnan()
    assert diverged.keys() == fine.keys()
    assert math.isnan(diverged["nll_loss"])
    assert 0 < fine["ece"] < 1


def aggregated(criterion, logs: list[dict]) -> dict[str, float]:
    """Return the metrics that fairseq prints for log outputs."""
    with metrics.aggregate() as found:
        criterion.reduce_metrics(logs)
    return found.get_smoothed_values()


def test_a_batch_of_pads_is_logged(parts):
    """A batch without tokens, such as a worker's dummy batch, gives sums of 0 and no division by them."""
    task, model, criterion, sample = parts
    empty = {**sample, "target": torch.full_like(sample["target"], task.target_dictionary.pad()), "ntokens": 0}
    empty.pop("target_lengths")
    loss, sample_size, log = criterion(model, empty)
    loss.backward()
    assert (loss.item(), sample_size, log["tokens"].item()) == (0, 0, 0)
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    found = aggregated(criterion, [log])
    assert [found[name] for name in ("loss", "nll_loss", "kd_loss", "teacher_share", "gap")] == [0] * 5
    whole = criterion(model, sample)[2]
    assert aggregated(criterion, [log, whole])["nll_loss"] == aggregated(criterion, [whole])["nll_loss"]


ADAPTIVE = ("--adaptive-softmax-cutoff", "10,20")


def tensors(state) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    values = state.values() if isinstance(state, dict) else state if isinstance(state, list | tuple) else ()
    return [tensor for value in values for tensor in tensors(value)]


@pytest.fixture(scope="module")
def architectures(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, cl.Run]:
    """Return students and teachers of several architectures; the first two, and `teacher`, teach the later ones."""
    folder = tmp_path_factory.mktemp("architectures")
    short = ("--max-update", 6, *cl.KEEP_LAST)
    lstm = ("--arch", "lstm", "--encoder-embed-dim", 24, "--decoder-embed-dim", 24, "--decoder-out-embed-dim", 24)
    lstm = (*lstm, "--encoder-hidden-size", 24, "--decoder-hidden-size", 24)
    wide = ("--encoder-ffn-embed-dim", 48, "--encoder-embed-dim", 64, "--decoder-embed-dim", 64)
    adaptive = (*cl.SIZE, *wide, *ADAPTIVE)
    tied = (*cl.SIZE, *cl.TIED)
    ce = ("--criterion", "label_smoothed_cross_entropy", "--memory-efficient-fp16", "--fp16-init-scale", 4)

    def run(name: str, size: tuple, *options) -> cl.Run:
        return cl.train(data, folder / name, *options, *short, size=size)

    def path(name: str) -> Path:
        return folder / name / "checkpoint_last.pt"

    names = ("lstm", "adaptive", "plain fp16", "untied", "shared", "ensemble fp16")
    runs = cl.together(
        lambda: run("lstm", lstm, *cl.distil(teacher.path())),
        lambda: run("adaptive", adaptive, "--criterion", "adaptive_loss", "--ddp-backend", "legacy_ddp"),
        lambda: run("plain fp16", tied, *ce),
    )
    runs += cl.together(
        lambda: run("untied", cl.SIZE, *cl.distil(path("lstm"))),
        lambda: run("shared", (*cl.SIZE, "--share-decoder-input-output-embed"), *cl.distil(path("adaptive"))),
        lambda: run("ensemble fp16", tied, *cl.distil(f"{teacher.path()}:{path('untied')}", *ce[2:])),
    )
    return dict(zip(names, runs, strict=True))


@pytest.mark.parametrize(
    ("name", "warned"),
    [
        ("lstm", "LSTMModel"),
        ("untied", "LSTMModel"),
        ("shared", "TransformerModel"),
        ("ensemble fp16", None),
    ],
)
def test_architectures(name: str, warned: str | None, architectures: dict[str, cl.Run]):
    """A student or teacher without a plain linear output layer works, with one warning that names it."""
    run = architectures[name]
    lines = [line for line in run.result.output.splitlines() if "has no plain linear output layer" in line]
    assert len(lines) == (warned is not None)
    if warned:
        assert warned in lines[0]
    (log,) = run.result.logs("train")
    assert log["num_updates"] == 6
    assert 0 < log["teacher_share"] < 1
    assert log["loss"] > 0


def size(state: dict) -> int:
    """Return the bytes of a checkpoint without its meters and options, which are large relative to so small a model."""
    buffer = io.BytesIO()
    torch.save({key: value for key, value in state.items() if key not in ("extra_state", "cfg")}, buffer)
    return buffer.tell()


def test_student_with_adaptive_softmax(data: Path, teacher: cl.Run, tmp_path: Path):
    """A student with adaptive softmax, whose log-probabilities fairseq cannot differentiate, is refused at the first
    step."""
    arguments = (data, *cl.SIZE, *ADAPTIVE, *cl.STEPS, *cl.LOGS, *cl.distil(teacher.path()), "--save-dir", tmp_path)
    result = cl.fairseq("train", *arguments, "--max-update", 2, "--no-save")
    assert result.code != 0
    (error,) = result.errors()
    assert "a student with --adaptive-softmax-cutoff cannot be distilled" in error
    assert "Traceback" not in result.output


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_teacher_in_the_checkpoint(precision: str, request: pytest.FixtureRequest, teacher: cl.Run):
    """No tensor of the teacher is in the student's checkpoint, whose size, without meters and options, is within 1 % of
    that of a run without a teacher."""
    if precision == "fp32":
        ours, theirs = request.getfixturevalue("student"), request.getfixturevalue("plain")
    else:
        runs = request.getfixturevalue("architectures")
        ours, theirs = runs["ensemble fp16"], runs["plain fp16"]
    state = ours.state()
    taught = [t for t in tensors(teacher.state("checkpoint_best.pt")["model"]) if t.numel() > 4]
    assert len(taught) > 30
    for tensor in tensors(state):
        assert not any(
            tensor.shape == t.shape and torch.equal(tensor.float(), t.to(tensor.dtype).float()) for t in taught
        )
    assert state["model"].keys() == theirs.state()["model"].keys()
    assert size(state) == pytest.approx(size(theirs.state()), rel=0.01)
    assert not any("teacher" in key for key in state["model"])
