"""The protocol of teachers, and their registry: the values of ``--teacher-source``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from fairseq.data import Dictionary, FairseqDataset

from hgkd_fairseq.errors import UserError, flag
from hgkd_fairseq.plugin.training_state import TrainingState
from hgkd_fairseq.teacher.signals import Signal


@dataclass(frozen=True)
class Request:
    """What a teacher is made from."""

    options: Any  # of the task: teacher_path, ..., see tasks/with_teacher.py
    source_dictionary: Dictionary  # the student's
    target_dictionary: Dictionary
    languages: tuple[str | None, str | None]  # source and target
    state: TrainingState
    training_targets: Callable[[], Iterator[torch.Tensor]]  # (length,) each, all that the student trains on
    pairs: Sequence[str] = ()  # names of a task of several language pairs, whose batches say of which each sentence is


class TeacherSource:
    """Where the teacher's view of a batch comes from.

    It stands outside every nn.Module and is not saved with the student; one that learns is an nn.Module, which the
    criterion takes as a child: trained and saved with the student.
    """

    name: ClassVar[str]  # the value of --teacher-source
    help: ClassVar[str]
    learns: ClassVar[bool] = False
    frozen: bool = False  # a model that stays as it is, so that a temperature can be fitted to it beforehand
    reindexed: bool = False  # its dictionaries are not the student's, whose symbols it has and knows by other numbers
    needs_ema: ClassVar[bool] = False  # whether fairseq's trainer shall hand its moving average to each step
    remembers: ClassVar[str | None] = None  # where validation finds what the training left of it, see TrainingState

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        """The teacher of a run.

        Raises:
            UserError: options or files that make none.
        """
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """False while there is nothing to learn from yet: the student then learns from the data."""
        return True

    @property
    def models(self) -> list[torch.nn.Module]:
        """fairseq models whose features it gives, before the first batch."""
        return []

    @property
    def fingerprint(self) -> str | None:
        """What tells this teacher from another; None for one that changes with the student."""
        return None

    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Signal:
        """Its view of a fairseq batch.

        Args:
            device, dtype: those of the student's features.

        The same batch has the same signal, but for a source that learns, which may drop out at random in training.
        """
        raise NotImplementedError

    def check_options(self, cfg: Any) -> None:
        """Refuse options of the criterion that it cannot serve.

        Raises:
            UserError: it names the option.
        """

    def check_folders(self, split: str, folders: int) -> None:
        """Called before the data of a split are attached.

        Args:
            split: the data's name.
            folders: how many of the task's data folders have it.

        Raises:
            UserError: it has nothing of one of them.
        """

    def attach(self, split: str, folder: int, dataset: FairseqDataset) -> None:
        """Have the batches of a data set bring what :meth:`signal` needs.

        Args:
            split: the data's name.
            folder: which of the task's data folders they are of, from 0 on.

        Raises:
            UserError: it has nothing of these data.
        """

    def check_data(self, split: str, dataset: FairseqDataset, limits: tuple[int, int]) -> None:
        """Refuse data that it cannot read.

        Args:
            split: the data's name.
            limits: tokens of the longest source and the longest target that the student takes; fairseq leaves out, or
                refuses, what is longer.

        Raises:
            UserError: a sentence that it has no positions for, though the student has.
        """

    def begin_epoch(self, epoch: int, model: torch.nn.Module, state: TrainingState) -> None:
        """Called with the student before each epoch of training."""

    def before_step(self, model: torch.nn.Module, ema_model: torch.nn.Module | None, state: TrainingState) -> None:
        """Called with the student before each step of training or validation; `ema_model`: fairseq's moving average,
        of a source that needs it."""


SOURCES: dict[str, type[TeacherSource]] = {}


def register_source(name: str, help: str) -> Callable[[type[TeacherSource]], type[TeacherSource]]:
    """Decorator: register a class under the value that ``--teacher-source`` takes.

    Raises:
        ValueError: the name is taken.
    """

    def register(made: type[TeacherSource]) -> type[TeacherSource]:
        if name in SOURCES:
            raise ValueError(f'a teacher source named "{name}" is registered already; choose another name')
        made.name, made.help = name, help
        SOURCES[name] = made
        return made

    return register


def make(request: Request) -> TeacherSource:
    """The teacher that the options ask for.

    Raises:
        UserError: there is none, or it cannot be used.
    """
    name = str(request.options.teacher_source)
    given = {flag(option): getattr(request.options, option, None) for option in ("teacher_path", "teacher_store")}
    named = [option for option, value in given.items() if value]
    if name not in ("checkpoint", "store"):
        named.append(f"--teacher-source {name}")
    if len(named) > 1:
        raise UserError(
            f"{' and '.join(named)} are two teachers; give one of them (fairseq-validate takes the other one from the "
            "checkpoint: drop it with '')"
        )
    if given["--teacher-store"]:
        name = "store"
    for option, default in (("teacher_model_overrides", "{}"), ("teacher_dtype", "auto")):
        if name not in ("checkpoint", "store") and str(getattr(request.options, option, default)) != default:
            raise UserError(
                f"{flag(option)} is for a teacher of --teacher-path or --teacher-store, and --teacher-source {name} "
                "has none; drop it"
            )
    made = SOURCES[name].make(request)
    if getattr(request.options, "gauge_store", None):
        from hgkd_fairseq.teacher.gauged import Gauged  # which is a source itself

        return Gauged(made, request)
    return made
