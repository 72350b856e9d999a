"""Task ``translation_with_teacher``: fairseq's translation task, with all its options and a teacher."""

# No `from __future__ import annotations` here: fairseq reads the types of the options at run time.
from dataclasses import dataclass

from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq.tasks.with_teacher import WithTeacher
from hgkd_fairseq.teacher.config import TeacherConfig


@dataclass
class TranslationWithTeacherConfig(TeacherConfig, TranslationConfig):
    pass


@register_task("translation_with_teacher", dataclass=TranslationWithTeacherConfig)
class TranslationWithTeacherTask(WithTeacher, TranslationTask):
    cfg: TranslationWithTeacherConfig
