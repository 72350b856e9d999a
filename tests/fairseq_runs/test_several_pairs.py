"""Tests of several language pairs with a teacher: numbers of sentences, language tokens, training, resuming, and the
commands that run such models."""

import functools
import json
import random
import shutil
from pathlib import Path
from typing import Any

import binarised_corpus
import command_line as cl
import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from hgkd_fairseq import cli, plugin
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import forced
from hgkd_fairseq.gates import GATES, get_gate
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.report import runs
from hgkd_fairseq.teacher import inputs
from hgkd_fairseq.teacher.live import LiveTeacher

plugin.register()

SIZES = {"de-en": {"train": 200, "valid": 48, "test": 48}, "fr-en": {"train": 120, "valid": 32, "test": 32}}
SENTENCES = 320
TASK = ("--task", "translation_multi_simple_epoch", "--lang-pairs", "de-en,fr-en", "--langs", "de,fr,en")
TOKENS = ("--encoder-langtok", "tgt", "--decoder-langtok")
HERE = ("--num-workers", 0)  # this task creates new loaders in each epoch, and waits for the workers of the old ones
OURS = ("--task", "translation_multi_simple_epoch_with_teacher", *TASK[2:])
SAMPLED = ("--sampling-method", "temperature", "--sampling-temperature", 5)
PAD = 1


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return data of two language pairs with one dictionary, whose sentences have the same numbers in fairseq.

    Sentences are translated word by word, one word in ten at random.
    """
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(3)
    dictionary = binarised_corpus.dictionary_of(f"{letter}{i}" for letter in "wvt" for i in range(30))
    for letter, (pair, subsets) in zip("wv", SIZES.items(), strict=True):
        for subset, count in subsets.items():
            sources = [rng.choices(range(30), k=rng.randint(3, 9)) for _ in range(count)]
            targets = [[i if rng.random() < 0.9 else rng.randrange(30) for i in one] for one in sources]
            sides = [
                [" ".join(f"{mark}{i}" for i in one) for one in side]
                for mark, side in ((letter, sources), ("t", targets))
            ]
            binarised_corpus.write(folder, subset, pair, sides, (dictionary, dictionary))
    return folder


@pytest.fixture(scope="module")
def teacher(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint of a teacher trained by plain fairseq."""
    options = (
        *TASK,
        *TOKENS,
        *HERE,
        "--criterion",
        "cross_entropy",
        "--max-tokens",
        400,
        "--max-epoch",
        12,
        *cl.KEEP_LAST,
    )
    return cl.train(data, tmp_path_factory.mktemp("teacher"), *options, "--disable-validation").path()


def distil(teacher: Path | str, *options) -> tuple:
    usual = (*HERE, "--criterion", "hard_gate_kd", "--required-batch-size-multiple", 1, "--max-tokens", 300)
    return (*cl.USER_DIR, *OURS, *TOKENS, *usual, "--teacher-path", teacher, *options)


