"""Comparison of finished runs: reading their files, tables, figures and the HTML page."""

from hgkd_fairseq.evaluation import logs

__all__ = ["logs"]
