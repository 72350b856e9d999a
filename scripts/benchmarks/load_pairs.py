"""The parts of load.py that walk through a corpus. Each is a function of a folder and a number of pairs, which prepares
and returns what is to be measured."""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import corpora
import numpy as np
import torch
from fairseq import checkpoint_utils, options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import FairseqTask, setup_task

from hgkd_fairseq import gates, plugin
from hgkd_fairseq.calibration.scores import Predictions, Settings
from hgkd_fairseq.data import translations
from hgkd_fairseq.data.filters import Filters
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.data.translations import Hypothesis, Translated, hash_of
from hgkd_fairseq.evaluation import distil_data, inference
from hgkd_fairseq.evaluation.token_table import TokenTable
from hgkd_fairseq.gates import TokenStatistics
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.sentence_weights.refresh import Refresh
from hgkd_fairseq.teacher import store, stored
from hgkd_fairseq.teacher.unigram import log_frequencies

Run = Callable[[], object]

MAX_TOKENS = 4000  # a batch
TYPES = {"corpus": 32_000, "short": 300}  # of the data, and of those that a model is run on
SHARD = 4096  # sentences of a store
SHARD_OF_TRANSLATIONS = 10_000
TINY = (
    *("--arch", "transformer_iwslt_de_en", "--encoder-layers", 1, "--decoder-layers", 1, "--share-all-embeddings"),
    *("--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16),
    *("--decoder-ffn-embed-dim", 16, "--encoder-attention-heads", 1, "--decoder-attention-heads", 1),
)


def make_corpus(folder: Path, kind: str, pairs: int) -> Path:
    """The data of that many pairs, which are written where they are not there yet."""
    data = folder / f"{kind}-{pairs}"
    if not (data / "whole").exists():
        shutil.rmtree(data, ignore_errors=True)
        longest = corpora.LONGEST if kind == "corpus" else 24
        corpora.write(data, {"train": pairs, "valid": 64}, TYPES[kind], longest)
        (data / "whole").touch()
    return data


def training(data: Path, *given) -> tuple:
    """(configuration, task) of a fairseq-train of ours; its data are not loaded."""
    plugin.register()
    logging.disable(logging.INFO)
    words = [data, *TINY, "--task", "translation_with_teacher", "--criterion", "hard_gate_kd", "--optimizer", "adam"]
    words += ["--max-tokens", MAX_TOKENS, "--cpu", "--save-dir", data / "models", "--lr", 0.001, *given]
    arguments = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    cfg = convert_namespace_to_omegaconf(arguments)
    return cfg, setup_task(cfg.task)


def loaded(folder: Path, pairs: int) -> FairseqTask:
    task = training(make_corpus(folder, "corpus", pairs), "--gate", "none")[1]
    task.load_dataset("train", combine=True)
    return task


def batches_of(task: FairseqTask):
    return task.get_batch_iterator(task.dataset("train"), max_tokens=MAX_TOKENS, seed=1, required_batch_size_multiple=8)


def loading(folder: Path, pairs: int) -> Run:
    task = training(make_corpus(folder, "corpus", pairs), "--gate", "none")[1]
    return lambda: task.load_dataset("train", combine=True)


def checks(folder: Path, pairs: int) -> Run:
    data = make_corpus(folder, "corpus", pairs)
    task = binarised.translation_task(str(data), "load.py", {"source_lang": "de", "target_lang": "en"})
    return lambda: binarised.subset(task, "train")


def batching(folder: Path, pairs: int) -> Run:
    task = loaded(folder, pairs)
    return lambda: batches_of(task).next_epoch_itr(shuffle=True)


def collating(folder: Path, pairs: int) -> Run:
    epoch = batches_of(loaded(folder, pairs)).next_epoch_itr(shuffle=True)
    return lambda: exhaust(epoch)


def exhaust(iterator) -> None:
    for _ in iterator:
        pass


def unigram(folder: Path, pairs: int) -> Run:
    task = loaded(folder, pairs)
    return lambda: log_frequencies(task.training_targets(), len(task.target_dictionary))


def target_lengths(folder: Path, pairs: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each batch of an epoch the numbers of its sentences and the lengths of their targets."""
    dataset = loaded(folder, pairs).dataset("train")
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=MAX_TOKENS)
    return [(np.asarray(batch), dataset.tgt_sizes[batch]) for batch in batches]


def statistics(numbers: np.ndarray, lengths: np.ndarray, seed: int) -> TokenStatistics:
    sentence = torch.arange(len(lengths)).repeat_interleave(torch.from_numpy(lengths.astype(np.int64)))
    logprobs = torch.rand(2, len(sentence), generator=torch.Generator().manual_seed(seed)).log()
    return TokenStatistics(*logprobs, sentence, len(lengths), 32_000, 0.0, torch.from_numpy(numbers)[sentence])


class Batch:
    """What gates observe of a batch."""

    def __init__(self, found: TokenStatistics):
        self.token_nll = -found.student_logprob[None]
        self.tokens_mask = torch.ones_like(self.token_nll, dtype=torch.bool)


def gate_queue(folder: Path, pairs: int) -> Run:
    gate, batches = gates.get_gate("selective-global"), target_lengths(folder, pairs)

    def run() -> None:
        for number, batch in enumerate(batches):
            found = statistics(*batch, number)
            gate.weights(found)
            gate.remembering.observe(Batch(found))

    return run


def weights_table(folder: Path, pairs: int) -> Run:
    batches, gate, file = target_lengths(folder, pairs), Instance(), folder / "table.pt"

    def run() -> None:
        gate.begin(torch.arange(pairs) % 50 == 0)
        for number, batch in enumerate(batches):
            gate(statistics(*batch, number))
        torch.save(gate.state, file)
        gate.state = torch.load(file, weights_only=True)

    return run


def refresh(folder: Path, kind: str, pairs: int) -> tuple[Refresh, torch.nn.Module]:
    """Of a tiny model under an untrained teacher of its own size."""
    data = make_corpus(folder, kind, pairs)
    cfg, task = training(data, "--gate", "none")
    teacher = data / "teacher.pt"
    checkpoint_utils.torch_persistent_save(
        {"args": None, "cfg": plain_config(data), "model": task.build_model(cfg.model).state_dict()}, str(teacher)
    )
    cfg, task = training(data, "--gate", "instance", "--teacher-path", teacher, "--refresh-interval", 1)
    task.load_dataset("train", combine=True)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    criterion.refresh.begin_training(1, model)
    return criterion.refresh, model


def plain_config(data: Path) -> dict:
    """Of a model that fairseq alone has trained."""
    words = [data, *TINY, "--optimizer", "adam"]
    arguments = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    cfg = convert_namespace_to_omegaconf(arguments)
    cfg.task.source_lang, cfg.task.target_lang = "de", "en"
    return cfg


def refresh_plan(folder: Path, pairs: int) -> Run:
    found, model = refresh(folder, "corpus", pairs)
    return lambda: found.plan(1, model)


def refresh_walk(folder: Path, pairs: int) -> Run:
    found, model = refresh(folder, "short", pairs)
    return lambda: found.walk(1, model)


def store_of(folder: Path, pairs: int) -> tuple[FairseqTask, Path]:
    return loaded(folder, pairs), folder / f"store-{pairs}"


def store_written(folder: Path, pairs: int) -> Run:
    """What `hgkd store` does beside running the teacher, whose numbers are all 0 here."""
    task, output = store_of(folder, pairs)
    dataset = task.dataset("train")
    shutil.rmtree(output, ignore_errors=True)

    def run() -> None:
        keys = np.array([store.key(dataset.src[i], dataset.tgt[i]) for i in range(pairs)], np.uint64)
        manifest = {
            "format": store.FORMAT, "kind": "gold", "dtype": "fp32", "temperature": 1.5, "draws": 0, "folds": 0,
            "vocabulary": len(task.target_dictionary), "languages": ["de", "en"], "teacher": "none", "heads": {},
            "dictionaries": [stored.dictionary_hash(task.target_dictionary)] * 2, "members": 1,
            "parts": [store.Part("train", 0, 0, pairs, "")._asdict()],
        }  # fmt: skip
        shards = Shards.create(output, manifest, pairs, SHARD)

        def make(shard: int, target: Path) -> int:
            numbers = shards.numbers(shard)
            lengths = [int(dataset.tgt_sizes[number]) for number in numbers]
            store.save(target, "keys", keys[numbers.start : numbers.stop])
            store.save(target, "offsets", store.ends(lengths))
            store.save(target, "gold", np.zeros((sum(lengths), 4), np.float32))
            return len(numbers)

        shards.fill(make)

    return run


def store_read(folder: Path, pairs: int) -> Run:
    task, output = store_of(folder, pairs)
    if not output.exists():
        store_written(folder, pairs)()
    dataset = task.dataset("train")
    epoch = batches_of(task).next_epoch_itr(shuffle=True)

    def run() -> None:
        teacher = stored.StoredTeacher(str(output), task.source_dictionary, task.target_dictionary)
        teacher.attach("train", 0, dataset)
        for batch in epoch:
            teacher.signal(batch, torch.device("cpu"), torch.float32)

    return run


def translated(folder: Path, pairs: int) -> tuple[Path, Path, Run]:
    """The data, the folder of translations (the references, with other scores), and what writes it."""
    data, output = make_corpus(folder, "corpus", pairs), folder / f"translated-{pairs}"
    plugin.register()
    logging.disable(logging.INFO)
    task = binarised.translation_task(str(data), "load.py", {"source_lang": "de", "target_lang": "en"})
    task.load_dataset("train")
    dataset, symbols = task.dataset("train"), task.target_dictionary.symbols

    def run() -> None:
        shutil.rmtree(output, ignore_errors=True)
        manifest = {"kind": translations.KIND, "subset": "train", "source_lang": "de", "target_lang": "en"}
        manifest |= translations.hashes(str(data), "train")
        shards = Shards.create(output, manifest, pairs, SHARD_OF_TRANSLATIONS)

        def make(shard: int, target: Path) -> int:
            found = []
            for number in shards.numbers(shard):
                pieces = [symbols[index] for index in dataset.tgt[number].tolist()[:-1]]
                hypothesis = Hypothesis(pieces, -(number % 7), False)
                found.append(Translated(number, hash_of(dataset.src[number]), [hypothesis]))
            translations.write(target, found)
            return len(found)

        shards.fill(make)

    return data, output, run


def translations_written(folder: Path, pairs: int) -> Run:
    return translated(folder, pairs)[2]


def distilled_data(folder: Path, pairs: int) -> Run:
    data, output, write = translated(folder, pairs)
    if not output.exists():
        write()
    made = folder / f"distilled-{pairs}"
    shutil.rmtree(made, ignore_errors=True)
    filters = Filters(off=frozenset({"backward", "long"}), worst_score=0.01)
    choice = distil_data.Choice(filters=filters, mix_original=0.1)
    return functools.partial(distil_data.distil, str(output), str(data), str(made), choice)


def predictions(folder: Path, pairs: int) -> Run:
    """What `hgkd calibration forced` does beside running the model."""
    batches = target_lengths(folder, pairs)

    def run() -> None:
        whole = Predictions(Settings())
        for number, batch in enumerate(batches):
            found = statistics(*batch, number)
            whole.update(found.instance, found.student_logprob.exp(), found.teacher_logprob > -0.5)
        whole.scores()

    return run


def token_table(folder: Path, pairs: int) -> Run:
    batches = target_lengths(folder, pairs)

    def run() -> None:
        with TokenTable(str(folder / "tokens.tsv")) as table:
            for number, batch in enumerate(batches):
                found = statistics(*batch, number)
                table.write({"sentence": found.instance.tolist(), "confidence": found.student_logprob.exp().tolist()})

    return run


def generated(folder: Path, pairs: int) -> Run:
    """`hgkd calibration inference` on what fairseq-generate would have written: nine of ten tokens are right."""
    task, file = loaded(folder, pairs), folder / f"generated-{pairs}.txt"
    symbols, rng = task.target_dictionary.symbols, np.random.default_rng(1)
    with file.open("w") as out:
        for number in range(pairs):
            ids = task.dataset("train").tgt[number].numpy()[:100]
            said = np.where(rng.random(len(ids) - 1) < 0.9, ids[:-1], 4)
            scores = " ".join(f"{value:.4f}" for value in -rng.exponential(0.3, len(ids)))
            out.write(f"T-{number}\t{' '.join(symbols[i] for i in ids[:-1])}\n")
            out.write(f"H-{number}\t-0.3\t{' '.join(symbols[i] for i in said)}\nP-{number}\t{scores}\n")
    return lambda: inference.evaluate(str(file))


# (what it is, its function, its share of the pairs)
PARTS: dict[str, tuple[Callable[[Path, int], Run], float]] = {
    "loading the data": (loading, 1),
    "checks of the data": (checks, 1),
    "batches of an epoch": (batching, 1),
    "collating an epoch": (collating, 1),
    "unigram counts": (unigram, 1),
    "queue of selective-global": (gate_queue, 1),
    "sentence weights: table, look-up, save, load": (weights_table, 1),
    "sentence weights: plan of a refresh": (refresh_plan, 1),
    "sentence weights: a refresh (1/20)": (refresh_walk, 1 / 20),
    "store of a teacher: written": (store_written, 1),
    "store of a teacher: an epoch read": (store_read, 1),
    "translations: written": (translations_written, 1),
    "translations: checked, chosen, binarised": (distilled_data, 1),
    "calibration, forced": (predictions, 1),
    "table of tokens: written": (token_table, 1),
    "calibration, inference (1/20)": (generated, 1 / 20),
}
