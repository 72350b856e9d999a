"""A mix-in that adds a teacher to fairseq's translation tasks. Its options are defined in teacher/config.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from fairseq import utils
from fairseq.data import FairseqDataset
from fairseq.distributed import utils as distributed_utils

from hgkd_fairseq import teacher
from hgkd_fairseq.data import batches, held_out, language_tokens, pairs
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised, checkpoints, training_state
from hgkd_fairseq.report.tensorboard import write_reliability


class WithTeacher:
    """Mix-in that adds a teacher to a translation task of fairseq; it must precede the task in the list of bases.

    The teacher is loaded when the criterion first calls :meth:`load_teacher`, so that generation, export and validation
    with another criterion do not need it. It is not a module of the student, whose checkpoints therefore do not hold
    the parameters of a loaded teacher; a teacher that learns is saved as a child module of the criterion.
    """

    cfg: Any
    args: Any
    datasets: dict
    source_dictionary: Any
    target_dictionary: Any
    pair_names: Sequence[str] = ()  # language pairs of a multilingual task, for which metrics are logged separately

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.cfg is None:  # fairseq's older tasks have only args, others only cfg
            self.cfg = self.args
        self.args = self.cfg
        self.teacher: teacher.TeacherSource | None = None
        self.training_state = training_state.of(self)  # type: ignore[arg-type]
        self.training_state.keeps_memory = True
        if self.cfg.leave_out_fold:
            self.training_state.held_out.fold = held_out.fold(self.cfg.leave_out_fold)
            if self.cfg.upsample_primary > 1:
                raise UserError("--leave-out-fold: with --upsample-primary copies of its sentences are trained on")
        if getattr(self.cfg, "num_batch_buckets", 0) and checkpoints.NUMPY_2:  # 0 in checkpoints that were read
            raise UserError("--num-batch-buckets: fairseq's code for it fails with numpy >= 2; drop the option")
        self.validated = 0  # number of subsets validated so far in the current validation
        self.language_tokens_apart = False  # whether batches separate them from targets; set by criterion hard_gate_kd

    def build_criterion(self, cfg, *args, **kwargs):
        """Build a criterion as fairseq does, and check that one is built for training that uses the teacher.

        Raises:
            UserError: if the options name a teacher, and the criterion is another one than hard_gate_kd.
        """
        criterion = super().build_criterion(cfg, *args, **kwargs)  # type: ignore[misc]
        self.check_criterion(criterion)
        return criterion

    def check_criterion(self, criterion: Any) -> None:
        own = type(criterion).__module__.startswith("fairseq.")  # one of another plugin may use the teacher
        if own and self.training_state.loaded is None and (given := teacher.given(self.cfg)):
            raise UserError(f"{given}: nothing is distilled without --criterion hard_gate_kd; add it, or drop {given}")

    def language_tokens(self) -> list[int]:
        """Return the ids of the language tokens that the task adds to targets."""
        return []

    def load_teacher(self) -> teacher.TeacherSource:
        """Return the teacher, which is loaded on the first call and stays on the CPU until the first batch.

        Raises:
            UserError: if the options name no teacher or an unusable one, or it does not fit the student's dictionaries.
        """
        if self.teacher is None:
            request = teacher.Request(
                self.cfg,
                self.source_dictionary,
                self.target_dictionary,
                (self.cfg.source_lang, self.cfg.target_lang),
                self.training_state,
                self.training_targets,
                self.pair_names,
            )
            self.teacher = teacher.make(request)
            self.training_state.teacher_fingerprint = self.teacher.fingerprint
        return self.teacher

    def training_targets(self) -> Iterator[torch.Tensor]:
        """Iterate over the targets (length,) of the training data, without language tokens.

        Raises:
            UserError: if the data do not exist.
        """
        return batches.training_targets(self, self.cfg.max_tokens, self.language_tokens())  # type: ignore[arg-type]

    def every_sentence(self) -> FairseqDataset:
        """Return the training data with each sentence once, at the index that is its number."""
        return self.datasets[self.cfg.train_subset]

    def is_trained_on(self, dataset: Any) -> bool:
        return dataset is self.datasets.get(self.cfg.train_subset)

    def load_dataset(self, split, epoch=1, **kwargs):
        try:
            super().load_dataset(split, epoch=epoch, **kwargs)  # type: ignore[misc]
        except (FileNotFoundError, KeyError):  # KeyError: from fairseq's multilingual task
            training = split == self.cfg.train_subset
            option = "--train-subset" if training else "--valid-subset (fairseq-generate: --gen-subset)"
            raise binarised.NoSubset(
                f"there is no subset {split} in {self.cfg.data}; name another with {option}"
            ) from None
        dataset = self.datasets[split]
        if not hasattr(dataset, "prepared"):  # fairseq's multilingual task may keep the data set that is loaded
            dataset.prepared = True
            self.prepare(split, epoch, dataset)

    def prepare(self, split: str, epoch: int, dataset: Any) -> None:
        """Set up the batches of a data set that has just been loaded, and check and attach the teacher's data.

        Args:
            split: name of the data set, such as "train".
            epoch: epoch for which it was loaded, which selects one of several data folders.
            dataset: the data set.

        Raises:
            UserError: if the teacher has nothing for these data or cannot read them.
        """
        if self.language_tokens_apart:
            language_tokens.set_aside(dataset, self.language_tokens(), self.target_dictionary.pad())
        batches.count_targets(dataset, self.target_dictionary.pad())
        if self.teacher is not None:
            folders = len(utils.split_paths(self.cfg.data)) if split == self.cfg.train_subset else 1
            self.teacher.check_folders(split, folders)
            self.teacher.attach(split, (epoch - 1) % folders, dataset)
            self.teacher.check_data(split, dataset, self.max_positions())  # type: ignore[attr-defined]

    def filter_indices_by_size(self, indices, dataset, *args, **kwargs):
        """Filter indices as fairseq does; those of the training data also lose the held-out sentences.

        fairseq applies this filter to all sentences before it forms batches.
        """
        indices = super().filter_indices_by_size(indices, dataset, *args, **kwargs)  # type: ignore[misc]
        if self.is_trained_on(dataset):
            aside = self.training_state.held_out
            return aside.leave_out(indices, pairs.sentences(dataset), lambda: pairs.numbers(dataset, indices))
        return indices

    @property
    def uses_ema(self) -> bool:
        """Whether fairseq's trainer passes the moving average of the parameters (EMA) to each step."""
        return teacher.SOURCES[str(self.cfg.teacher_source)].needs_ema

    def begin_epoch(self, epoch, model):
        super().begin_epoch(epoch, model)  # type: ignore[misc]
        if self.teacher is not None:
            self.teacher.begin_epoch(epoch, model, self.training_state)
        for call in self.training_state.at_epoch_begin:
            call(epoch, model)

    def begin_valid_epoch(self, epoch, model):
        super().begin_valid_epoch(epoch, model)  # type: ignore[misc]
        self.validated = 0

    def post_validate(self, model, stats, agg):
        """Called by fairseq after each subset of --valid-subset, in order.

        Args:
            model: the student.
            stats: values that are logged for the subset.
            agg: meters of the subset.
        """
        subset = self.cfg.valid_subset.split(",")[self.validated]
        self.validated += 1
        master = distributed_utils.get_global_rank() == 0
        if self.cfg.tensorboard_logdir and master and "_calibration" in agg:
            write_reliability(self.cfg.tensorboard_logdir, subset, agg["_calibration"].sum, stats["num_updates"])
        for call in self.training_state.at_validated:
            call(subset, agg)

    # fairseq also saves FairseqTask.state but does not restore it on resuming, so these two methods are used instead.

    def get_checkpoint_dict(self) -> dict:
        return {type(self).__name__: self.training_state.checkpoint()}

    def set_checkpoint_dict(self, kept: dict) -> None:
        self.training_state.resume(kept)

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False, ema_model=None):
        self.training_state.updates, self.training_state.idle = update_num, ignore_grad
        self.before_step(model, ema_model)
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)  # type: ignore[misc]

    def valid_step(self, sample, model, criterion, ema_model=None):
        self.before_step(model, ema_model)
        # The seed makes a gate's random draws for a batch the same in every validation, also in fairseq-validate.
        with utils.set_torch_seed(sample["ntokens"]):
            return super().valid_step(sample, model, criterion)  # type: ignore[misc]

    def before_step(self, model: torch.nn.Module, ema_model: torch.nn.Module | None) -> None:
        if self.teacher is not None:
            self.teacher.before_step(model, ema_model, self.training_state)
