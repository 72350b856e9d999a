"""What is distilled: where the teacher's view of a batch comes from."""

from __future__ import annotations

from typing import Protocol

import torch

from hgkd_fairseq.loss import Head


class TeacherSource(Protocol):
    """One source of teacher signal. Held by the task, outside every nn.Module: never saved with the model, never
    trained."""

    ready: bool  # False while there is nothing to learn from yet: the student then learns from the data

    def heads(self, sample: dict, device: torch.device, dtype: torch.dtype) -> list[Head]:
        """The teacher's features (B, T, D) and output layer for a fairseq batch; several for an ensemble.

        `device` and `dtype` are those of the student's features. No gradient, no randomness.
        """
        ...
