"""Low-rank adaptive label smoothing (Loras): a teacher distribution for each gold token, trained with the student."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hgkd_fairseq.loss import Head, chunked, rows
from hgkd_fairseq.teacher.signals import Dense
from hgkd_fairseq.teacher.source import Request, TeacherSource, register_source

RANK, DROPOUT, ENTROPY = 20, 0.4, 0.1  # the published values


@register_source("loras", help="a distribution of low rank for each gold token, learned beside the student")
class Loras(nn.Module, TeacherSource):
    """Low-rank adaptive label smoothing (Ghoshal et al., ICLR 2021): smoothing with a distribution V_y that depends on
    the gold token y.

        V_y = softmax(L_y L^T)       L (V, 20), learned, with dropout

    L minimises the sum over the tokens of E_{V_y}[-log p] - eta H(V_y), eta = 0.1. The student learns from
    (1 - a) onehot(y) + a V_y, with the gate "always" and --kd-weight a. The equations follow the code of the authors'
    laboratory (pytext.loss.AdaptiveRegularizer, which cites them as equations 3 and 4). As in that code, L is
    initialised with ones, and dropout makes its entries differ. The KL that the loss reports is
    E_{V_y}[-log p] - H(V_y).

    Args:
        vocabulary: V, the number of target symbols.
    """

    learns = True

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        return cls(len(request.target_dictionary))

    def __init__(self, vocabulary: int):
        super().__init__()
        self.embedding = nn.Parameter(torch.ones(vocabulary, RANK))
        self.dropped: Tensor | None = None  # the embedding after this step's dropout

    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Dense:
        training = self.training and torch.is_grad_enabled()
        self.dropped = F.dropout(self.embedding.clone(), DROPOUT, training=training)  # never the parameter itself
        fixed = self.dropped.detach()
        return Dense([Head(F.embedding(sample["target"], fixed), fixed)])

    def objective(self, student: Head, target: Tensor) -> Tensor:
        """Return a scalar of value 0 whose gradient with respect to L is that of the objective of L.

        :meth:`signal` must have been called for the same batch, because its dropout is reused.

        Args:
            student: features (N, D) of the N target tokens without padding, and the output layer; no gradient flows
                into them.
            target: (N,) int64, gold tokens.
        """
        assert self.dropped is not None
        student = student.map(torch.Tensor.detach)
        embedding = rows.widen(self.dropped.detach()).requires_grad_()
        gradient = torch.zeros_like(embedding)
        size = chunked.chunk_tokens(target.device, student.hidden.dtype, student.vocabulary)
        for start, end in chunked.chunk_bounds(target.numel(), None, size):
            logp = F.log_softmax(rows.widen(chunked.project(student.hidden[start:end], student)), dim=1)  # (C, V)
            with torch.enable_grad():
                logv = F.log_softmax(embedding[target[start:end]] @ embedding.t(), dim=1)
                total = (logv.exp() * (ENTROPY * logv - logp)).sum()
                gradient += torch.autograd.grad(total, embedding)[0]
        value = (rows.widen(self.dropped) * gradient).sum()
        return value - value.detach()
