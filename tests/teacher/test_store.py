"""A stored teacher: what it says is what the live one does, and what does not fit or is damaged is refused."""

import itertools
import shutil
from argparse import Namespace
from pathlib import Path

import command_line as cl
import numpy as np
import pytest
import torch
from fairseq import utils
from fairseq.data import ConcatDataset, Dictionary
from omegaconf import OmegaConf

from hgkd_fairseq import cli, plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.teacher import Dense, Sparse, storing
from hgkd_fairseq.teacher.live import LiveTeacher
from hgkd_fairseq.teacher.store import Store
from hgkd_fairseq.teacher.stored import BATCH, StoredTeacher, numbering

plugin.register()

from hgkd_fairseq.tasks.translation_with_teacher import (  # noqa: E402
    TranslationWithTeacherConfig,
    TranslationWithTeacherTask,
)

CPU, FP32 = torch.device("cpu"), torch.float32


def write(data: Path, teacher: cl.Run, folder: Path, *options) -> int:
    words = ("store", data, "--teacher-path", teacher.path(), "--output", folder, "--cpu", *options)
    return cli.main([str(word) for word in words])


@pytest.fixture(scope="module")
def stores(data: Path, teacher: cl.Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind; of 200 sentences a shard."""
    folder = tmp_path_factory.mktemp("stores")
    patch = pytest.MonkeyPatch()
    patch.setattr(storing, "SENTENCES", 200)
    found = {kind: folder / kind for kind in ("hidden", "sampled", "topk")}
    try:
        for kind, one in found.items():
            assert write(data, teacher, one, "--kind", kind, "--dtype", "fp32") == 0
        assert write(data, teacher, folder / "bf16") == 0
    finally:
        patch.undo()
    return found | {"bf16": folder / "bf16"}


def make_task(data: Path | str, **options) -> TranslationWithTeacherTask:
    given = {
        "data": str(data), "train_subset": "train", "dataset_impl": None, "required_seq_len_multiple": 1,
        "store_ema": False, "save_dir": "nowhere", "max_tokens": 800, "valid_subset": "valid",
        "tensorboard_logdir": None, **options,
    }  # fmt: skip
    return TranslationWithTeacherTask.setup_task(OmegaConf.merge(TranslationWithTeacherConfig, given))


def load(data: Path, store: Path) -> TranslationWithTeacherTask:
    task = make_task(data, teacher_store=str(store))
    task.load_teacher()
    task.load_dataset("train", combine=True)
    return task


def batches(task, subset: str = "train", workers: int = 0):
    """Of an epoch, shuffled."""
    task.load_dataset(subset, combine=subset == "train")
    found = task.get_batch_iterator(task.dataset(subset), max_tokens=400, seed=1, num_workers=workers)
    return found.next_epoch_itr(shuffle=True)


@pytest.fixture(scope="module")
def live(data: Path, teacher: cl.Run) -> TranslationWithTeacherTask:
    task = make_task(data, teacher_path=str(teacher.path()))
    task.load_teacher()
    return task


def test_hidden_states_teach_as_the_teacher_does(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    """On each batch of a shuffled epoch, read by two workers: the same tokens for the teacher, loss and gradients. The
    student is the teacher with noise."""
    task = make_task(data, teacher_store=str(stores["hidden"]))
    task.load_teacher()
    weight = live.teacher.models[0].decoder.output_projection.weight.detach().clone().requires_grad_()
    generator = torch.Generator().manual_seed(0)
    seen, opened = 0, 0
    reader = batches(task, workers=2)
    read = list(reader)
    reader._itr._shutdown_workers()  # fairseq's stay, and the garbage collector waits ten seconds for them
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


def test_a_student_of_a_store_is_that_of_the_teacher(
    data: Path, student: cl.Run, stores: dict[str, Path], tmp_path: Path
):
    """`student` had the live teacher. Both teachers' states may differ by rounding, for the batches that they saw have
    other pads; so may the students."""
    task = ("--task", "translation_with_teacher", "--criterion", "hard_gate_kd", "--teacher-store", stores["hidden"])
    run = cl.train(data, tmp_path, *cl.USER_DIR, *task, "--max-epoch", 6, "--disable-validation", *cl.KEEP_LAST)
    for mine, theirs in zip(run.result.logs("train"), student.result.logs("train"), strict=True):
        for name in ("loss", "kd_loss", "teacher_share"):
            assert mine[name] == pytest.approx(theirs[name], abs=0.0021)
    gaps = cl.differences(run.state()["model"], student.state()["model"])
    assert max(gaps.values(), default=0.0) < 1e-3


def test_gold_statistics(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    stored = {kind: make_task(data, teacher_store=str(folder)) for kind, folder in stores.items()}
    for task in stored.values():
        task.load_teacher()
    for sample, *others in zip(
        batches(live, "valid"), *[batches(one, "valid") for one in stored.values()], strict=True
    ):
        (head,) = live.teacher.signal(sample, CPU, FP32).heads
        kept, target = sample["target"] != 1, sample["target"][..., None]
        logits = head.hidden @ head.weight.t()
        logq, tempered = (mean_logprobs([head], tau) for tau in (1.0, 1.5))
        wanted = (
            *(one.gather(2, target).squeeze(2) for one in (logq, tempered)),
            logits.logsumexp(2),
            -(tempered.exp() * tempered).sum(2),
        )
        for task, other in zip(stored.values(), others, strict=True):
            # What fairseq-train --fp16 does to a batch on its way.
            other = utils.apply_to_sample(lambda t: t.half() if t.dtype == FP32 else t, other)
            gold = task.teacher.signal(other, CPU, FP32).gold
            assert gold.at(1.5) is gold.tempered
            assert gold.at(1.0) is gold.logprob
            assert gold.at(2.0) is None
            for got, one in zip(gold[1:], wanted, strict=True):
                torch.testing.assert_close(got[kept], one[kept], atol=1e-5, rtol=1e-5)
                assert not got[~kept].any()


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
    """Of each batch the live teacher's log-probabilities (N, V), and the store's of the same tokens."""
    task.load_teacher()
    for one, other in zip(batches(live, subset), batches(task, subset), strict=True):
        kept = one["target"] != 1
        signal = task.teacher.signal(other, CPU, FP32)
        assert isinstance(signal, Sparse)
        logq = mean_logprobs(live.teacher.signal(one, CPU, FP32).heads, 1.5)
        yield logq[kept], signal.distribution.map(lambda tensor, kept=kept: tensor[kept])


def test_draws_are_the_teachers(live: TranslationWithTeacherTask, stores: dict[str, Path], data: Path):
    """Over all training tokens, of each type the draws less what was to be expected, in standard deviations."""
    task = make_task(data, teacher_store=str(stores["sampled"]))
    drawn, expected, variance = (torch.zeros(len(task.tgt_dict), dtype=torch.float64) for _ in range(3))
    for logq, sparse in logprobs(live, task, "train"):
        q = logq.double().exp()
        counts = (sparse.probability * 50).round().double()
        assert torch.equal(counts.sum(1), torch.full((len(q),), 50.0, dtype=torch.float64))
        drawn.index_add_(0, sparse.ids.flatten(), counts.flatten())
        expected += 50 * q.sum(0)
        variance += 50 * (q * (1 - q)).sum(0)
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
        words = (
            "store",
            data,
            "--teacher-path",
            paths,
            "--output",
            tmp_path / kind,
            "--kind",
            kind,
            "--subset",
            "valid",
        )
        assert cli.main([*map(str, words), "--dtype", "fp32", "--cpu"]) == 0
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


# Writing


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", ["hidden", "sampled"])
def test_what_was_interrupted_goes_on(
    kind: str, data: Path, teacher: cl.Run, stores: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A shard is missing and another is damaged: byte for byte what it was."""
    monkeypatch.setattr(storing, "SENTENCES", 200)
    whole, folder = contents(stores[kind]), tmp_path / "store"
    shutil.copytree(stores[kind], folder)
    shutil.rmtree(folder / "shard-00001")
    (folder / "shard-00001.json").unlink()
    (folder / "shard-00002" / "gold.npy").write_bytes(b"")
    assert write(data, teacher, folder, "--kind", kind, "--dtype", "fp32") == 0
    assert contents(folder) == whole


def test_another_teachers_store_is_not_continued(
    data: Path, teacher: cl.Run, student: cl.Run, stores: dict[str, Path], monkeypatch, capsys
):
    monkeypatch.setattr(storing, "SENTENCES", 200)
    for run, options, message in (
        (student, ("--kind", "topk"), "another teacher"),
        (teacher, ("--kind", "topk", "--k", 9), "another k (8, now 9)"),
        (teacher, ("--kind", "topk", "--teacher-temperature", 2), "another temperature (1.5, now 2.0)"),
    ):
        assert write(data, run, stores["topk"], *options) == 1
        assert message in capsys.readouterr().err


def test_no_room_is_told_before_the_work(data: Path, teacher: cl.Run, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Namespace(free=1000))
    assert write(data, teacher, tmp_path / "store") == 1
    assert "do not fit, 0.0 GB are free; name another disk" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


# Faults


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5])


