"""Measures at the start of a training how well a frozen teacher fits the data, and fits its temperature.

On the tokens that the gate assigns to the teacher, the student learns the teacher's confidence at
--teacher-temperature: above the fitted temperature it becomes underconfident, below it overconfident.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.data import FairseqDataset, data_utils

from hgkd_fairseq import __version__, cache, files
from hgkd_fairseq.calibration import temperature as calibration
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.plugin import features
from hgkd_fairseq.plugin.config import given_temperature
from hgkd_fairseq.plugin.training_state import TrainingState
from hgkd_fairseq.teacher import dictionaries
from hgkd_fairseq.teacher.signals import Dense
from hgkd_fairseq.teacher.source import TeacherSource

logger = logging.getLogger(__name__)

FAR = 0.15  # distance of a given temperature from the fitted one above which a warning is logged
MOST_TOKENS = 100_000  # target tokens; a larger validation set is sampled at evenly spaced sentences
MOST_LOGITS = 2**27  # log-probabilities kept in memory for a teacher without a linear output layer
TRAINING_TOKENS = 20_000  # target tokens in the sample of the training set
DICTIONARY_TOKENS = 10_000  # target tokens in the sample that compares dictionaries
BATCH_TOKENS = 4000  # per batch, including padding
CHUNK_TOKENS = 1024  # tokens whose logits are in memory at the same time


@dataclass(frozen=True)
class Gauge:
    """How well a teacher fits the data. Each NLL is the mean over the target tokens, in bits."""

    temperature: float | None  # with the lowest validation NLL; None: none between 1/20 and 20
    valid_nll: float  # at that temperature, or at 1 if it is None
    valid_nll_at_1: float
    training_nll_at_1: float

    def __str__(self) -> str:
        fitted = "no temperature fits the teacher to the validation set"
        if self.temperature is not None:
            fitted = f"the temperature that fits the teacher to the validation set is {self.temperature:.4f}"
        return (
            f"{fitted}: NLL {self.valid_nll:.3f} bits there, {self.valid_nll_at_1:.3f} at 1, and "
            f"{self.training_nll_at_1:.3f} at 1 on a sample of the training set"
        )


@dataclass(frozen=True)
class Tokens:
    """N target tokens with the teacher's heads for them."""

    heads: list[Head]  # one per ensemble member, hidden (N, D)
    gold: torch.Tensor  # (N,) int64, target token ids

    def slopes(self, inverse: float) -> tuple[float, float]:
        """Return the first and second derivatives of the summed NLL (nats) with respect to the inverse temperature."""
        found = [
            calibration.nll_slopes(functools.partial(mean_logprobs, heads), gold, inverse)
            for heads, gold in self.chunks()
        ]
        return sum(first for first, _ in found), sum(second for _, second in found)

    @torch.no_grad()
    def nll(self, temperature: float) -> float:
        """Return the mean NLL per token at a temperature, in bits."""
        total = sum(
            float(-mean_logprobs(heads, temperature).gather(1, gold[:, None]).double().sum())
            for heads, gold in self.chunks()
        )
        return total / max(len(self.gold), 1) / math.log(2)

    def chunks(self) -> Iterator[tuple[list[Head], torch.Tensor]]:
        for start in range(0, len(self.gold), CHUNK_TOKENS):
            rows = slice(start, start + CHUNK_TOKENS)
            yield [head._replace(hidden=head.hidden[rows]) for head in self.heads], self.gold[rows]


def begin(cfg: Any, task: Any, teacher: TeacherSource, model: Any, state: TrainingState) -> None:
    """Measure a frozen teacher at the start of a training, and set or check the teacher temperature.

    With --teacher-temperature auto, the fitted temperature is stored in ``state.fitted_temperature``, unless a resumed
    checkpoint has already set it. A given temperature that is far from the fitted one causes a warning.

    Args:
        cfg: options of the criterion.
        task: task with the loaded data sets.
        teacher: a frozen teacher.
        model: the student, which determines the teacher's device and precision.
        state: training state of the task.

    Raises:
        UserError: the temperature is auto, and the validation set or the training set is not loaded or has no usable
            sentence, or no temperature fits.
    """
    valid = "valid" if cfg.combine_valid_subsets else cfg.valid_subset.split(",")[0]
    known = valid in task.datasets and task.cfg.train_subset in task.datasets
    if known:
        report_dictionaries(teacher, task, model)
    gauge = measure(teacher, task, valid, model) if known else None
    given = given_temperature(cfg)
    if gauge is not None:
        logger.info("teacher: %s", gauge)
    fitted = gauge.temperature if gauge else None
    if given is None:
        state.fitted_temperature = state.fitted_temperature or fitted
        if state.fitted_temperature is None and gauge is None:
            raise UserError(
                f"--teacher-temperature auto is fitted to subset {valid}, and that is not loaded, or it or the "
                "training set has no sentence that the student takes; drop --disable-validation, or give a number"
            )
        if state.fitted_temperature is None:
            raise UserError(
                f"--teacher-temperature auto: no temperature from {1 / calibration.HIGHEST:g} to "
                f"{calibration.HIGHEST:g} fits the teacher to subset {valid}; give a number, or a teacher that was not "
                "trained on that subset"
            )
        logger.info("--teacher-temperature auto: %.4f", state.fitted_temperature)
    elif fitted and cfg.teacher_temperature_start is None and abs(given - fitted) > FAR:
        logger.warning(
            "--teacher-temperature %g is %s the %.2f that fits the teacher to the validation set: students end "
            "%sconfident; auto takes the fitted one",
            *(given, "above", fitted, "under") if given > fitted else (given, "below", fitted, "over"),
        )


