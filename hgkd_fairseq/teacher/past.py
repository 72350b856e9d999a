"""The student's own past as teacher: the model of the previous epoch, or the moving average of its parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hgkd_fairseq import features
from hgkd_fairseq.loss import Head


class PastTeacher:
    """A frozen copy of the student that the task replaces as training goes on. Ready once there is one."""

    def __init__(self):
        self.model: nn.Module | None = None

    @property
    def ready(self) -> bool:
        return self.model is not None

    def take(self, model: nn.Module, state: dict | None = None) -> None:
        """Copy `model` as it is now, or with the parameters of `state`."""
        self.model = copy.deepcopy(features.unwrap(model))
        if state is not None:
            self.model.load_state_dict(state)
        self.model.requires_grad_(False)

    def watch(self, model: nn.Module) -> None:
        """Use a model that is kept elsewhere (fairseq's moving average)."""
        self.model = model

    @torch.no_grad()
    def heads(self, sample: dict, device: torch.device, dtype: torch.dtype) -> list[Head]:
        assert self.model is not None
        return [features.head(self.model.eval(), sample["net_input"])]
