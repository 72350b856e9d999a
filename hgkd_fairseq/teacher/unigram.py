"""A teacher that predicts the unigram frequencies of the target tokens, whatever the sentence is.

With the gate "always", this is label smoothing with a unigram prior.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head
from hgkd_fairseq.plugin.binarised import NoSubset
from hgkd_fairseq.teacher.signals import Dense
from hgkd_fairseq.teacher.source import Request, TeacherSource, register_source

SENTENCES = 10_000  # sentences that are concatenated for one call of bincount


def log_frequencies(sentences: Iterable[Tensor], vocabulary: int) -> Tensor:
    """Return the log-probabilities (vocabulary,) of the symbols, in nats, from their frequencies in some sentences.

    A symbol that does not occur is counted once, so that no probability is 0.

    Args:
        sentences: token ids (length,) of each sentence, with EOS.
        vocabulary: number of symbols.
    """
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    left = iter(sentences)
    while some := list(islice(left, SENTENCES)):
        counts += torch.bincount(torch.cat(some), minlength=vocabulary)
    counts = counts.clamp(min=1).double()
    return (counts / counts.sum()).log().float()


@register_source("unigram", help="the frequencies of the training targets")
class UnigramTeacher(TeacherSource):
    """Teacher with the same distribution for every token.

    Args:
        logprobs: (V,) log-probabilities of the symbols, from :func:`log_frequencies`.
    """

    def __init__(self, logprobs: Tensor):
        self.logprobs = logprobs
        self.hash = hashlib.sha256(logprobs.cpu().numpy().tobytes()).hexdigest()

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        counted: Any = request.state.memory.get("unigram")  # from a checkpoint: validation may lack the data
        if counted is None:
            try:
                counted = log_frequencies(request.training_targets(), len(request.target_dictionary))
            except NoSubset as error:
                raise UserError(f"--teacher-source unigram counts the training data: {error}") from None
            request.state.memory["unigram"] = counted
        return cls(counted)

    @property
    def fingerprint(self) -> str:
        return self.hash

    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Dense:
        self.logprobs = self.logprobs.to(device)
        # The output layer has width 1 and weight 0, so that the logits are its bias.
        hidden = self.logprobs.new_zeros(*sample["target"].shape, 1)
        return Dense([Head(hidden, self.logprobs.new_zeros(self.logprobs.numel(), 1), self.logprobs)])
