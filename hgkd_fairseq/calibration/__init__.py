"""How well a model knows what it knows: streaming calibration scores. No fairseq in here."""

from hgkd_fairseq.calibration.histogram import CalibrationHistogram

__all__ = ["CalibrationHistogram"]
