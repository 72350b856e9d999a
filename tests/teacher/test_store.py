"""Tests of stored teachers: a store gives what the live teacher gives."""

import itertools
import shutil
from pathlib import Path

import command_line as cl
import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.data import ConcatDataset, LanguagePairDataset
from making_stores import (
    CPU,
    FP32,
    FROM_A_STORE,
    TranslationWithTeacherTask,
    batches,
    command,
    make_task,
    of_kind,
    write,
)

from hgkd_fairseq import cli
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.files import mismatch
from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.teacher import Dense, Sparse, inputs
from hgkd_fairseq.teacher.live import LiveTeacher
from hgkd_fairseq.teacher.store import MANIFEST, Store
from hgkd_fairseq.teacher.stored import BATCH, numbering


def test_hidden_states_teach_as_the_teacher_does(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    """Stored and live teacher lead to the same decisions, loss and gradients on each batch of a shuffled epoch, which
    two workers read. The student is the teacher with noise."""
    task = make_task(data, teacher_store=str(stores["hidden"]))
    task.load_teacher()
    weight = live.teacher.models[0].decoder.output_projection.weight.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    seen, opened = 0, 0
    reader = batches(task, workers=2)
    read = list(reader)
    reader._itr._shutdown_workers()  # else garbage collection waits ten seconds for them
    for one, other in zip(batches(live), read, strict=True):
        assert torch.equal(one["id"], other["id"])
        found, signals = [], [some.teacher.signal(batch, CPU, FP32) for some, batch in ((live, one), (task, other))]
        hidden = signals[0].heads[0].hidden
        features = (hidden + torch.randn(hidden.shape, generator=generator)).requires_grad_()
        for signal in signals:
            (head,) = signal.heads
            out = gated_distillation(
                features, weight, head.hidden, head.weight, one["target"], padding_idx=1,
                teacher_gold=None if signal.gold is None else signal.gold.at(1.5),
            )  # fmt: skip
            found.append((out, *torch.autograd.grad(out.loss, (features, weight))))
        (out, *gradients), (expected, *others) = found
        assert torch.equal(out.teacher_mask, expected.teacher_mask)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
        assert out.kd.item() == pytest.approx(expected.kd.item(), rel=2e-6)
        for got, wanted in zip(gradients, others, strict=True):
            assert (got - wanted).norm() <= 1e-6 * wanted.norm()
        seen, opened = seen + int(out.tokens), opened + int(out.teacher_tokens)
    assert seen == live.dataset("train").tgt_sizes.sum()
    assert 0.05 < opened / seen < 0.95


def test_a_student_of_a_store_is_that_of_the_teacher(student: cl.Run, distilled: cl.Run):
    """A student of a store equals `student`, which had the live teacher, but for rounding: the hidden states of the
    store were computed in batches with other padding."""
    for mine, theirs in zip(distilled.result.logs("train"), student.result.logs("train"), strict=True):
        for name in ("loss", "kd_loss", "teacher_share"):
            assert mine[name] == pytest.approx(theirs[name], abs=0.0021)
    gaps = cl.differences(distilled.state()["model"], student.state()["model"])
    assert max(gaps.values(), default=0.0) < 1e-3


def test_it_is_validated_by_either_and_translates_without(
    data: Path, teacher: cl.Run, distilled: cl.Run, stores: dict[str, Path]
):
    """A student whose store is deleted is validated with another copy of it or with the live teacher, and translates
    without a teacher."""
    common = (data, "--path", distilled.path(), *cl.LOGS)
    validate = (*common, *FROM_A_STORE, "--max-tokens", 800)
    stored, live, generated = cl.together(
        lambda: cl.fairseq("validate", *validate, "--teacher-store", stores["hidden"]),
        lambda: cl.fairseq("validate", *validate, "--teacher-store", "", "--teacher-path", teacher.path()),
        lambda: cl.fairseq("generate", *common, *cl.USER_DIR, "--beam", 2, "--gen-subset", "valid"),
    )
    assert [one.code for one in (stored, live, generated)] == [0, 0, 0], stored.end() + live.end() + generated.end()
    (mine,), (theirs,) = stored.logs("valid"), live.logs("valid")
    assert 0 < mine["teacher_share"] < 1
    for name in ("loss", "nll_loss", "kd_loss", "teacher_share"):
        assert mine[name] == pytest.approx(theirs[name], abs=0.0011)
    assert len(generated.hypotheses()) == 64


def test_gold_statistics(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    stored = {kind: make_task(data, teacher_store=str(stores[kind])) for kind in ("hidden", "sampled", "topk", "bf16")}
    for task in stored.values():
        task.load_teacher()
    for sample, *others in zip(
        batches(live, "valid"), *[batches(one, "valid") for one in stored.values()], strict=True
    ):
        (head,) = live.teacher.signal(sample, CPU, FP32).heads
        kept, target = sample["target"] != 1, sample["target"][..., None]
        logq, tempered = (mean_logprobs([head], tau) for tau in (1.0, 1.5))
        wanted = (
            *(one.gather(2, target).squeeze(2) for one in (logq, tempered)),
            -(tempered.exp() * tempered).sum(2),
        )
        for task, other in zip(stored.values(), others, strict=True):
            # fairseq-train --fp16 converts a batch in this way.
            other = utils.apply_to_sample(lambda t: t.half() if t.dtype == FP32 else t, other)
            gold = task.teacher.signal(other, CPU, FP32).gold
            assert gold.at(1.5) is gold.tempered
            assert gold.at(1.0) is gold.logprob
            assert gold.at(2.0) is None
            assert gold.entropy_at(1.5) is gold.entropy
            assert gold.entropy_at(1.0) is None
            for got, one in zip(gold[1:], wanted, strict=True):
                torch.testing.assert_close(got[kept], one[kept], atol=1e-5, rtol=1e-5)
                assert not got[~kept].any()


def test_gold_statistics_of_an_older_format(stores: dict[str, Path]):
    """The additional column of format 2, the log-sum-exp of the logits, is skipped."""
    store = Store(str(stores["gold"]))
    assert mismatch({**store.manifest, "format": 2}, MANIFEST) is None
    _, now = store.sentence(3)
    older = {**now, "gold": np.insert(now["gold"], 2, 9.0, axis=1)}
    kept = torch.ones(1, len(now["gold"]), dtype=torch.bool)
    found = store.batch([older], kept)["gold"]
    assert found.shape == (1, len(now["gold"]), 3)
    assert torch.equal(found, store.batch([now], kept)["gold"])


def test_half_precision(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    task = make_task(data, teacher_store=str(stores["bf16"]))
    task.load_teacher()
    for one, other in zip(batches(live, "valid"), batches(task, "valid"), strict=True):
        kept = one["target"] != 1
        wanted = live.teacher.signal(one, CPU, FP32).heads[0].hidden[kept]
        found = task.teacher.signal(other, CPU, FP32).heads[0].hidden[kept]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=2**-8)
        assert torch.equal(found.bfloat16().float(), found)


def logprobs(live: TranslationWithTeacherTask, task: TranslationWithTeacherTask, subset: str):
    """Yield, for each batch, the live teacher's log-probabilities (N, V) and the store's sparse distributions."""
    task.load_teacher()
    for one, other in zip(batches(live, subset), batches(task, subset), strict=True):
        kept = one["target"] != 1
        signal = task.teacher.signal(other, CPU, FP32)
        assert isinstance(signal, Sparse)
        logq = mean_logprobs(live.teacher.signal(one, CPU, FP32).heads, 1.5)
        yield logq[kept], signal.distribution.map(lambda tensor, kept=kept: tensor[kept])


def test_draws_are_the_teachers(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    """For each token the number of draws of a type differs from its expectation by less than one; for all training
    tokens together by less than 4.5 standard deviations of independent draws."""
    task = make_task(data, teacher_store=str(stores["sampled"]))
    drawn, expected, variance = (torch.zeros(len(task.tgt_dict), dtype=torch.float64) for _ in range(3))
    for logq, sparse in logprobs(live, task, "train"):
        q = logq.double().exp()
        counts = (sparse.probability * 32).round().double()
        assert torch.equal(counts.sum(1), torch.full((len(q),), 32.0, dtype=torch.float64))
        of_types = torch.zeros_like(q).scatter_add_(1, sparse.ids, counts)
        assert ((of_types - 32 * q).abs() < 1 + 1e-4).all()
        drawn += of_types.sum(0)
        expected += 32 * q.sum(0)
        variance += 32 * (q * (1 - q)).sum(0)
    assert ((drawn - expected).abs() < 4.5 * variance.sqrt() + 1e-9).all()


def test_the_most_probable_tokens(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    task = make_task(data, teacher_store=str(stores["topk"]))
    for logq, sparse in logprobs(live, task, "valid"):
        values, _ = logq.exp().topk(8)
        torch.testing.assert_close(sparse.probability, values, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(logq.exp().gather(1, sparse.ids), values, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(sparse.rest, 1 - values.sum(1), atol=1e-5, rtol=1e-3)


def test_an_ensemble(data: Path, teacher: cl.Run, student: cl.Run, tmp_path: Path):
    paths = f"{teacher.path()}:{student.path()}"
    task = make_task(data)
    both = LiveTeacher(paths.split(":"), task.src_dict, task.tgt_dict)
    for kind in ("hidden", "topk"):
        options = (*of_kind(kind), "--subset", "valid")
        assert cli.main(command(data, paths, tmp_path / kind, *options)) == 0
        stored = make_task(data, teacher_store=str(tmp_path / kind))
        stored.load_teacher()
        for sample in batches(stored, "valid"):
            signal, kept = stored.teacher.signal(sample, CPU, FP32), sample["target"] != 1
            logq = mean_logprobs(both.signal(sample, CPU, FP32).heads, 1.5)
            gold = logq.gather(2, sample["target"][..., None]).squeeze(2)
            torch.testing.assert_close(signal.gold.at(1.5)[kept], gold[kept], atol=1e-5, rtol=1e-5)
            if isinstance(signal, Dense):
                torch.testing.assert_close(mean_logprobs(signal.heads, 1.5)[kept], logq[kept], atol=1e-5, rtol=1e-5)
            else:
                values = logq.exp().topk(8).values
                torch.testing.assert_close(signal.distribution.probability[kept], values[kept], atol=1e-6, rtol=1e-4)


def test_numbers_of_repeated_and_joined_data(data: Path, teacher: cl.Run, tmp_path: Path):
    """Sentences have the right numbers where train1 belongs to train, where --upsample-primary repeats train, and in a
    second folder of data."""
    for place, sizes in (("one", ("train", "valid")), ("two", ("valid", "test"))):
        shutil.copytree(data, tmp_path / place)
        for old, new in zip(sizes, ("train", "train1"), strict=True):
            for file in list(data.glob(f"{old}.*")):
                shutil.copy(file, tmp_path / place / file.name.replace(old, new, 1))
    folders = f"{tmp_path / 'one'}:{tmp_path / 'two'}"
    assert write(folders, teacher, tmp_path / "store", "--kind", "topk", "--subset", "train") == 0
    store = Store(str(tmp_path / "store"))
    assert [part[:4] for part in store.parts] == [("train", 0, 0, 664), ("train", 1, 664, 128)]
    for epoch, (upsample, whole) in itertools.product((1, 2), ((1, 0), (3, 1))):
        task = make_task(folders, teacher_store=str(tmp_path / "store"), upsample_primary=upsample)
        task.load_teacher()
        task.load_dataset("train", epoch=epoch, combine=True)
        dataset = task.dataset("train")
        assert isinstance(dataset.tgt, ConcatDataset)
        number = numbering(dataset.tgt)
        first = (600, 64)[epoch - 1]
        assert len(dataset) == upsample * first + 64
        assert [number(upsample * first + 3), number(2 * whole * first + 3)] == [first + 3, 3]
        sample = dataset.collater([dataset[index] for index in range(0, len(dataset), 7)])
        assert "problem" not in sample[BATCH]


def test_a_sentence_that_was_too_long(data: Path, teacher: cl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A sentence of 10 tokens, more than the teacher's 9 positions, has no rows in the store, and training on it is
    refused with a remedy."""
    from hgkd_fairseq.plugin import features

    monkeypatch.setattr(features, "max_positions", lambda model: (1024, 9))
    assert write(data, teacher, tmp_path / "store", "--subset", "valid") == 0
    task = make_task(data, teacher_store=str(tmp_path / "store"))
    task.load_teacher()
    told = r"valid has a target sentence of 10 tokens, and the teacher of --teacher-store .*store takes 9 at most"
    with pytest.raises(UserError, match=f"{told}; leave longer ones out with --max-target-positions 9"):
        task.load_dataset("valid")
    task = make_task(data, teacher_store=str(tmp_path / "store"), max_target_positions=9)
    task.load_teacher()
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    long = int(np.argmax(dataset.tgt_sizes))
    assert dataset.tgt_sizes[long] == 10
    assert "problem" not in dataset.collater([dataset[i] for i in range(64) if dataset.tgt_sizes[i] < 10])[BATCH]
    assert f"sentence {long} of valid was too long" in dataset.collater([dataset[long]])[BATCH]["problem"]


def test_pairs_that_are_left_out_anyway_do_not_count(data: Path):
    """A source too long for the teacher whose target is too long for the student: the pair is never read."""
    source, target = torch.full((6,), 4), torch.full((9,), 4)
    short = torch.full((3,), 4)

    def check(*rows: tuple[torch.Tensor, torch.Tensor]) -> None:
        sides = [[row[side] for row in rows] for side in (0, 1)]
        sizes = [[len(sentence) for sentence in side] for side in sides]
        dictionary = make_task(data).source_dictionary
        dataset = LanguagePairDataset(sides[0], sizes[0], dictionary, sides[1], sizes[1], dictionary)
        inputs.check_lengths("train", dataset, (5, 8), (1024, 8), "the teacher", "name another")

    check((source, target), (short, short))
    with pytest.raises(UserError, match="train has a source sentence of 6 tokens, and the teacher takes 5 at most"):
        check((source, target), (source, short))


def test_hidden_states_beyond_fp16_are_refused(data: Path, teacher: cl.Run, tmp_path: Path, capsys):
    state = teacher.state()
    for name in ("weight", "bias"):
        state["model"][f"decoder.layers.0.final_layer_norm.{name}"] *= 1e6
    torch.save(state, tmp_path / "large.pt")
    words = ["store", str(data), "--teacher-path", str(tmp_path / "large.pt"), "--output", str(tmp_path / "store")]
    words += ["--subset", "valid", "--cpu", "--kind", "hidden"]
    assert cli.main([*words, "--dtype", "fp16"]) == 1
    assert "--dtype fp16: hidden states of the teacher exceed its range; give bf16 or fp32" in capsys.readouterr().err
    assert cli.main([*words[:5], str(tmp_path / "other"), *words[6:], "--dtype", "bf16"]) == 0


def test_shards_without_a_sentence_that_is_short_enough(
    data: Path, teacher: cl.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """With one sentence per shard, shards of sentences that are too long are written empty; if all sentences are too
    long, the command is refused."""
    from hgkd_fairseq.plugin import features

    monkeypatch.setattr(features, "max_positions", lambda model: (1024, 9))
    options = ("--subset", "valid", "--shard-size", 1)
    for kind in ("hidden", "sampled", "topk"):
        assert write(data, teacher, tmp_path / kind, "--kind", kind, *options) == 0
        read = Store(str(tmp_path / kind))
        sizes = [len(read.sentence(number)[1]["gold"]) for number in range(64)]
        assert 0 in sizes
        assert max(sizes) == 9
        stored = [size for size in sizes if size]
        assert f"kind {kind}, {len(stored)} sentences, {sum(stored)} target tokens" in capsys.readouterr().out
    monkeypatch.setattr(features, "max_positions", lambda model: (1024, 1))
    assert write(data, teacher, tmp_path / "none", *options) == 1
    assert "--teacher-path: the teacher takes no sentence of these data" in capsys.readouterr().err
