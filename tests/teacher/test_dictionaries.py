"""Tests of a teacher with a larger dictionary than its student's, of which rows are selected and probabilities are
renormalised, against fp64."""

import random
from pathlib import Path

import binarised_corpus
import command_line as cl
import pytest
import torch
from fairseq.data import Dictionary
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq import cli, plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head, gated_distillation
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.teacher import dictionaries
from hgkd_fairseq.teacher.dictionaries import Selection
from hgkd_fairseq.teacher.live import LiveTeacher
from hgkd_fairseq.teacher.signals import Dense

CPU, FP32 = torch.device("cpu"), torch.float32
DROPPED = ("t26", "t27", "t28", "t29", "w29")
PAD, EOS = 1, 2

plugin.register()


def rebinarised(data: Path, folder: Path, keep) -> Path:
    """Write the data with a dictionary of the symbols `keep(old symbols)` to a folder, and return it."""
    symbols = [line.split()[0] for line in (data / "dict.en.txt").read_text().splitlines()]
    dictionary = binarised_corpus.dictionary_of(keep(symbols))
    for subset in ("train", "valid", "test"):
        sides = binarised_corpus.read(data, subset, "de-en")
        binarised_corpus.write(folder, subset, "de-en", sides, (dictionary, dictionary))
    return folder


