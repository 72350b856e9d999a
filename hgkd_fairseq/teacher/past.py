"""Teachers that are copies of the student: at the end of the previous epoch, or with averaged parameters."""

from __future__ import annotations

import copy

import torch
from torch import nn

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import features
from hgkd_fairseq.plugin.training_state import TrainingState
from hgkd_fairseq.teacher.signals import Dense
from hgkd_fairseq.teacher.source import Request, TeacherSource, register_source


class PastTeacher(TeacherSource):
    """Base class of teachers whose model is replaced during the training; not ready until there is a model."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None

    @property
    def ready(self) -> bool:
        return self.model is not None

    def take(self, model: nn.Module, state: dict | None = None) -> None:
        """Use a frozen copy of `model` as teacher, with its current parameters or those of `state`."""
        self.model = copy.deepcopy(features.unwrap(model))
        if state is not None:
            self.model.load_state_dict(state)
        self.model.requires_grad_(False)

    @torch.no_grad()
    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Dense:
        assert self.model is not None
        return Dense([features.head(self.model.eval(), sample["net_input"])])


@register_source("previous-epoch", help="the student as it was when the epoch began")
class PreviousEpoch(PastTeacher):
    """Teacher of PS-KD (Kim et al., ICCV 2021, arXiv:2006.12000): the student at the beginning of the current epoch.

    There is no teacher in the first epoch. The copy is saved in the checkpoints, so that a run that is resumed in the
    middle of an epoch continues with the same teacher.
    """

    remembers = "previous_epoch"

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        return cls()

    def begin_epoch(self, epoch: int, model: nn.Module, state: TrainingState) -> None:
        if epoch < 2:
            return
        kept = state.memory.get(self.remembers)
        self.take(model, kept["model"] if kept is not None and kept["epoch"] == epoch else None)
        assert self.model is not None
        state.memory[self.remembers] = {"epoch": epoch, "model": self.model.state_dict()}

    def before_step(self, model: nn.Module, ema_model: nn.Module | None, state: TrainingState) -> None:
        kept = state.memory.get(self.remembers)
        if state.loaded is not None and not self.ready and kept is not None:
            self.take(model, kept["model"])


@register_source("ema", help="the moving average of its parameters (with fairseq's --store-ema --ema-decay)")
class MovingAverage(PastTeacher):
    """Teacher with the exponential moving average of the student's parameters, which fairseq maintains and saves."""

    needs_ema = True
    remembers = "ema"

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        if not request.options.store_ema:
            raise UserError("--teacher-source ema needs fairseq's moving average: add --store-ema --ema-decay 0.999")
        return cls()

    def before_step(self, model: nn.Module, ema_model: nn.Module | None, state: TrainingState) -> None:
        if ema_model is not None:
            self.model = ema_model
        elif state.loaded is not None and not self.ready and state.loaded.ema is not None:
            self.take(model, state.loaded.ema)
