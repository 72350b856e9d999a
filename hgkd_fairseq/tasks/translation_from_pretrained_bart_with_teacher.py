"""Task ``translation_from_pretrained_bart_with_teacher``: fairseq's translation task for models initialised from mBART,
with a teacher of the same kind. Targets end with a language token."""

from __future__ import annotations

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.tasks import register_task
from fairseq.tasks.translation_from_pretrained_bart import TranslationFromPretrainedBARTTask

from hgkd_fairseq.data import language_tokens
from hgkd_fairseq.tasks.with_teacher import WithTeacher
from hgkd_fairseq.teacher.config import TeacherOptions


@register_task("translation_from_pretrained_bart_with_teacher")
class TranslationFromPretrainedBARTWithTeacherTask(WithTeacher, TranslationFromPretrainedBARTTask):
    @staticmethod
    def add_args(parser):
        TranslationFromPretrainedBARTTask.add_args(parser)
        gen_parser_from_dataclass(parser, TeacherOptions())

    def language_tokens(self) -> list[int]:
        return language_tokens.of_pretrained_bart(self)
