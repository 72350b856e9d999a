"""Streaming calibration scores of a model's predictions. The package can be imported without fairseq."""

from hgkd_fairseq.calibration.bootstrap import SentenceBootstrap
from hgkd_fairseq.calibration.fine import FineHistogram, adaptive_ece
from hgkd_fairseq.calibration.histogram import CalibrationHistogram

__all__ = ["CalibrationHistogram", "FineHistogram", "SentenceBootstrap", "adaptive_ece"]