FILES = {
    "hidden": ["keys", "offsets", "gold", "hidden-0"],
    "sampled": ["entries", "ids", "counts", "distinct"],
    "topk": ["ids", "logprobs", "rest"],
}


@pytest.mark.parametrize("damage", [flipped, cut])
@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, names in FILES.items() for name in names])
def test_a_damaged_array_is_refused(kind: str, name: str, damage, stores: dict[str, Path], data: Path, tmp_path: Path):
    """In the second shard, which is read in the training: by the loader's worker."""
    shutil.copytree(stores[kind], tmp_path / "store")
    damage(tmp_path / "store" / "shard-00001" / f"{name}.npy")
    task = load(data, tmp_path / "store")
    dataset = task.dataset("train")
    sample = dataset.collater([dataset[0], dataset[199]])
    task.teacher.signal(sample, CPU, FP32)
    sample = dataset.collater([dataset[0], dataset[200]])
    with pytest.raises(UserError, match=f"shard-00001/{name}.npy is not what was written"):
        task.teacher.signal(sample, CPU, FP32)


@pytest.mark.parametrize("damage", [flipped, cut])
@pytest.mark.parametrize("name", ["manifest.json", "member-0.weight.npy", "shard-00000.json"])
def test_a_damaged_description_is_refused(name: str, damage, stores: dict[str, Path], data: Path, tmp_path: Path):
    shutil.copytree(stores["hidden"], tmp_path / "store")
    damage(tmp_path / "store" / name)
    with pytest.raises(UserError, match=str(tmp_path / "store")):
        load(data, tmp_path / "store")


