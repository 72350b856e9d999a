"""Comparison of finished runs: reading their files, tables, figures and the HTML page.

`logs`, which reads the logs of trainings, is in evaluation because `hgkd score` uses it too.
"""

from hgkd_fairseq.evaluation import logs

__all__ = ["logs"]
