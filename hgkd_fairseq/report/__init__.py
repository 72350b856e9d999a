"""Finished runs side by side: their files, tables, figures and page."""

from hgkd_fairseq.evaluation import logs

__all__ = ["logs"]
