"""Task ``translation_multi_simple_epoch_with_teacher``: fairseq's multilingual translation task, with all its options
and a teacher that was trained with the same language tokens."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.data import SampledMultiDataset
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import FairseqTask, register_task
from fairseq.tasks.translation_multi_simple_epoch import TranslationMultiSimpleEpochTask

from hgkd_fairseq import teacher
from hgkd_fairseq.data import batches, language_tokens, pairs
from hgkd_fairseq.errors import UserError, flag
from hgkd_fairseq.tasks.with_teacher import WithTeacher
from hgkd_fairseq.teacher.config import TeacherOptions


@register_task("translation_multi_simple_epoch_with_teacher")
class TranslationMultiSimpleEpochWithTeacherTask(WithTeacher, TranslationMultiSimpleEpochTask):
    @staticmethod
    def add_args(parser):
        TranslationMultiSimpleEpochTask.add_args(parser)
        gen_parser_from_dataclass(parser, TeacherOptions())

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.pair_names = pairs.names(self)
        self.whole: tuple[Any, Any] | None = None  # the training data, and the same data with each sentence once

    def build_criterion(self, *args, **kwargs):
        # compat.py patches this method, but not that of the older tasks, which does the same.
        criterion = FairseqTask.build_criterion(self, *args, **kwargs)
        self.check_criterion(criterion)
        return criterion

    def language_tokens(self) -> list[int]:
        return language_tokens.of_multilingual(self)

    def load_teacher(self) -> teacher.TeacherSource:
        for option in ("teacher_store", "gauge_store"):
            if getattr(self.cfg, option):
                raise UserError(
                    f"{flag(option)}: a store has the sentences of one language pair's data, and "
                    "translation_multi_simple_epoch_with_teacher trains on several; give the teacher itself "
                    "(--teacher-path)"
                )
        return super().load_teacher()

    def prepare(self, split: str, epoch: int, dataset: Any) -> None:
        if split == self.cfg.train_subset:
            pairs.same_pass(dataset, epoch)
        pairs.number(dataset)
        pairs.tell_pairs(dataset, self)
        super().prepare(split, epoch, dataset)

    def every_sentence(self) -> Any:
        training = self.datasets[self.cfg.train_subset]
        if not isinstance(training, SampledMultiDataset):  # a single language pair
            return training
        if self.whole is None or self.whole[0] is not training:
            shared = self.data_manager._shared_collater()
            parts = OrderedDict(zip(training.keys, pairs.parts(training), strict=True))
            whole = SampledMultiDataset(parts, virtual_size=None, split=training.split, shared_collater=shared)
            pairs.tell_pairs(whole, self)
            language_tokens.set_aside(whole, self.language_tokens(), self.target_dictionary.pad())
            batches.count_targets(whole, self.target_dictionary.pad())
            self.whole = training, whole
        return self.whole[1]

    def is_trained_on(self, dataset: Any) -> bool:
        return super().is_trained_on(dataset) or (self.whole is not None and dataset is self.whole[1])

    def training_targets(self) -> Iterator[torch.Tensor]:
        if len(utils.split_paths(self.cfg.data)) > 1:
            raise UserError("--teacher-source unigram counts the training data, in one folder; join the folders")
        shown = self.datasets.pop(self.cfg.train_subset, None)  # fairseq cannot load it twice
        try:
            self.load_dataset(self.cfg.train_subset, combine=True)
            whole = self.every_sentence()
            limit = utils.resolve_max_positions(self.max_positions(), self.cfg.max_tokens)
            kept = self.filter_indices_by_size(np.arange(len(whole)), whole, limit, ignore_invalid_inputs=True)
            yield from pairs.targets(whole, kept, self.language_tokens())
        finally:
            self.datasets.pop(self.cfg.train_subset, None)
            if shown is not None:
                self.datasets[self.cfg.train_subset] = shown