@pytest.fixture(scope="module")
def student(data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[cl.Run, tuple]:
    """Return a run of two epochs of sampled data, with two batches per update, and its options but for that one."""
    options = distil(teacher, *SAMPLED, "--max-epoch", 2, "--dropout", 0, "--attention-dropout", 0)
    options = (*options, "--gate", "sentence", "--teacher-temperature", 0.5, "--report-accuracy")
    return cl.train(data, tmp_path_factory.mktemp("student"), *options, "--update-freq", 2), options


def parsed(data: Path, *options) -> Any:
    from fairseq import options as parsing

    words = (data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *options)
    return parsing.parse_args_and_arch(parsing.get_training_parser(), [str(word) for word in words])


@functools.cache
def usual_options(data: Path) -> Any:
    """Return the options as fairseq's dataclasses; cached, because the conversion takes a second."""
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    return convert_namespace_to_omegaconf(parsed(data, *distil("none")))


def build(data: Path, *options):
    """Return (task, model, criterion) as fairseq-train builds them, with training and validation set loaded."""
    from fairseq import tasks
    from fairseq.dataclass.utils import _set_legacy_defaults

    args, cfg = parsed(data, *options), usual_options(data)
    _set_legacy_defaults(args, tasks.TASK_REGISTRY[args.task])
    task = tasks.setup_task(args)
    torch.manual_seed(1)
    model = task.build_model(cfg.model)
    given = {name: getattr(args, name) for name in cfg.criterion if hasattr(args, name)}
    criterion = task.build_criterion(OmegaConf.merge(cfg.criterion, given))
    for subset in ("train", "valid"):
        task.load_dataset(subset, combine=True)
    return task, model, criterion


@pytest.fixture(scope="module")
def parts(data: Path, teacher: Path):
    return build(data, *distil(teacher, *SAMPLED))


def batches(task, subset: str = "train", epoch: int = 1) -> list[dict]:
    found = task.get_batch_iterator(task.dataset(subset), max_tokens=400, max_positions=(1024, 1024), epoch=epoch)
    return list(found.next_epoch_itr(shuffle=False))


def text(task, ids: torch.Tensor) -> str:
    return task.target_dictionary.string(ids[ids != PAD])


def test_each_sentence_of_each_pair_has_a_number(parts, data: Path):
    """A number identifies a sentence and its pair, in sampled data of two epochs, validation and all training data."""
    task, _, _ = parts
    lines = {
        subset: [row for pair in SIZES for row in zip(*binarised_corpus.read(data, subset, pair), strict=True)]
        for subset in ("train", "valid")
    }
    assert len(set(lines["train"])) == SENTENCES
    seen: set[int] = set()
    for subset, epoch in (("train", 1), ("train", 2), ("valid", 1)):
        for batch in batches(task, subset, epoch):
            rows = zip(batch["id"], batch["pair"], batch["target"], batch["net_input"]["src_tokens"], strict=True)
            for number, pair, target, source in rows:
                assert text(task, target) == lines[subset][number][1]
                assert text(task, source).split(maxsplit=1)[1] == lines[subset][number][0]  # after the language token
                assert pair == (number >= SIZES["de-en"][subset])
                seen |= {int(number)} if subset == "train" else set()
    assert max(seen) >= SIZES["de-en"]["train"]  # fairseq's own numbers end there
    every = task.every_sentence()
    assert [int(every.collater([every[i]])["id"]) for i in range(len(every))] == list(range(SENTENCES))


def test_language_tokens(parts, teacher: Path):
    """The decoder is given language tokens, but gate, KL, calibration and logged numbers exclude them; they are learnt
    by cross-entropy, because the scores of a translation include them."""
    task, model, criterion = parts
    model.eval()
    batch = batches(task, "valid")[0]
    english = task.target_dictionary.index("__en__")
    assert not (batch["target"] == english).any()
    assert (batch["net_input"]["prev_output_tokens"][:, 1] == english).all()
    kept = batch["target"] != PAD
    with torch.no_grad():
        logp = model(**batch["net_input"])[0].log_softmax(-1)
        _, sample_size, log = criterion(model, batch)
    expected = -logp[kept].gather(1, batch["target"][kept][:, None]).sum()
    torch.testing.assert_close(log["nll_loss"], expected, rtol=1e-5, atol=0)
    count = sum(len(text(task, target).split()) + 1 for target in batch["target"])
    assert sample_size == batch["ntokens"] == int(log["tokens"]) == count
    assert float(log["calibration"][0].sum()) == count
    by_pair = [float(log[f"pair {name}"][0]) for name in SIZES]
    assert sum(by_pair) == count
    loss, size_in_training, log_in_training = criterion(model, batch)
    torch.testing.assert_close(log_in_training["loss"], log["loss"])
    assert size_in_training == sample_size
    torch.testing.assert_close(loss - log["loss"], -logp[:, 0, english].sum(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("gate", [name for name, gate in GATES.items() if name != "instance"])
def test_every_gate(gate: str, parts):
    """The loss of a step is finite, and the logged numbers of the pairs sum to those of the batch."""
    task, model, criterion = parts
    usual, batch = criterion.gate, batches(task)[0]
    task.training_state.memory.pop("gate", None)  # of the previous gate
    model.train()
    criterion.gate = get_gate(gate)
    try:
        torch.manual_seed(1)
        loss, _, log = criterion(model, batch)
    finally:
        criterion.gate = usual
    assert torch.isfinite(loss)
    sums = sum(log[f"pair {name}"] for name in SIZES)
    torch.testing.assert_close(sums[1], log["nll_loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[2], log["teacher_share"].to(sums.dtype), rtol=1e-5, atol=1e-5)
    assert len(set(batch["pair"].tolist())) == 2  # else nothing is summed


@pytest.mark.parametrize("held", ["fold", "share"])
def test_held_out_sentences_are_of_a_pair(held: str, parts):
    """A held-out sentence is left out wherever it is sampled; the sentence with its place in another pair is not."""
    task, _, _ = parts
    aside = task.training_state.held_out
    try:
        if held == "fold":
            aside.fold = (1, 3)
        else:
            aside.share = 0.1
        mask = aside.mask(SENTENCES)
        assert mask[:200].any()
        assert mask[200:].any()
        assert (mask[:120] != mask[200:]).any()  # fairseq's numbers would give both pairs one mask
        seen = np.zeros(SENTENCES, int)
        for epoch in (1, 2, 3):
            for batch in batches(task, epoch=epoch):
                np.add.at(seen, batch["id"].numpy(), 1)
        assert not seen[mask].any()
        assert (seen[~mask] > 0).mean() > 0.9
        training = task.every_sentence()
        kept = task.filter_indices_by_size(training.ordered_indices(), training, (1024, 1024))
        assert sorted(kept) == [number for number in range(SENTENCES) if not mask[number]]
    finally:
        aside.fold, aside.share = None, 0.0


def test_frequencies_of_targets(data: Path):
    """The unigram teacher counts each sentence of each pair once, without language tokens."""
    options = (*cl.USER_DIR, *OURS, *TOKENS, *SAMPLED, "--criterion", "hard_gate_kd", "--teacher-source", "unigram")
    task, _, _ = build(data, *options)
    lines = [line for pair in SIZES for line in binarised_corpus.read(data, "train", pair)[1]]
    counts = torch.ones(len(task.target_dictionary), dtype=torch.float64)
    found = torch.bincount(
        torch.tensor([task.target_dictionary.index(word) for line in lines for word in (*line.split(), "</s>")]),
        minlength=len(counts),
    )
    counts = torch.maximum(counts, found.double())
    torch.testing.assert_close(task.teacher.logprobs.double(), (counts / counts.sum()).log(), rtol=1e-5, atol=1e-6)


def test_a_virtual_epoch_goes_on_where_it_was(data: Path, teacher: Path):
    """A task that starts in a later virtual epoch, as a resumed one does, gives the batches of an uninterrupted one."""
    options = distil(teacher, *SAMPLED, "--virtual-epoch-size", 100)
    whole, _, _ = build(data, *options)
    ids = {epoch: [batch["id"].tolist() for batch in batches(whole, epoch=epoch)] for epoch in (1, 2, 3)}
    assert ids[2] != ids[1]
    resumed, _, _ = build(data, *options)
    del resumed.datasets["train"]
    resumed.load_dataset("train", epoch=3, combine=True)
    assert [batch["id"].tolist() for batch in batches(resumed, epoch=3)] == ids[3]


def test_log_lines_of_pairs(student: tuple[cl.Run, tuple], data: Path):
    run, _ = student
    rows = {tag: run.result.logs(tag) for tag in ("train", "valid")}
    assert len(rows["train"]) == len(rows["valid"]) == 2
    for row in (*rows["train"], *rows["valid"]):
        assert 0 < row["teacher_share"] < 1
        nll = [row[f"{pair}_nll_loss"] for pair in SIZES]
        assert min(nll) <= row["nll_loss"] <= max(nll)
        assert all(0 <= row[f"{pair}_teacher_share"] <= 1 for pair in SIZES)
    for pair in SIZES:
        assert rows["valid"][1][f"{pair}_nll_loss"] < rows["valid"][0][f"{pair}_nll_loss"]
        assert 0 < rows["valid"][1][f"{pair}_ece"] < 1
    assert not any("ece" in name for name in rows["train"][0])


def test_two_workers(student: tuple[cl.Run, tuple], data: Path, tmp_path: Path):
    """Two workers equal one with two batches per update, in parameters and in the numbers of each pair."""
    one, options = student
    two = cl.two_workers(data, tmp_path, *options)
    assert cl.differences(one.state()["model"], two.state()["model"]) == {}
    names = [f"{pair}_{name}" for pair in SIZES for name in ("nll_loss", "teacher_share")]
    for tag in ("train", "valid"):
        rows = zip(one.result.logs(tag), two.result.logs(tag), strict=True)
        for single, double in rows:
            for name in (
                "loss",
                "nll_loss",
                "teacher_share",
                *names,
                *(["de-en_ece", "ece"] if tag == "valid" else []),
            ):
                assert single[name] == double[name], name


def test_weights_of_sentences(data: Path, teacher: Path, tmp_path: Path):
    """--gate instance has a row for each sentence of each pair, which a refresh learns even if it was not sampled."""
    options = distil(teacher, *SAMPLED, "--gate", "instance", "--refresh-interval", 2, "--held-out", 0.1)
    run = cl.train(data, tmp_path, *options, "--max-epoch", 2, "--disable-validation", *cl.KEEP_LAST)
    table = run.state()["extra_state"]["TranslationMultiSimpleEpochWithTeacherTask"]["gate"]
    assert len(table["data"]) == SENTENCES
    assert int(table["held_out"].sum()) == 32
    assert torch.equal(table["learned"], ~table["held_out"])
    assert (table["data"][200:] != table["data"][:120]).any()
    assert cli.main(["weights", str(run.path()), "--output", str(tmp_path / "weights.tsv")]) == 0
    assert len((tmp_path / "weights.tsv").read_text().splitlines()) == 1 + SENTENCES - 32


def calibrated(file: Path, data: Path, path: Path, *options) -> dict[str, Any]:
    words = ("calibration", "forced", data, "--path", path, "--gen-subset", "valid", "--cpu", "--json", file, *options)
    assert cli.main([str(word) for word in (*words, "--replicates", 0)]) == 0
    return json.loads(file.read_text())


def test_what_runs_such_a_model(student: tuple[cl.Run, tuple], data: Path, teacher: Path, tmp_path: Path):
    """fairseq-validate and hgkd calibration give the training's numbers; fairseq-generate gives the same translations
    from the exported checkpoint and without the plugin."""
    run, _ = student
    logged = run.result.logs("valid")[-1]
    everything = calibrated(tmp_path / "all.json", data, run.path())
    assert everything["sentences"] == 80
    nll = {row["key"]: row["value"] for row in everything["scores"]}
    assert nll["nll"] == pytest.approx(logged["nll_loss"], abs=0.0011)
    assert nll["ece"] == pytest.approx(logged["ece"], abs=1e-4)
    for pair, sizes in SIZES.items():
        found = calibrated(tmp_path / f"{pair}.json", data, run.path(), "--lang-pair", pair)
        assert found["sentences"] == sizes["valid"]
        (value,) = [row["value"] for row in found["scores"] if row["key"] == "nll"]
        assert value == pytest.approx(logged[f"{pair}_nll_loss"], abs=0.0011)
    exported = tmp_path / "exported.pt"
    assert cli.main(["export", str(run.path()), str(exported)]) == 0
    usual = (data, "--source-lang", "fr", "--target-lang", "en", "--gen-subset", "test", "--cpu", "--beam", 2)
    usual = (*usual, "--max-len-b", 12, "--required-batch-size-multiple", 1)
    validated, ours, plain = cl.together(
        lambda: cl.fairseq(
            *("validate", data, *cl.USER_DIR, *OURS, "--cpu", "--log-format", "json", "--max-tokens", 4000),
            *("--criterion", "hard_gate_kd", "--path", run.path(), "--required-batch-size-multiple", 1),
            *("--teacher-path", teacher),
        ),
        lambda: cl.fairseq("generate", *usual, *cl.USER_DIR, *OURS, *TOKENS, "--path", run.path()),
        lambda: cl.fairseq("generate", *usual, *TASK, *TOKENS, "--path", exported),
    )
    assert validated.code == 0, validated.end()
    (row,) = validated.logs("valid")
    for name in ("nll_loss", "teacher_share", "fr-en_nll_loss", "fr-en_ece"):
        assert row[name] == pytest.approx(logged[name], abs=0.0011), name
    assert ours.code == 0, ours.end()
    assert plain.code == 0, plain.end()
    assert len(ours.hypotheses()) == SIZES["fr-en"]["test"]
    assert ours.hypotheses() == plain.hypotheses()
    assert not any("__en__" in one for one in ours.hypotheses())


def generate(data: Path, path: Path, pair: str) -> cl.Result:
    """Run fairseq-generate for a pair, by fairseq's own task."""
    source, target = pair.split("-")
    search = ("--beam", 2, "--max-len-b", 12, "--required-batch-size-multiple", 1)
    languages = ("--source-lang", source, "--target-lang", target)
    return cl.fairseq("generate", data, *cl.USER_DIR, *languages, *TASK, *TOKENS, *search, "--cpu", "--path", path)


def values(file: Path) -> dict[str, float]:
    return {row["key"]: row["value"] for row in json.loads(file.read_text())["scores"]}


def test_scores(teacher: Path, data: Path, tmp_path: Path):
    """hgkd score gives a pair the translations of fairseq-generate and the scores of hgkd calibration."""
    run = tmp_path / "run"
    shutil.copytree(teacher.parent, run)
    scoring = ("score", data, run, "--checkpoint", "last", "--lang-pair", "fr-en", "--lang-pair", "de-en", "--cpu")
    assert cli.main([str(one) for one in (*scoring, "--generate", "--beam 2 --max-len-b 12")]) == 0
    for pair, sizes in SIZES.items():
        generated = generate(data, teacher, pair)
        assert len(generated.hypotheses()) == sizes["test"]
        assert len(set(generated.hypotheses())) > sizes["test"] / 2
        assert (run / pair / "last/translations.txt").read_text().splitlines() == generated.hypotheses()
        found = calibrated(tmp_path / f"{pair}.json", data, teacher, "--lang-pair", pair, "--gen-subset", "test")
        scores = json.loads((run / pair / "last/scores.json").read_text())
        assert scores["nll"] == next(row["value"] for row in found["scores"] if row["key"] == "nll")
        assert scores["bleu"] > 0
        (tmp_path / "generated").write_text(generated.output)
        words = ("calibration", "inference", tmp_path / "generated", "--replicates", 0, "--json", tmp_path / "own.json")
        assert cli.main([str(one) for one in words]) == 1  # one more score than tokens
        logged = runs.read(run / pair / "last", pair)
        assert logged.last_update == cl.load(teacher)["optimizer_history"][-1]["num_updates"]
        assert cli.main([str(one) for one in (*words, "--language-token", "first")]) == 0
        assert values(tmp_path / "own.json")["ece"] == scores["inference_ece"]
    assert not (run / "scores.json").exists()


def refused(capsys: pytest.CaptureFixture, *words) -> str:
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 1
    (message,) = capsys.readouterr().err.strip().splitlines()
    return message


def test_ctranslate2(teacher: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """The converted model translates as fairseq does if it is given the language tokens, at the beginning of the source
    and as the target's prefix."""
    ctranslate2 = pytest.importorskip("ctranslate2")
    words = ("export", teacher, tmp_path / "exported.pt", "--ctranslate2", tmp_path / "ct2")
    assert "language tokens, and the comparison gives none: --no-comparison" in refused(capsys, *words)
    assert cli.main([str(word) for word in (*words, "--no-comparison")]) == 0
    assert "ct2: for CTranslate2, given language tokens" in capsys.readouterr().out
    generated = generate(data, tmp_path / "exported.pt", "fr-en")
    translator = ctranslate2.Translator(str(tmp_path / "ct2"), device="cpu", intra_threads=1)
    sources = [["__en__", *line.removeprefix("__en__ ").split()] for line in generated.sources()]
    prefixes = [["__en__"]] * len(sources)
    found = translator.translate_batch(sources, prefixes, beam_size=2, max_decoding_length=12)
    assert [" ".join(one.hypotheses[0][1:]) for one in found] == generated.hypotheses()


def test_what_does_not(student: tuple[cl.Run, tuple], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    run, _ = student
    scoring = ("score", data, run.folder, "--checkpoint", "last", "--cpu")
    assert "several language pairs; name one with --lang-pair: de-en, fr-en" in refused(capsys, *scoring)
    wrong = ("--lang-pair", "de-en", "--lang-pair", "en-de")  # refused before anything is scored
    assert "--lang-pair en-de: " in refused(capsys, *scoring, *wrong)
    assert not (run.folder / "de-en").exists()
    text = (*scoring, "--reference", "x", "--lang-pair", "de-en", "--lang-pair", "fr-en")
    assert "--reference is the text of one language pair" in refused(capsys, *text)
    named = "was trained by the task translation_multi_simple_epoch, which adds language tokens"
    assert named in refused(
        capsys,
        *("translate", data, "--teacher-path", run.path(), "--output", tmp_path / "t", "--subset", "valid", "--cpu"),
    )
    assert named in refused(capsys, "compare", data, run.path(), "--cpu")
    of_store = refused(capsys, "store", data, "--teacher-path", run.path(), "--output", tmp_path / "s", "--cpu")
    assert "a store has the sentences of one language pair without them; distil from the teacher itself" in of_store
    assert "--lang-pair en-de" in refused(
        capsys, "calibration", "forced", data, "--path", run.path(), "--lang-pair", "en-de", "--cpu"
    )


def test_refused_at_start(data: Path, teacher: Path):
    for options, expected in (
        (("--teacher-store", "stores/one"), "a store has the sentences of one language pair"),
        (("--gauge-store", "stores/one"), "a store has the sentences of one language pair"),
        (("--encoder-langtok", "src"), "they need the same language tokens"),
        (("--lang-tok-style", "mbart"), "was trained with lang_tok_style multilingual"),
        (("--langs", "de,fr,en,it"), "'__it__', is none of the teacher's"),
    ):
        with pytest.raises(UserError, match=expected):
            build(data, *distil(teacher, *options))


def test_language_tokens_in_place_of_eos(data: Path, teacher: Path, tmp_path: Path):
    """With --lang-tok-replacing-bos-eos no token of a target is masked, and sentences of two pairs can be one batch."""
    options = (*cl.USER_DIR, *OURS, *TOKENS, "--lang-tok-replacing-bos-eos", "--criterion", "hard_gate_kd", "--gate")
    task, _, _ = build(data, *options, "none", *SAMPLED)
    english = task.target_dictionary.index("__en__")
    for subset in ("train", "valid"):
        for batch in batches(task, subset):
            assert (batch["net_input"]["prev_output_tokens"][:, 0] == english).all()
            assert batch["ntokens"] == int((batch["target"] != PAD).sum())
            assert batch["target_lengths"] == (batch["target"] != PAD).sum(1).tolist()
    every = task.every_sentence()
    batch = every.collater([every[index] for index in (0, 250)])
    assert sorted(batch["id"].tolist()) == [0, 250]
    assert sorted(batch["pair"].tolist()) == [0, 1]


@pytest.fixture(scope="module")
def weak(teacher: Path) -> Path:
    """Return the checkpoint of the teacher with noise in all of its weights."""
    state = cl.load(teacher)
    generator = torch.Generator().manual_seed(1)
    for tensor in {tensor.data_ptr(): tensor for tensor in state["model"].values()}.values():
        if tensor.is_floating_point():
            tensor += torch.randn(tensor.shape, generator=generator) / 2
    path = teacher.with_name("weak.pt")
    torch.save(state, path)
    return path


def test_a_teacher_of_each_pair(data: Path, teacher: Path, weak: Path):
    """Each sentence has the distribution of its pair's teacher, also in a batch of both pairs; each pair needs one."""
    task, _, _ = build(data, *distil(f"de-en={teacher},fr-en={weak}", *SAMPLED, "--gate", "always"))
    batch = batches(task)[0]
    cpu, fp32 = torch.device("cpu"), torch.float32
    together = mean_logprobs(task.teacher.signal(batch, cpu, fp32).heads, 1.5)
    for place, path in enumerate((teacher, weak)):
        alone = LiveTeacher([str(path)], task.source_dictionary, task.target_dictionary, added=inputs.added(task.cfg))
        rows = batch["pair"] == place
        assert rows.any()
        expected = mean_logprobs(alone.signal(batch, cpu, fp32).heads, 1.5)
        kept = batch["target"][rows] != PAD
        torch.testing.assert_close(together[rows][kept], expected[rows][kept], rtol=1e-4, atol=1e-5)
    one, other = alone.fingerprint, task.teacher.fingerprint
    assert one in other
    swapped, _, _ = build(data, *distil(f"de-en={weak},fr-en={teacher}", *SAMPLED, "--gate", "always"))
    assert swapped.teacher.fingerprint != other  # a run is not resumed with the teachers swapped
    for given, expected in (
        (f"de-en={teacher}", "name one for each"),
        (f"de-en={teacher},fr-en=gone.pt", "gone.pt"),
        (f"de-en={teacher},fr-en={weak},de-en={weak}", "of de-en, fr-en, de-en, and .* name one for each"),
    ):
        with pytest.raises(UserError, match=expected):
            build(data, *distil(given))


def test_a_teacher_that_was_not_trained_on_a_pair(data: Path, teacher: Path, tmp_path: Path):
    """A teacher, or a member of an ensemble, is refused for a pair that it was not trained on and accepted for others;
    pairs of its extra data count as trained on."""
    paths = {}
    for name, pairs, extra in (("one", ["de-en"], None), ("both", "de-en", {"mined": "fr-en"})):
        state = cl.load(teacher)
        state["cfg"]["task"].lang_pairs, state["cfg"]["task"].extra_lang_pairs = pairs, extra
        paths[name] = tmp_path / f"{name}.pt"
        torch.save(state, paths[name])
    for given in (paths["one"], f"{teacher}:{paths['one']}", f"de-en={teacher},fr-en={paths['one']}"):
        with pytest.raises(UserError, match=r"the teacher .*one\.pt was trained on de-en and not on fr-en"):
            build(data, *distil(given))
    for given in (paths["both"], f"de-en={paths['one']},fr-en={teacher}"):
        assert build(data, *distil(given))[0].teacher is not None
    task, _, _ = build(data, *distil(teacher))
    dictionaries = task.source_dictionary, task.target_dictionary
    state = cl.load(paths["one"])  # a model that adds no tokens may teach a student of fairseq's plain task
    state["cfg"]["task"].encoder_langtok = state["cfg"]["task"].langtoks = None
    state["cfg"]["task"].decoder_langtok = False
    torch.save(state, tmp_path / "plain.pt")
    assert LiveTeacher([str(tmp_path / "plain.pt")], *dictionaries, languages=("de", "en")).models
    with pytest.raises(UserError, match="was trained on de-en and not on fr-en"):
        LiveTeacher([str(tmp_path / "plain.pt")], *dictionaries, languages=("fr", "en"))
    with pytest.raises(UserError, match=r"one\.pt was trained on de-en and not on fr-en"):
        forced.load(str(data), f"{teacher}:{paths['one']}", cpu=True, several=True)
    assert len(forced.load(str(data), f"{teacher}:{paths['one']}", cpu=True, pair="de-en", several=True)[0]) == 2


def test_gate_pair(data: Path, teacher: Path, weak: Path, tmp_path: Path):
    """After the first validation the pair with the weak teacher learns from the data alone, and a run of sampled data
    that is resumed in the middle of the next epoch equals an uninterrupted one, bit for bit."""
    gate = ("--gate", "pair", "--pair-margin", 3, "--max-epoch", 2, "--dropout", 0.2)
    options = distil(f"de-en={teacher},fr-en={weak}", *SAMPLED, *gate)
    run = cl.train(data, tmp_path / "whole", *options, "--save-interval-updates", 12)
    train, valid = run.result.logs("train"), run.result.logs("valid")
    assert valid[0]["fr-en_accuracy"] >= valid[0]["fr-en_teacher_accuracy"] + 3
    assert valid[0]["de-en_accuracy"] < valid[0]["de-en_teacher_accuracy"] + 3
    assert [row["fr-en_teacher_share"] for row in train] == [0.5, 0]
    assert [row["de-en_teacher_share"] for row in train] == [0.5, 0.5]
    assert len({row["de-en_teacher_accuracy"] for row in valid}) == 1
    assert "gate pair, by accuracy on valid: learns from the teacher: de-en yes" in run.result.output
    (middle,) = run.folder.glob("checkpoint_2_*.pt")
    (tmp_path / "resumed").mkdir()
    shutil.copy(middle, tmp_path / "resumed" / "checkpoint_last.pt")
    resumed = cl.train(data, tmp_path / "resumed", *options)
    one, other = run.state(), resumed.state()
    assert cl.load(middle)["optimizer_history"][-1]["num_updates"] < one["optimizer_history"][-1]["num_updates"]
    assert cl.differences(one["model"], other["model"]) == {}
    assert cl.differences(one["last_optimizer_state"], other["last_optimizer_state"]) == {}
    # The decisions are stored by the position of the pair, so that the order of the pairs must not change.
    swapped = (*options, "--lang-pairs", "fr-en,de-en", "--max-epoch", 3, "--save-dir", resumed.folder)
    refused = cl.fairseq("train", data, *cl.SIZE, *cl.TIED, *cl.STEPS, *cl.LOGS, *swapped)
    expected = "--lang-pairs fr-en,de-en is asked for, and --lang-pairs de-en,fr-en made it"
    cl.one_error_message(refused, [expected])