def test_an_unfinished_store_is_refused(stores: dict[str, Path], data: Path, tmp_path: Path):
    shutil.copytree(stores["hidden"], tmp_path / "store")
    (tmp_path / "store" / "shard-00002.json").unlink()
    with pytest.raises(UserError, match="shard-00002 is not finished"):
        make_task(data, teacher_store=str(tmp_path / "store")).load_teacher()


def test_other_data_are_refused(stores: dict[str, Path], data: Path):
    task = make_task(data, teacher_store=str(stores["hidden"]))
    task.load_teacher()
    with pytest.raises(UserError, match=r"has the subsets train, valid and not test; .* --subset train,valid,test"):
        task.load_dataset("test")
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    targets = [dataset.tgt[index] for index in range(len(dataset))]
    dataset.tgt = targets[::-1]
    with pytest.raises(UserError, match="sentence 0 of valid is another one there"):
        task.teacher.attach("valid", 0, dataset)
    dataset.tgt = targets[:-1]
    with pytest.raises(UserError, match="was written for 64 sentences of valid, and the data have 63"):
        task.teacher.attach("valid", 0, dataset)
    for side in ("src", "tgt"):  # one sentence alone: told when it is read, also of the source
        task.load_dataset("valid")
        dataset = task.dataset("valid")
        sentences = [getattr(dataset, side)[index] for index in range(len(dataset))]
        sentences[5] = torch.cat([sentences[5][:1], sentences[5]])
        setattr(dataset, side, sentences)
        sample = dataset.collater([dataset[4], dataset[5]])
        assert "sentence 5 of valid is another one there" in sample[BATCH]["problem"]
        with pytest.raises(UserError, match="sentence 5 of valid"):
            task.teacher.signal(sample, CPU, FP32)


