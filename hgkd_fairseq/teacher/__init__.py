"""What is distilled: where the teacher's view of a batch comes from."""

from __future__ import annotations

from typing import Protocol

import torch

from hgkd_fairseq.loss import Head


class TeacherSource(Protocol):
    """One source of teacher signal, held by the task.

    A frozen one stands outside every nn.Module, is never saved with the student and never trained. One that learns
    (`loras`) is an nn.Module that the criterion takes as a child: trained and saved with the student. One that is the
    student's past (`past`) also takes copies of it, when the task says so.
    """

    ready: bool  # False while there is nothing to learn from yet: the student then learns from the data

    def heads(self, sample: dict, device: torch.device, dtype: torch.dtype) -> list[Head]:
        """The teacher's features (B, T, D) and output layer for a fairseq batch; several for an ensemble.

        `device` and `dtype` are those of the student's features. No gradient passes through them; the same batch gives
        the same features, but for a source that learns, which may drop out at random in training.
        """
        ...
