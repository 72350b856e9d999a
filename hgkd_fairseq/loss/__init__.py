"""HOW to distil: the loss, from hidden states and output layers to a sum and its gradients. Independent of fairseq."""

from hgkd_fairseq.loss.api import IMPLEMENTATIONS, DistillationOutput, gated_distillation, unusable
from hgkd_fairseq.loss.equations import DIVERGENCES, register_divergence
from hgkd_fairseq.loss.native import rows as cpu_rows
from hgkd_fairseq.loss.options import Head, Options, Sparse

__all__ = [
    "DIVERGENCES", "IMPLEMENTATIONS", "DistillationOutput", "Head", "Options", "Sparse", "cpu_rows",
    "gated_distillation", "register_divergence", "unusable",
]  # fmt: skip