@pytest.fixture(scope="module")
def pruned(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the data with a dictionary that lacks some symbols and has the others in another order."""

    def keep(symbols: list[str]) -> list[str]:
        kept = [symbol for symbol in symbols if symbol not in DROPPED and not symbol.startswith("madeup")]
        random.Random(1).shuffle(kept)
        return kept

    return rebinarised(data, tmp_path_factory.mktemp("pruned"), keep)


@pytest.fixture(scope="module")
def reordered(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rebinarised(data, tmp_path_factory.mktemp("reordered"), lambda symbols: symbols[::-1])


def make_task(data: Path) -> TranslationTask:
    usual = {"train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1}
    task = TranslationTask.setup_task(TranslationConfig(data=str(data), source_lang="de", target_lang="en", **usual))
    task.load_dataset("valid")
    return task


def load(task: TranslationTask, *paths) -> LiveTeacher:
    return LiveTeacher([str(path) for path in paths], task.src_dict, task.tgt_dict, languages=("de", "en"))


def batch_of(task: TranslationTask, count: int = 24) -> dict:
    return task.dataset("valid").collater([task.dataset("valid")[index] for index in range(count)])


def by_hand(path: Path, data: Path, task: TranslationTask, batch: dict) -> torch.Tensor:
    """Return the fp64 logits (B, T, V) of a teacher that gets the batch in its own ids: those of the task's symbols,
    and those of all of its own."""
    own = make_task(data)
    alone = load(own, path).models[0].double()

    def translated(ids: torch.Tensor, mine, theirs) -> torch.Tensor:
        return torch.tensor([[theirs.indices[mine.symbols[index]] for index in row] for row in ids.tolist()])

    source = translated(batch["net_input"]["src_tokens"], task.src_dict, own.src_dict)
    previous = translated(batch["net_input"]["prev_output_tokens"], task.tgt_dict, own.tgt_dict)
    with torch.no_grad():
        logits = alone(source, batch["net_input"]["src_lengths"], previous)[0]
    columns = [own.tgt_dict.indices[symbol] for symbol in task.tgt_dict.symbols]
    return logits[..., columns], logits


IMPLEMENTATIONS = ("eager", "chunked", "native", "auto")


@pytest.mark.parametrize("gate", ["always", "token", "sentence", "selective-batch"])
def test_loss_is_that_of_the_renormalised_teacher(gate: str, data: Path, teacher: cl.Run, pruned: Path):
    """KL, decisions and gradients of every implementation, at two temperatures, equal those in fp64 over the student's
    symbols alone."""
    task = make_task(pruned)
    batch = batch_of(task)
    kept = batch["target"] != PAD
    path = teacher.path("checkpoint_best.pt")
    logits, _ = by_hand(path, data, task, batch)
    signal = load(task, path).signal(batch, CPU, FP32)
    (head,) = signal.heads
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(*kept.shape, 12, generator=generator)
    weight = torch.randn(len(task.tgt_dict), 12, generator=generator) / 2
    for tau in (1.0, 1.5):
        usual = {"padding_idx": PAD, "gate": gate, "teacher_temperature": tau}
        wide = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
        expected = gated_distillation(*wide, logits, None, batch["target"], implementation="eager", **usual)
        gradients = torch.autograd.grad(expected.loss, wide)
        q = (logits[kept] / tau).softmax(-1)
        logp = (wide[0] @ wide[1].t())[kept].log_softmax(-1)
        kl = (q * (q.log() - logp)).sum(-1)
        torch.testing.assert_close(expected.kd, kl[expected.teacher_mask[kept]].sum(), rtol=1e-10, atol=1e-10)
        for implementation in IMPLEMENTATIONS:
            narrow = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
            out = gated_distillation(
                *narrow, head.hidden, head.weight, batch["target"], implementation=implementation, **usual
            )
            assert torch.equal(out.teacher_mask, expected.teacher_mask)
            assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
            for got, wanted in zip(torch.autograd.grad(out.loss, narrow), gradients, strict=True):
                assert (got.double() - wanted).norm() <= 1e-5 * wanted.norm()


def test_lost_mass(data: Path, teacher: cl.Run, pruned: Path):
    """The lost mass of an ensemble is the mean of its members', and 0 for one with the student's dictionary."""
    task = make_task(pruned)
    batch = batch_of(task)
    kept = batch["target"] != PAD
    logits, whole = by_hand(teacher.path(), data, task, batch)
    expected = 1 - (logits.logsumexp(-1) - whole.logsumexp(-1)).exp()[kept]
    assert float(expected.max()) > 0.05  # else nothing is compared
    signal = load(task, teacher.path()).signal(batch, CPU, FP32)
    torch.testing.assert_close(dictionaries.lost_mass(signal, kept).double(), expected, rtol=1e-4, atol=1e-6)
    whole = (*signal.whole, signal.heads[0])
    both = Dense([*signal.heads, signal.heads[0]], whole=whole)
    torch.testing.assert_close(dictionaries.lost_mass(both, kept).double(), expected / 2, rtol=1e-4, atol=1e-6)
    assert dictionaries.lost_mass(signal.after(2), kept[:, 2:]).numel() == int(kept[:, 2:].sum())


@pytest.mark.parametrize("bias", [True, False])
def test_rows_of_an_output_layer(bias: bool):
    """The rows of the student's symbols are selected from weight and bias, also after a change of precision, and from
    the log-probabilities of a model without an output layer."""
    ids = torch.tensor([4, 0, 2])
    selection = Selection(None, ids)
    weight = torch.randn(5, 3, generator=torch.Generator().manual_seed(2))
    hidden, b = torch.ones(2, 3), torch.arange(5.0) if bias else None
    for kind in (torch.float32, torch.float64, torch.float32):
        whole = Head(hidden, weight, b).map(lambda tensor, kind=kind: tensor.to(kind))
        found = selection.head(whole)
        assert found.weight.dtype == kind
        assert torch.equal(found.weight, whole.weight[ids])
        assert (found.bias is None) == (b is None)
        assert b is None or torch.equal(found.bias, whole.bias[ids])
    assert torch.equal(selection.head(Head(weight.t(), None)).hidden, weight.t()[..., ids])


def test_another_order_is_the_same_teacher(data: Path, teacher: cl.Run, reordered: Path):
    """A dictionary in another order changes no hidden state, no probability but for rounding, and loses no mass."""
    same, other = make_task(data), make_task(reordered)
    one, two = (load(task, teacher.path()) for task in (same, other))
    signals = [each.signal(batch_of(task), CPU, FP32) for each, task in ((one, same), (two, other))]
    first, second = (mean_logprobs(signal.heads, 1.5) for signal in signals)
    columns = [other.tgt_dict.indices[symbol] for symbol in same.tgt_dict.symbols]
    torch.testing.assert_close(second[..., columns], first, rtol=0, atol=2e-6)  # sums of another order
    assert torch.equal(signals[0].heads[0].hidden, signals[1].heads[0].hidden)
    assert [len(signal.whole) for signal in signals] == [0, 0]
    # The fingerprint depends on the selected ids, so that a run is resumed with the same ones.
    assert one.fingerprint != two.fingerprint
    assert two.fingerprint.startswith(one.fingerprint)


def test_an_ensemble_with_another_dictionary(data: Path, teacher: cl.Run, plain: cl.Run, pruned: Path):
    """The distribution of an ensemble is the mean of its renormalised members'."""
    task = make_task(pruned)
    batch = batch_of(task)
    members = [load(task, path).signal(batch, CPU, FP32) for path in (teacher.path(), plain.path())]
    expected = torch.stack([signal.heads[0].hidden @ signal.heads[0].weight.t() for signal in members]).softmax(-1)
    both = load(task, teacher.path(), plain.path()).signal(batch, CPU, FP32)
    torch.testing.assert_close(mean_logprobs(both.heads, 1.0).exp(), expected.mean(0), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("symbols", "expected"),
    [(["w1", "new"], "type 5 of the student's, 'new', is none of the teacher's"), (["w1"], None)],
)
def test_a_symbol_that_the_teacher_lacks(symbols: list[str], expected: str | None):
    teacher = binarised_corpus.dictionary_of(["w0", "w1"])
    found = dictionaries.difference(teacher, binarised_corpus.dictionary_of(symbols))
    assert found == expected or found.startswith(expected)
    if expected is None:
        assert dictionaries.ids(teacher, binarised_corpus.dictionary_of(symbols)).tolist() == [0, 1, 2, 3, 5]
        assert dictionaries.ids(teacher, teacher) is None


@pytest.mark.parametrize("name", ["pad", "eos", "unk"])
def test_special_symbols_that_differ(name: str):
    """Dictionaries of the same symbols are refused if a special symbol of one is a word of the other."""
    symbols = {"pad": "<pad>", "eos": "</s>", "unk": "<unk>"}
    teacher, student = Dictionary(**{name: "w0"}), Dictionary()
    for dictionary in (teacher, student):
        for symbol in ("w0", symbols[name]):
            dictionary.add_symbol(symbol)
    expected = f"{name} is 'w0' for the teacher and {symbols[name]!r} for the student"
    assert dictionaries.difference(teacher, student) == expected


def test_training(data: Path, teacher: cl.Run, pruned: Path, tmp_path: Path):
    """fairseq-train logs the lost mass at the start and in validation, and warns of it."""
    run = cl.train(
        pruned, tmp_path / "run", *cl.distil(teacher.path("checkpoint_best.pt"), "--max-epoch", 2, *cl.KEEP_LAST)
    )
    start = [line for line in run.result.output.splitlines() if "(teacher_lost_mass)" in line]
    assert len(start) == 1
    lost = [row["teacher_lost_mass"] for row in run.result.logs("valid")]
    assert lost[0] == lost[1] > dictionaries.MOST_LOST  # constant, as the teacher is frozen
    task = make_task(pruned)
    whole = batch_of(task, len(task.dataset("valid")))
    kept = whole["target"] != PAD
    signal = load(task, teacher.path("checkpoint_best.pt")).signal(whole, CPU, FP32)
    assert lost[0] == pytest.approx(float(dictionaries.lost_mass(signal, kept).mean()), abs=1e-4)
    assert not any("teacher_lost_mass" in row for row in run.result.logs("train"))
    assert all(row["teacher_share"] > 0 for row in run.result.logs("valid"))
    unknown = float((whole["target"][kept] == task.tgt_dict.unk()).double().mean())
    assert unknown > dictionaries.MOST_UNKNOWN
    assert "are unknown to the student's dictionary, more than 1 %" in run.result.output
    assert "to symbols that the student's dictionary lacks, more than 5 %" in run.result.output


def test_a_store_holds_the_students_symbols(
    data: Path, teacher: cl.Run, pruned: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """hgkd store writes the selected output layer; hgkd translate and hgkd calibration refuse such a model."""
    from hgkd_fairseq.teacher.stored import StoredTeacher

    words = ["store", pruned, "--teacher-path", teacher.path(), "--subset", "valid", "--dtype", "fp32", "--cpu"]
    assert cli.main([str(word) for word in (*words, "--output", tmp_path / "store")]) == 0
    task = make_task(pruned)
    live = load(task, teacher.path())
    stored = StoredTeacher(str(tmp_path / "store"), task.src_dict, task.tgt_dict)
    assert stored.fingerprint == live.fingerprint
    stored.attach("valid", 0, task.dataset("valid"))
    batch = batch_of(task)
    kept = batch["target"] != PAD
    (one,), (other,) = (each.signal(batch, CPU, FP32).heads for each in (stored, live))
    assert torch.equal(one.weight, other.weight)
    torch.testing.assert_close(one.hidden[kept], other.hidden[kept], rtol=1e-4, atol=1e-5)
    capsys.readouterr()
    for words in (
        (
            "translate",
            pruned,
            "--teacher-path",
            teacher.path(),
            "--output",
            tmp_path / "t",
            "--subset",
            "valid",
            "--cpu",
        ),
        ("calibration", "forced", pruned, "--path", teacher.path(), "--gen-subset", "valid", "--cpu"),
    ):
        assert cli.main([str(word) for word in words]) == 1
        message = capsys.readouterr().err.strip().splitlines()
        assert len(message) == 1
        assert "dictionary" in message[0]
        assert "types" in message[0]


def test_refused(data: Path, teacher: cl.Run, tmp_path: Path):
    folder = rebinarised(data, tmp_path / "more", lambda symbols: [*symbols[:5], "renamed"])
    with pytest.raises(UserError, match="type 9 of the student's, 'renamed', is none of the teacher's"):
        load(make_task(folder), teacher.path())
