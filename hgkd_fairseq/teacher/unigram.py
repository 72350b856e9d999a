"""A teacher that knows how frequent each target token is, and nothing of the sentence: label smoothing with a unigram
prior is the loss `always` with it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hgkd_fairseq.loss import Head


class UnigramTeacher:
    """log-probabilities of the types in the training targets, EOS included.

    Args:
        sentences: the targets, each (length,) of token ids below `vocabulary`.
        vocabulary: number of types. One that never occurs counts once, so that no probability is 0.
    """

    ready = True

    def __init__(self, sentences: Iterable[Tensor], vocabulary: int):
        counts = torch.zeros(vocabulary, dtype=torch.int64)
        for sentence in sentences:
            counts += torch.bincount(sentence, minlength=vocabulary)
        counts = counts.clamp(min=1).double()
        self.logprobs = (counts / counts.sum()).log().float()  # (V,)

    def heads(self, sample: dict, device: torch.device, dtype: torch.dtype) -> list[Head]:
        self.logprobs = self.logprobs.to(device)
        # An output layer of width 1 and weight 0: its bias alone is the logits.
        hidden = self.logprobs.new_zeros(*sample["target"].shape, 1)
        return [Head(hidden, self.logprobs.new_zeros(self.logprobs.numel(), 1), self.logprobs)]
