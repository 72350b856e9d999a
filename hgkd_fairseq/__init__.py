"""Hard-gate knowledge distillation for fairseq: the folder that ``--user-dir`` names.

Importing it applies the compatibility patches, then registers the task and the criterion. Without fairseq installed,
:mod:`hgkd_fairseq.loss`, :mod:`hgkd_fairseq.gates` and :mod:`hgkd_fairseq.calibration` can still be imported.
"""

from importlib.util import find_spec

__version__ = "0.1.0"

if find_spec("fairseq") is not None:
    from hgkd_fairseq import compat

    compat.apply()

    import hgkd_fairseq.criterions.hard_gate_kd
    import hgkd_fairseq.tasks.translation_with_teacher  # noqa: F401
