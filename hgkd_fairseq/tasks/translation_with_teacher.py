"""Task ``translation_with_teacher``: fairseq's translation task plus a teacher signal for the criterion."""

# No `from __future__ import annotations` here: fairseq reads the types of the options at run time.
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Optional

import numpy as np
import torch
from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.distributed import utils as distributed_utils
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from omegaconf import II

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.teacher import TeacherSource
from hgkd_fairseq.teacher.live import LiveTeacher
from hgkd_fairseq.teacher.loras import Loras
from hgkd_fairseq.teacher.past import PastTeacher
from hgkd_fairseq.teacher.unigram import UnigramTeacher, log_frequencies
from hgkd_fairseq.tensorboard import write_reliability

logger = logging.getLogger(__name__)

SOURCES = ("checkpoint", "unigram", "loras", "previous-epoch", "ema")


def with_target_lengths(collater: Callable[..., dict], pad: int, samples, **options) -> dict:
    """A batch that also says how many tokens each target has, as host integers: to count them on a GPU the host would
    have to wait for it in every step."""
    batch = collater(samples, **options)
    if batch.get("target") is not None:
        batch["target_lengths"] = batch["target"].ne(pad).sum(1).tolist()
    return batch


@dataclass
class TranslationWithTeacherConfig(TranslationConfig):
    teacher_source: ChoiceEnum(list(SOURCES)) = field(  # type: ignore[valid-type]
        default="checkpoint",
        metadata={
            "help": "what teaches: the checkpoint of --teacher-path; unigram, the frequencies of the training targets; "
            "loras, a distribution of low rank for each gold token, learned beside the student; previous-epoch, the "
            "student as it was when the epoch began; ema, the moving average of its parameters (with fairseq's "
            "--store-ema --ema-decay)"
        },
    )
    teacher_path: Optional[str] = field(  # noqa: UP045  fairseq's parser reads Optional[...], not X | None
        default=None,
        metadata={
            "help": "fairseq checkpoint of the teacher, or several with ':' between them, averaged in probability "
            "space; any architecture and size, the same dictionaries as the student; needed for training and "
            "validation with a distilling criterion, never for generation"
        },
    )
    teacher_dtype: ChoiceEnum(["auto", "fp32", "fp16", "bf16"]) = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "precision of the teacher's forward pass; auto: the student's"}
    )
    teacher_model_overrides: str = field(
        default="{}",
        metadata={
            "help": "a dict that overrides settings in the teacher's checkpoint, as --model-overrides does for the "
            "student's; {'data': 'DIR'} names the folder of its dictionaries where they have moved"
        },
    )
    store_ema: bool = II("ema.store_ema")
    save_dir: str = II("checkpoint.save_dir")
    max_tokens: Optional[int] = II("dataset.max_tokens")  # noqa: UP045
    valid_subset: str = II("dataset.valid_subset")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")  # noqa: UP045


# What fairseq-train writes, replaces or removes in its --save-dir.
WRITTEN = re.compile(r"(checkpoint(\d+|_\d+_\d+|_best|_last|\.best_.+)|crash)(-.+)?\.pt")


def refuse_what_training_writes(teacher_path: str, save_dir: str) -> None:
    """A teacher that lies where the student's checkpoints go, itself or a link to it, would become the student.

    Raises:
        UserError: it names the file.
    """
    folder = os.path.realpath(save_dir)
    for path in utils.split_paths(teacher_path):
        name, seen = path, set()
        while name not in seen:
            seen.add(name)
            if WRITTEN.fullmatch(os.path.basename(name)) and os.path.realpath(os.path.dirname(name) or ".") == folder:
                raise UserError(
                    f"--teacher-path {path} lies in --save-dir {save_dir} under a name that this training writes: it "
                    "would be replaced by the student; give another --save-dir, or move the teacher"
                )
            if os.path.islink(name):
                name = os.path.join(os.path.dirname(name), os.readlink(name))


