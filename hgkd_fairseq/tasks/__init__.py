"""fairseq's translation tasks with a teacher. Importing this package patches fairseq and registers the tasks and the
criterion; fairseq imports it if --user-dir names the plugin."""

from hgkd_fairseq.plugin import compat

compat.apply()

from hgkd_fairseq.criterions import hard_gate_kd  # noqa: E402, F401
from hgkd_fairseq.tasks import (  # noqa: E402, F401
    translation_from_pretrained_bart_with_teacher,
    translation_multi_simple_epoch_with_teacher,
    translation_with_teacher,
)
