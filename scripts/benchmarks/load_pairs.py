"""The parts of load.py that process the sentence pairs of a corpus.

Each part is a function of a folder and a number of pairs. It prepares its inputs and returns the function to measure.
Parts that need token probabilities draw them at random for each batch (`statistics`), which is included in the
measurement.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import corpora
import numpy as np
import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks import FairseqTask, setup_task
from omegaconf import OmegaConf

from hgkd_fairseq import gates, plugin
from hgkd_fairseq.calibration.scores import Predictions, Settings
from hgkd_fairseq.evaluation.token_table import TokenTable
from hgkd_fairseq.gates import TokenStatistics
from hgkd_fairseq.plugin import binarised
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.sentence_weights.refresh import Refresh
from hgkd_fairseq.teacher.unigram import log_frequencies

Run = Callable[[], object]

MAX_TOKENS = 4000  # per batch
TYPES = {"corpus": 32_000, "short": 300}  # vocabulary size of each kind of corpus; a model is run only on "short"
TINY = (
    *("--arch", "transformer_iwslt_de_en", "--encoder-layers", 1, "--decoder-layers", 1, "--share-all-embeddings"),
    *("--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 16),
    *("--decoder-ffn-embed-dim", 16, "--encoder-attention-heads", 1, "--decoder-attention-heads", 1),
)


def make_corpus(folder: Path, kind: str, pairs: int) -> Path:
    """Return the folder with a corpus of `pairs` training pairs; write it unless a complete one exists.

    Args:
        folder: parent folder.
        kind: key of TYPES: "corpus" (sentences of up to 1,024 tokens) or "short" (up to 24).
        pairs: number of training pairs.
    """
    data = folder / f"{kind}-{pairs}"
    if not (data / "whole").exists():
        shutil.rmtree(data, ignore_errors=True)
        longest = corpora.LONGEST if kind == "corpus" else 24
        corpora.write(data, {"train": pairs, "valid": 64}, TYPES[kind], longest)
        (data / "whole").touch()
    return data


def training(data: Path, *given) -> tuple:
    """Return (configuration, task) of a distilling fairseq-train command with the further options `given`.

    The data are not loaded. As side effects, the plugin is registered and messages up to INFO are disabled.
    """
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
    """Return, for each batch of an epoch, the numbers and the target lengths of its sentences, both (sentences,)."""
    dataset = loaded(folder, pairs).dataset("train")
    batches = dataset.batch_by_size(dataset.ordered_indices(), max_tokens=MAX_TOKENS)
    return [(np.asarray(batch), dataset.tgt_sizes[batch]) for batch in batches]


def statistics(numbers: np.ndarray, lengths: np.ndarray, seed: int) -> TokenStatistics:
    sentence = torch.arange(len(lengths)).repeat_interleave(torch.from_numpy(lengths.astype(np.int64)))
    logprobs = torch.rand(2, len(sentence), generator=torch.Generator().manual_seed(seed)).log()
    return TokenStatistics(*logprobs, sentence, len(lengths), 32_000, 0.0, torch.from_numpy(numbers)[sentence])


class Batch:
    """Stand-in for the loss output of a batch that a gate observes."""

    def __init__(self, found: TokenStatistics):
        self.token_nll = self.token_read = -found.student_logprob[None]
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
    """Return the refresh of sentence weights, ready to run, and its student model.

    Student and teacher are untrained models of the same tiny size.
    """
    data = make_corpus(folder, kind, pairs)
    cfg, task = training(data, "--gate", "none")
    teacher = data / "teacher.pt"
    state = {"args": None, "cfg": plain_config(data), "model": task.build_model(cfg.model).state_dict()}
    history = {"num_updates": 0, "optimizer_name": "FairseqAdam", "lr_scheduler_state": {}}
    state |= {"optimizer_history": [history], "last_optimizer_state": None}
    torch.save({**state, "extra_state": {"epoch": 1, "train_iterator": {"epoch": 1}}}, teacher)
    cfg, task = training(data, "--gate", "instance", "--teacher-path", teacher, "--refresh-interval", 1)
    task.load_dataset("train", combine=True)
    model, criterion = task.build_model(cfg.model), task.build_criterion(cfg.criterion)
    criterion.refresh.begin_training(1, model)
    return criterion.refresh, model


def plain_config(data: Path) -> dict:
    """Return the configuration that a checkpoint of a tiny model trained by plain fairseq contains."""
    words = [data, *TINY, "--optimizer", "adam"]
    arguments = options.parse_args_and_arch(options.get_training_parser(), [str(word) for word in words])
    cfg = convert_namespace_to_omegaconf(arguments)
    cfg.task.source_lang, cfg.task.target_lang = "de", "en"
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)


def refresh_plan(folder: Path, pairs: int) -> Run:
    found, model = refresh(folder, "corpus", pairs)
    return lambda: found.plan(1, model)


def refresh_walk(folder: Path, pairs: int) -> Run:
    found, model = refresh(folder, "short", pairs)
    return lambda: found.walk(1, model)


def predictions(folder: Path, pairs: int) -> Run:
    """Accumulate and score predictions as `hgkd calibration forced` does, without running a model."""
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
