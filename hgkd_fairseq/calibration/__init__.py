"""How well a model knows what it knows: streaming calibration scores. Importing it needs no fairseq."""

from hgkd_fairseq.calibration.bootstrap import SentenceBootstrap
from hgkd_fairseq.calibration.fine import FineHistogram, adaptive_ece
from hgkd_fairseq.calibration.histogram import CalibrationHistogram

__all__ = ["CalibrationHistogram", "FineHistogram", "SentenceBootstrap", "adaptive_ece"]
