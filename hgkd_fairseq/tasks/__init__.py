"""fairseq's tasks with a teacher. fairseq imports this package where --user-dir names the plugin: before anything of it
is used, fairseq is patched and the criterion registered."""

from hgkd_fairseq.plugin import compat

compat.apply()

from hgkd_fairseq.criterions import hard_gate_kd  # noqa: E402, F401
from hgkd_fairseq.tasks import (  # noqa: E402, F401
    translation_from_pretrained_bart_with_teacher,
    translation_multi_simple_epoch_with_teacher,
    translation_with_teacher,
)