@register_task("translation_with_teacher", dataclass=TranslationWithTeacherConfig)
class TranslationWithTeacherTask(TranslationTask):
    """fairseq's translation task, with all its options, and a frozen teacher that stands outside every module.

    The teacher is loaded by the criterion that asks for it (:meth:`load_teacher`), so generation, export and validation
    with another criterion never touch it, and no checkpoint of the student holds any of it.
    """

    cfg: TranslationWithTeacherConfig

    def __init__(self, cfg: TranslationWithTeacherConfig, src_dict, tgt_dict):
        super().__init__(cfg, src_dict, tgt_dict)
        self.teacher: TeacherSource | None = None
        # What a gate or the student's past teacher remembers, by name: tensors in (nested) dicts, in the checkpoints.
        self.memory: dict[str, dict] = {}
        # Updates made so far, for criterions that change over time; None outside training.
        self.num_updates: int | None = None
        self.method: dict[str, Any] = {}  # the criterion's, kept in the checkpoints: training_state.py compares it
        # Where the task was made from a checkpoint, not to train: what fairseq-validate needs of it.
        self.loaded: dict[str, Any] | None = None
        self.ignore_grad = False  # whether this step's batch is one that only keeps the workers in step
        self.validated = 0  # subsets, in the validation that is going on
        self.held_out_share = 0.0  # share of the training sentences that are kept aside for what a gate learns
        self.at_training_begin: list[Callable] = []  # called with (epoch, model) when data and checkpoint are loaded
        self.at_epoch_begin: list[Callable] = []  # called with (epoch, model) before each epoch of training

    def load_teacher(self) -> TeacherSource:
        """The teacher, loaded on the first call; on the CPU until it meets the first batch.

        Raises:
            UserError: no --teacher-path, a file that cannot be used, dictionaries that differ from the student's.
        """
        if self.teacher is None:
            self.teacher = self.make_teacher()
        return self.teacher

    def make_teacher(self) -> TeacherSource:
        source = self.cfg.teacher_source
        if source != "checkpoint" and self.cfg.teacher_path:
            raise UserError(f"--teacher-path and --teacher-source {source} are two teachers; give one of them")
        if source == "unigram":
            counted = self.memory.get("unigram")  # as in the training, also where its data are not at hand
            if counted is None:
                counted = log_frequencies(self.training_targets(), len(self.tgt_dict))
                self.memory["unigram"] = counted
            return UnigramTeacher(counted)
        if source == "loras":
            return Loras(len(self.tgt_dict))
        if source == "ema" and not self.cfg.store_ema:
            raise UserError("--teacher-source ema needs fairseq's moving average: add --store-ema --ema-decay 0.999")
        if source in ("ema", "previous-epoch"):
            return PastTeacher()
        if not self.cfg.teacher_path:
            raise UserError(
                "--criterion hard_gate_kd distils from a teacher and there is none: give --teacher-path CHECKPOINT "
                "(fairseq-validate without one: --criterion hard_gate_kd --gate none)"
            )
        if self.loaded is None:
            refuse_what_training_writes(self.cfg.teacher_path, self.cfg.save_dir)
        return LiveTeacher(
            utils.split_paths(self.cfg.teacher_path),
            self.src_dict,
            self.tgt_dict,
            dtype=self.cfg.teacher_dtype,
            overrides=self.cfg.teacher_model_overrides,
            languages=(self.cfg.source_lang, self.cfg.target_lang),
        )

    def load_dataset(self, split, epoch=1, combine=False, **kwargs):
        super().load_dataset(split, epoch, combine, **kwargs)
        dataset = self.datasets[split]
        dataset.collater = functools.partial(with_target_lengths, dataset.collater, self.tgt_dict.pad())
        if isinstance(self.teacher, LiveTeacher):
            self.teacher.check_lengths(split, dataset, self.max_positions())

    def training_targets(self) -> Iterator[torch.Tensor]:
        """The targets (length,) that are trained on, those of fairseq's train1, ... and repeated ones among them, in
        all folders; without those that are too long or kept aside."""
        subset, shown = self.cfg.train_subset, self.datasets.get(self.cfg.train_subset)
        limit = utils.resolve_max_positions(self.max_positions(), self.cfg.max_tokens)
        for epoch, _ in enumerate(utils.split_paths(self.cfg.data), 1):
            try:
                self.load_dataset(subset, epoch=epoch, combine=True)
            except FileNotFoundError as error:
                raise UserError(f"--teacher-source unigram counts the training data: {error}") from None
            dataset = self.datasets[subset]
            kept = self.filter_indices_by_size(np.arange(len(dataset)), dataset, limit, ignore_invalid_inputs=True)
            yield from (dataset.tgt[index] for index in kept)
        if shown is None:
            del self.datasets[subset]
        else:
            self.datasets[subset] = shown

    def held_out(self, sentences: int) -> np.ndarray:
        """(sentences,) bool, which of the training sentences are kept aside: the same ones in every run of a share."""
        mask = np.zeros(sentences, dtype=bool)
        if self.held_out_share:
            count = max(round(self.held_out_share * sentences), 1)
            mask[np.random.default_rng(1).permutation(sentences)[:count]] = True
        return mask

    def filter_indices_by_size(self, indices, dataset, max_positions=None, ignore_invalid_inputs=False):
        """fairseq's filter, which every training sentence passes on its way to a batch, keeps the held-out ones aside
        as well."""
        indices = super().filter_indices_by_size(indices, dataset, max_positions, ignore_invalid_inputs)
        if self.held_out_share and dataset is self.datasets.get(self.cfg.train_subset):
            kept = indices[~self.held_out(len(dataset))[indices]]
            logger.info("%d of %d training sentences are kept aside", len(indices) - len(kept), len(indices))
            return kept
        return indices

    @property
    def uses_ema(self) -> bool:
        """Whether fairseq's trainer shall hand its moving average to each step."""
        return self.cfg.teacher_source == "ema"

    def begin_training(self, epoch, model):
        """Called when everything is loaded, and again where a run is resumed, before the first step."""
        for call in self.at_training_begin:
            call(epoch, model)

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)
        self.keep_previous_epoch(epoch, model)
        for call in self.at_epoch_begin:
            call(epoch, model)

    def keep_previous_epoch(self, epoch, model):
        """Keep the student as it is, to teach in this epoch. It goes into the checkpoints: a run that is resumed in the
        middle of an epoch finds there what the epoch began with."""
        if self.cfg.teacher_source != "previous-epoch" or not isinstance(self.teacher, PastTeacher) or epoch < 2:
            return
        kept = self.memory.get("previous_epoch")
        if kept is not None and kept["epoch"] == epoch:
            self.teacher.take(model, kept["model"])
        else:
            self.teacher.take(model)
        self.memory["previous_epoch"] = {"epoch": epoch, "model": self.teacher.model.state_dict()}

    def begin_valid_epoch(self, epoch, model):
        super().begin_valid_epoch(epoch, model)
        self.validated = 0

    def post_validate(self, model, stats, agg):
        """Called by fairseq after each of --valid-subset, in their order, with the meters of that subset."""
        subset = self.cfg.valid_subset.split(",")[self.validated]
        self.validated += 1
        master = distributed_utils.get_global_rank() == 0
        if self.cfg.tensorboard_logdir and master and "_calibration" in agg:
            write_reliability(self.cfg.tensorboard_logdir, subset, agg["_calibration"].sum, stats["num_updates"])

    # fairseq saves FairseqTask.state as well, but does not restore it when training resumes; these two it calls.

    def get_checkpoint_dict(self) -> dict:
        kept = {"method": self.method, "updates": self.num_updates, "teacher": self.fingerprint()}
        return {type(self).__name__: {**utils.move_to_cpu(self.memory), **kept}}

    def set_checkpoint_dict(self, memory: dict) -> None:
        self.memory |= {name: kept for name, kept in memory.items() if name not in ("method", "updates", "teacher")}
        self.num_updates = memory.get("updates")

    def fingerprint(self) -> str | None:
        """What tells this run's teacher from another; None for one that changes with the student."""
        return getattr(self.teacher, "fingerprint", None)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, ema_model=None):
        self.num_updates, self.ignore_grad = update_num, ignore_grad
        self.watch(model, ema_model)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)

    def valid_step(self, sample, model, criterion, ema_model=None):
        self.watch(model, ema_model)
        # What a gate draws at random is the same whenever this batch is validated, in training and in fairseq-validate.
        with utils.set_torch_seed(sample["ntokens"]):
            return super().valid_step(sample, model, criterion)

    def watch(self, model, ema_model) -> None:
        """Give a teacher that is the student's past its model: fairseq's moving average, or outside of training what
        the checkpoint has."""
        if not isinstance(self.teacher, PastTeacher):
            return
        if ema_model is not None:
            self.teacher.watch(ema_model)
        elif self.loaded is not None and not self.teacher.ready:
            previous = self.memory.get("previous_epoch", {}).get("model")
            past = self.loaded["ema"] if self.cfg.teacher_source == "ema" else previous
            if past is not None:
                self.teacher.take(model, past)