def test_what_does_not_fit_is_refused(stores: dict[str, Path], data: Path, teacher: cl.Run):
    task = make_task(data)
    other = Dictionary()
    for symbol in task.tgt_dict.symbols[4:][::-1]:
        other.add_symbol(symbol)
    with pytest.raises(UserError, match="another target dictionary"):
        StoredTeacher(str(stores["hidden"]), task.src_dict, other)
    with pytest.raises(UserError, match="is of the languages de-en, the student of en-de"):
        StoredTeacher(str(stores["hidden"]), task.src_dict, task.tgt_dict, languages=("en", "de"))
    with pytest.raises(UserError, match="--teacher-path and --teacher-store are two teachers"):
        make_task(data, teacher_store=str(stores["hidden"]), teacher_path=str(teacher.path())).load_teacher()
    with pytest.raises(UserError, match="needs --teacher-store STORE"):
        make_task(data, teacher_source="store").load_teacher()
    asked = {
        "teacher_temperature": 1.5, "teacher_temperature_start": None, "gate_on": "gold", "divergence": "kl",
        "gate": "token",
    }  # fmt: skip
    stored = {kind: StoredTeacher(str(stores[kind]), task.src_dict, task.tgt_dict) for kind in ("hidden", "sampled")}
    for option, value in (("teacher_temperature", 2.0), ("teacher_temperature_start", 3.0), ("gate_on", "argmax"),
                          ("divergence", "js"), ("gate", "instance")):  # fmt: skip
        cfg = Namespace(**asked | {option: value})
        stored["hidden"].check_options(cfg)
        with pytest.raises(UserError, match="of the kind sampled"):
            stored["sampled"].check_options(cfg)
    stored["sampled"].check_options(Namespace(**asked))


def test_a_store_resumes_its_teachers_run(stores: dict[str, Path], live: TranslationWithTeacherTask):
    """By the fingerprint, which training compares; a part of the teacher is another one."""
    found = {
        kind: StoredTeacher(str(folder), live.src_dict, live.tgt_dict).fingerprint for kind, folder in stores.items()
    }
    assert found["hidden"] == found["bf16"] == live.teacher.fingerprint
    assert len({found["hidden"], found["sampled"], found["topk"]}) == 3


def test_numbers_of_repeated_and_joined_data(data: Path, teacher: cl.Run, tmp_path: Path):
    """train1 belongs to train; --upsample-primary repeats train, and a second folder has numbers of its own."""
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
    """Sentences have up to 10 tokens with their end. The teacher has positions for 9: what is longer has no rows, and
    who trains on it is told so."""
    from hgkd_fairseq.plugin import features

    monkeypatch.setattr(features, "max_positions", lambda model: (1024, 9))
    assert write(data, teacher, tmp_path / "store", "--subset", "valid") == 0
    task = make_task(data, teacher_store=str(tmp_path / "store"))
    task.load_teacher()
    task.load_dataset("valid")
    dataset = task.dataset("valid")
    long = int(np.argmax(dataset.tgt_sizes))
    assert dataset.tgt_sizes[long] == 10
    assert "problem" not in dataset.collater([dataset[i] for i in range(64) if dataset.tgt_sizes[i] < 10])[BATCH]
    assert f"sentence {long} of valid was too long" in dataset.collater([dataset[long]])[BATCH]["problem"]
