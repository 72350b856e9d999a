"""Hard-gate knowledge distillation for fairseq: the folder that ``--user-dir`` names.

fairseq imports what is in :mod:`hgkd_fairseq.tasks` where it takes this folder for its ``--user-dir``: that registers
the task and the criterion and applies the compatibility patches. In a program, `hgkd_fairseq.plugin.register()` does
the same. Importing :mod:`hgkd_fairseq.loss`, :mod:`hgkd_fairseq.gates` or :mod:`hgkd_fairseq.calibration` changes
nothing, with or without fairseq installed.
"""

__version__ = "0.1.0"
