"""HOW to distil: from hidden states and output layers to a summed loss and its gradients; without fairseq."""

from hgkd_fairseq.loss.api import IMPLEMENTATIONS, DistillationOutput, gated_distillation, unusable
from hgkd_fairseq.loss.options import Head, Options

__all__ = ["IMPLEMENTATIONS", "DistillationOutput", "Head", "Options", "gated_distillation", "unusable"]
