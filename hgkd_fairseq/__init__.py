"""Hard-gate knowledge distillation for fairseq. This folder is the value of fairseq's option ``--user-dir``.

With ``--user-dir``, fairseq imports :mod:`hgkd_fairseq.tasks`, which applies the compatibility patches and registers
the tasks and the criterion. In a program, `hgkd_fairseq.plugin.register()` does the same. Importing
:mod:`hgkd_fairseq.loss`, :mod:`hgkd_fairseq.gates` or :mod:`hgkd_fairseq.calibration` has no side effects and does not
require fairseq.
"""

__version__ = "0.1.0"
