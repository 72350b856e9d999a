"""Task ``translation_with_teacher``: fairseq's translation task plus a teacher signal for the criterion."""

# No `from __future__ import annotations` here: fairseq reads the types of the options at run time.
from dataclasses import dataclass, field
from typing import Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.teacher import TeacherSource
from hgkd_fairseq.teacher.live import LiveTeacher


@dataclass
class TranslationWithTeacherConfig(TranslationConfig):
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
        # Updates made so far, for criterions that change over time; None outside training.
        self.num_updates: int | None = None

    def load_teacher(self) -> TeacherSource:
        """The teacher, loaded on the first call; on the CPU until it meets the first batch.

        Raises:
            UserError: no --teacher-path, a file that cannot be used, dictionaries that differ from the student's.
        """
        if self.teacher is None:
            if not self.cfg.teacher_path:
                raise UserError(
                    "--criterion hard_gate_kd distils from a teacher and there is none: give --teacher-path CHECKPOINT "
                    "(fairseq-validate without one: --criterion hard_gate_kd --gate none)"
                )
            self.teacher = LiveTeacher(
                utils.split_paths(self.cfg.teacher_path),
                self.src_dict,
                self.tgt_dict,
                dtype=self.cfg.teacher_dtype,
                overrides=self.cfg.teacher_model_overrides,
            )
        return self.teacher

    def train_step(self, sample, model, criterion, optimizer, update_num, ignore_grad=False):
        self.num_updates = update_num
        return super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
