"""On-policy distillation (GKD, Agarwal et al., ICLR 2024, arXiv:2306.13649): the student translates training sentences
during the training and learns from the teacher on its own translations."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from hgkd_fairseq.data import on_policy
from hgkd_fairseq.data.batches import filled
from hgkd_fairseq.errors import UserError, flag
from hgkd_fairseq.evaluation.on_policy import Translator
from hgkd_fairseq.gates import Gate, get_gate
from hgkd_fairseq.plugin import features, training_state

logger = logging.getLogger(__name__)

MEMORY = "on_policy"  # key in the memory of the training's state
MAX_TOKENS = 4000  # of a batch of sources, if --max-tokens is not set
TEACHER_ALONE = get_gate("always", kd_weight=1.0)  # own translations have no data term


class OnPolicy:
    """Lets the student translate at the beginning of every --on-policy-every-th epoch, and keeps the translations.

    Each batch is translated by one worker, and all workers receive all translations. The batches, and thus the
    translations, do not depend on the number of workers.

    Args:
        criterion: criterion whose options, task and teacher are used.

    Raises:
        UserError: if on-policy distillation cannot be used with the options or the teacher.
    """

    def __init__(self, criterion: Any):
        self.cfg, self.task = criterion.cfg, criterion.task
        self.state = training_state.of(criterion.task)
        check(self.cfg, criterion.gate, self.task)
        self.buffer = on_policy.OwnTranslations({})
        self.state.at_training_begin.append(self.begin_training)
        self.state.at_epoch_begin.append(self.begin_epoch)

    def begin_training(self, epoch: int, model: torch.nn.Module) -> None:
        """Check that the student will translate, or has done so before the run was resumed.

        Raises:
            UserError: the training ends before.
        """
        every = self.cfg.on_policy_every
        if 0 < self.cfg.max_epoch < every and not self.own().state:
            raise UserError(
                f"--on-policy-every {every}: the training ends before, at --max-epoch {self.cfg.max_epoch}, so that "
                "the student never translates; give a smaller number"
            )

    def own(self) -> on_policy.OwnTranslations:
        """Return the buffer of translations, whose content is in the training's memory and restored with it."""
        state = self.state.memory.setdefault(MEMORY, self.buffer.state)
        if state is not self.buffer.state:
            self.buffer = on_policy.OwnTranslations(state)
        return self.buffer

    def replaced(self, sample: dict) -> tuple[dict, list[bool] | None]:
        """Return a batch with the student's translations in place of targets, and for each sentence whether it has one.

        See :meth:`OwnTranslations.in_place_of_targets`.
        """
        dictionary = self.task.target_dictionary
        return self.own().in_place_of_targets(sample, dictionary.pad(), dictionary.eos(), self.cfg.max_tokens)

    def begin_epoch(self, epoch: int, model: torch.nn.Module) -> None:
        """Let the student translate if it is due in this epoch, and only once if a run is resumed within the epoch.

        Args:
            epoch: epoch that begins.
            model: the student, which may be wrapped.
        """
        state = self.own().state
        if int(state.get("epoch", 0)) == epoch:
            return
        state["epoch"] = torch.tensor(epoch)
        done = 0 if self.state.updates is None else self.state.updates + 1
        if epoch % self.cfg.on_policy_every == 0 and done >= self.cfg.distill_start_update:
            with features.without_dropout(model):
                self.translate(epoch, features.unwrap(model))

    @torch.no_grad()
    def translate(self, epoch: int, student: torch.nn.Module) -> None:
        start, cfg, training = time.perf_counter(), self.cfg, self.task.dataset(self.task.cfg.train_subset)
        workers = distributed_utils.get_data_parallel_group()
        count = distributed_utils.get_world_size(workers)
        rank = distributed_utils.get_rank(workers) if count > 1 else 0
        first = next(student.parameters())
        limit = utils.resolve_max_positions(self.task.max_positions(), features.max_positions(student), cfg.max_tokens)
        there = self.task.filter_indices_by_size(np.arange(len(training)), training, limit, ignore_invalid_inputs=True)
        numbers, seed = on_policy.drawn(np.asarray(there), cfg.on_policy_share, cfg.seed, epoch)
        if getattr(training, "supports_prefetch", False):
            training.prefetch(numbers)
        teachers = self.task.load_teacher().placed(first.device, first.dtype)
        how = {name: getattr(cfg, f"on_policy_{name}") for name in ("beam", "sampling", "speculative")}
        translator = Translator(student, teachers, self.task.target_dictionary, **how, seed=seed)
        sizes = training.src_sizes
        found: dict[int, Tensor] = {}
        order = sorted(numbers, key=lambda one: (-sizes[one], one))
        batches = list(filled(order, sizes.__getitem__, max((cfg.max_tokens or MAX_TOKENS) // cfg.on_policy_beam, 1)))
        with torch.autocast(first.device.type, enabled=cfg.amp and first.device.type == "cuda"):
            for batch in batches[rank::count]:
                sample = training.collater([training[number] for number in batch])
                if first.device.type == "cuda":
                    sample = utils.move_to_cuda(sample, first.device)
                found |= dict(zip(sample["id"].tolist(), translator(sample), strict=True))
        length, token = shared(numbers, found, first.device, workers if count > 1 else None)
        self.own().fill(torch.tensor(numbers, dtype=torch.int64), length, token)
        logger.info(
            "the student has translated %d training sentences in %.1f s, %.1f tokens each",
            len(numbers), time.perf_counter() - start, len(token) / max(len(numbers), 1),
        )  # fmt: skip


def shared(numbers: Sequence[int], found: dict[int, Tensor], device: torch.device, workers) -> tuple[Tensor, Tensor]:
    """Combine the translations of all workers.

    Args:
        numbers: numbers of all M translated sentences.
        found: translations (T,) of this worker, by number; no other worker has the same ones.
        device: device for the communication.
        workers: process group of the workers; None if there is only one.

    Returns:
        The lengths (M,) int64 and the concatenated tokens, int32, of all translations in the order of `numbers`, on the
        CPU.
    """
    length = torch.tensor([len(found[one]) if one in found else 0 for one in numbers], dtype=torch.int64)
    if workers is not None:
        length = length.to(device)
        distributed_utils.all_reduce(length, workers)
    token = torch.zeros(int(length.sum()), dtype=torch.int32)
    for number, room in zip(numbers, token.split(length.tolist()), strict=True):
        if number in found:
            room.copy_(found[number])
    if workers is not None:
        token = token.to(device)
        distributed_utils.all_reduce(token, workers)
    return length.cpu(), token.cpu()


def check(cfg: Any, gate: Gate, task: Any) -> None:
    """Check that --on-policy-share can be used with the other options, the gate and the task's teacher.

    Raises:
        UserError: if it cannot; the message names the other option.
    """
    share, data = f"--on-policy-share {cfg.on_policy_share:g}", task.cfg
    if not gate.needs_teacher:
        raise UserError(
            f"{share}: of its own translations a student learns from a teacher alone, which --gate {cfg.gate} does not "
            "have; give another gate and --teacher-path, or drop the option"
        )
    store = next((name for name in ("teacher_store", "gauge_store") if getattr(data, name, None)), None)
    if store:
        raise UserError(
            f"{share}: {flag(store)} knows no translations but those of the data; give --teacher-path CHECKPOINT "
            "alone, or drop the option"
        )
    if task.pair_names or task.language_tokens():
        raise UserError(
            f"{share}: the student translates training data of one language pair, without language tokens; train it "
            "with --task translation_with_teacher, or drop the option"
        )
    teacher = task.load_teacher()
    if teacher.name != "checkpoint":
        raise UserError(
            f"{share} needs --teacher-path CHECKPOINT, not --teacher-source {teacher.name}; give it, or drop the option"
        )
    if cfg.on_policy_speculative and teacher.reindexed:
        raise UserError(
            "--on-policy-speculative needs a teacher with the student's own dictionaries; preprocess the data with the "
            "teacher's (fairseq-preprocess --srcdict --tgtdict), or drop the option"
        )
    if cfg.on_policy_beam > 1 and (cfg.on_policy_sampling or cfg.on_policy_speculative):
        other = "sampling" if cfg.on_policy_sampling else "speculative"
        raise UserError(f"--on-policy-beam {cfg.on_policy_beam} is a search, --on-policy-{other} draws; drop one")
    if cfg.ignore_prefix_size:
        raise UserError(f"{share}: the student's translations begin with no prefix; drop --ignore-prefix-size")
    if getattr(data, "left_pad_target", False):
        raise UserError(f"{share} needs targets that are padded on the right; drop --left-pad-target")
    if len(utils.split_paths(data.data)) > 1:
        raise UserError(f"{share} numbers the training sentences and needs them in one folder; join the data")
