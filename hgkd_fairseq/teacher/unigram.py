"""A teacher that knows how frequent each target token is, and nothing of the sentence: label smoothing with a unigram
prior is the loss `always` with it."""

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

SENTENCES = 10_000  # counted together


def log_frequencies(sentences: Iterable[Tensor], vocabulary: int) -> Tensor:
    """(vocabulary,) log-probabilities of the types in sentences (length,) of token ids below `vocabulary`, with EOS;
    a type that never occurs counts once, so that no probability is 0."""
    counts = torch.zeros(vocabulary, dtype=torch.int64)
    left = iter(sentences)
    while some := list(islice(left, SENTENCES)):
        counts += torch.bincount(torch.cat(some), minlength=vocabulary)
    counts = counts.clamp(min=1).double()
    return (counts / counts.sum()).log().float()


@register_source("unigram", help="the frequencies of the training targets")
class UnigramTeacher(TeacherSource):
    """Log-probabilities (V,) of the types, as `log_frequencies` counts them."""

    def __init__(self, logprobs: Tensor):
        self.logprobs = logprobs
        self.hash = hashlib.sha256(logprobs.cpu().numpy().tobytes()).hexdigest()

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        counted: Any = request.state.memory.get("unigram")  # as in the training, also where its data are not at hand
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
        # An output layer of width 1 and weight 0: its bias alone is the logits.
        hidden = self.logprobs.new_zeros(*sample["target"].shape, 1)
        return Dense([Head(hidden, self.logprobs.new_zeros(self.logprobs.numel(), 1), self.logprobs)])