def report_dictionaries(teacher: TeacherSource, task: Any, model: Any) -> None:
    """Log how much of its probability a teacher loses because its dictionaries differ from the student's."""
    if not teacher.reindexed:
        return
    parameter = next(model.parameters())
    limits = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    signals = []
    for batch in sample(task.datasets[task.cfg.train_subset], DICTIONARY_TOKENS, limits):
        batch = utils.move_to_cuda(batch, parameter.device) if parameter.is_cuda else batch
        signal = teacher.signal(batch, parameter.device, parameter.dtype)
        if not (isinstance(signal, Dense) and signal.whole):
            return
        signals.append((batch, signal))
    if signals:
        dictionaries.report(signals, task.source_dictionary, task.target_dictionary)


def measure(teacher: TeacherSource, task: Any, valid: str, model: Any) -> Gauge | None:
    """Fit a teacher's temperature and measure its NLL, or return the cached result of an earlier run.

    The cache key consists of the package version, the teacher's fingerprint, the precision and the sampled sentences.
    A teacher without a fingerprint is measured in each run.

    Args:
        teacher: a frozen teacher.
        task: task with the loaded data sets.
        valid: name of the validation subset to fit on.
        model: the student, which determines the teacher's device and precision.

    Returns:
        The measurements, or None if the validation or the training subset has no sentence that the student accepts.
    """
    parameter = next(model.parameters())
    pad = task.target_dictionary.pad()
    limits = utils.resolve_max_positions(task.max_positions(), model.max_positions())
    linear = all(features.linear_output(member) is not None for member in teacher.models)
    most = MOST_TOKENS if linear else min(MOST_TOKENS, MOST_LOGITS // len(task.target_dictionary))
    held_out = sample(task.datasets[valid], most, limits)
    seen = sample(task.datasets[task.cfg.train_subset], min(most, TRAINING_TOKENS), limits)
    if not (held_out and seen):
        return None
    precision = f"{getattr(task.cfg, 'teacher_dtype', 'auto')} {parameter.dtype}"
    digest = hashlib.sha256(f"{__version__} {teacher.fingerprint} {precision}".encode())
    for batch in (*held_out, *seen):
        for tokens in (batch["net_input"]["src_tokens"], batch["target"]):
            digest.update(f"{tuple(tokens.shape)}".encode() + tokens.numpy().tobytes())
    name = f"gauge-{digest.hexdigest()[:40]}.json"
    cached = teacher.fingerprint is not None
    try:
        if cached:
            known = files.read_json(cache.folder() / name, SCHEMA)
            return Gauge(**{one.name: known.get(one.name) for one in fields(Gauge)})
    except (OSError, RuntimeError, UserError):
        pass  # no cached result, or none that can be used
    tokens, training = (read(teacher, batches, pad, parameter) for batches in (held_out, seen))
    temperature = calibration.fit(tokens.slopes)
    gauge = Gauge(
        None if temperature is None else round(temperature, 4),
        valid_nll=tokens.nll(temperature or 1.0),
        valid_nll_at_1=tokens.nll(1.0),
        training_nll_at_1=training.nll(1.0),
    )
    try:
        if cached:
            known = {key: value for key, value in asdict(gauge).items() if value is not None}
            files.write_json(cache.folder() / name, known)
    except (OSError, RuntimeError, UserError) as error:
        logger.info("the teacher's temperature is fitted anew in each run: %s", error)
    return gauge


NUMBER = files.Within(0, math.inf, float)
SCHEMA = {
    "temperature?": files.Within(1 / calibration.HIGHEST, calibration.HIGHEST, float),
    **dict.fromkeys(("valid_nll", "valid_nll_at_1", "training_nll_at_1"), NUMBER),
}


def sample(dataset: FairseqDataset, most: int, limits: Any) -> list[dict]:
    """Sample evenly spaced sentences of a data set, and return them as batches.

    Args:
        dataset: data set to sample.
        most: approximate maximum of target tokens in all batches.
        limits: longest source and target, in tokens; longer sentences are excluded.
    """
    sizes = np.asarray(dataset.sizes)[:, -1]
    step = max(math.ceil(sizes.sum() / most), 1)
    indices, _ = dataset.filter_indices_by_size(np.arange(0, len(sizes), step), limits)
    indices = indices[np.argsort(sizes[indices], kind="stable")]
    longest = max((dataset.num_tokens(index) for index in indices), default=0)
    batches = data_utils.batch_by_size(indices, dataset.num_tokens, max_tokens=max(BATCH_TOKENS, longest))
    return [dataset.collater([dataset[index] for index in batch]) for batch in batches]


@torch.no_grad()
def read(teacher: TeacherSource, batches: list[dict], pad: int, like: torch.Tensor) -> Tokens:
    """Run the teacher on batches, and return its heads for all target tokens that are not padding.

    Args:
        teacher: source whose output has heads (:class:`signals.Dense`).
        batches: fairseq batches; at least one.
        pad: id of the padding token.
        like: a tensor with the device and dtype of the student's parameters.
    """
    hidden: list[list[torch.Tensor]] = []
    gold, heads = [], []
    for batch in batches:
        batch = utils.move_to_cuda(batch, like.device) if like.is_cuda else batch
        target = batch["target"]
        kept = target != pad
        heads = teacher.signal(batch, like.device, like.dtype).heads
        hidden.append([head.hidden[kept] for head in heads])
        gold.append(target[kept])
    columns = [torch.cat(parts) for parts in zip(*hidden, strict=True)]
    members = [head._replace(hidden=column) for head, column in zip(heads, columns, strict=True)]
    return Tokens(members, torch.cat(gold))
