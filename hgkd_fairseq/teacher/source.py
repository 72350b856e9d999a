"""The interface of teacher sources, and the registry of the values of ``--teacher-source``."""

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
    """Everything that a teacher source may be constructed from."""

    options: Any  # the task's options, see config.TeacherConfig
    source_dictionary: Dictionary  # the student's
    target_dictionary: Dictionary  # the student's
    languages: tuple[str | None, str | None]  # source and target; None: unknown
    state: TrainingState  # of the task
    training_targets: Callable[[], Iterator[torch.Tensor]]  # yields the targets (length,) that the student trains on
    pairs: Sequence[str] = ()  # names of the language pairs of a multilingual task; its batches have a tensor "pair"


class TeacherSource:
    """Base class of teacher sources, which provide the teacher's output for each batch.

    A source is not a submodule of student or criterion, and is not saved with them. The exception is a source with
    parameters to train (:class:`loras.Loras`): it is an nn.Module that the criterion registers as a submodule, so that
    it is trained and saved with the student. Subclasses implement :meth:`make` and :meth:`signal`.

    Attributes:
        name: value of --teacher-source; set by :func:`register_source`.
        help: description for the help of --teacher-source; set by :func:`register_source`.
        learns: whether the source has parameters that are trained with the student.
        frozen: whether it is a fixed model whose complete distributions are available before the training, so that a
            temperature can be fitted to it.
        reindexed: whether it has other dictionaries than the student, with all of the student's symbols.
        needs_ema: whether fairseq's trainer must pass its moving average of the student to each step.
        remembers: name of what validation needs from a checkpoint: a key of the training state's memory, or "ema" for
            fairseq's moving average; None: nothing.
    """

    name: ClassVar[str]
    help: ClassVar[str]
    learns: ClassVar[bool] = False
    frozen: bool = False
    reindexed: bool = False
    needs_ema: ClassVar[bool] = False
    remembers: ClassVar[str | None] = None

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        """Construct the teacher of a run.

        Raises:
            UserError: the options or files do not define a usable teacher.
        """
        raise NotImplementedError

    @property
    def ready(self) -> bool:
        """Whether the teacher can be used yet; until then, the student learns from the data alone."""
        return True

    @property
    def models(self) -> list[torch.nn.Module]:
        """The fairseq models that the source runs, as far as they are known before the first batch."""
        return []

    @property
    def fingerprint(self) -> str | None:
        """String that identifies the teacher, compared when a run is resumed; None if it changes with the student."""
        return None

    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Signal:
        """Compute the teacher's output for a fairseq batch.

        The output is deterministic, except that a source with trained parameters may use dropout in training.

        Args:
            sample: batch with B targets of length T.
            device, dtype: device and dtype of the student's features.

        Returns:
            :class:`signals.Dense` with hidden states (B, T, D), or :class:`signals.Sparse` with tensors (B, T, K).
        """
        raise NotImplementedError

    def check_options(self, cfg: Any) -> None:
        """Refuse options of the criterion that the teacher does not support.

        Args:
            cfg: options of the criterion.

        Raises:
            UserError: an option is not supported; the message names it.
        """

    def check_folders(self, split: str, folders: int) -> None:
        """Check, before :meth:`attach`, that the teacher covers all data folders of a subset.

        Args:
            split: name of the subset.
            folders: number of the task's data folders that are used for the subset.

        Raises:
            UserError: the teacher has no data for one of the folders.
        """

    def attach(self, split: str, folder: int, dataset: FairseqDataset) -> None:
        """Modify a data set so that its batches contain what :meth:`signal` needs.

        Args:
            split: name of the subset.
            folder: index of the task's data folder that the data set is from.
            dataset: the data set, which is modified in place.

        Raises:
            UserError: the teacher has no data for this subset, or data of other sentences.
        """

    def check_data(self, split: str, dataset: FairseqDataset, limits: tuple[int, int]) -> None:
        """Refuse data with sentences that are too long for the teacher and not for the student.

        Args:
            split: name of the subset.
            dataset: the data set.
            limits: longest source and longest target that the student accepts, in tokens; fairseq skips or refuses
                longer ones.

        Raises:
            UserError: there is such a sentence.
        """

    def begin_epoch(self, epoch: int, model: torch.nn.Module, state: TrainingState) -> None:
        """Hook that is called before each training epoch, with the epoch's number (from 1) and the student."""

    def before_step(self, model: torch.nn.Module, ema_model: torch.nn.Module | None, state: TrainingState) -> None:
        """Hook that is called with the student before each training or validation step.

        `ema_model` is fairseq's moving average of the student if :attr:`needs_ema` is set and it is available.
        """


SOURCES: dict[str, type[TeacherSource]] = {}


def register_source(name: str, help: str) -> Callable[[type[TeacherSource]], type[TeacherSource]]:
    """Return a decorator that registers a :class:`TeacherSource` under a value of ``--teacher-source``.

    Args:
        name: value of the option.
        help: description for the help of the option.

    Raises:
        ValueError: the name is already registered (raised when the decorator is applied).
    """

    def register(made: type[TeacherSource]) -> type[TeacherSource]:
        if name in SOURCES:
            raise ValueError(f'a teacher source named "{name}" is registered already; choose another name')
        made.name, made.help = name, help
        SOURCES[name] = made
        return made

    return register


def given(options: Any) -> str | None:
    """Return the option that names a teacher or a gauge; None if there is none."""
    for name in ("teacher_path", "teacher_store", "gauge_store"):
        if getattr(options, name, None):
            return flag(name)
    source = str(options.teacher_source)
    return None if source == "checkpoint" else f"--teacher-source {source}"


def make(request: Request) -> TeacherSource:
    """Construct the teacher that the options specify, combined with a gauge if --gauge-store is given.

    Raises:
        UserError: the options specify no teacher, several teachers or one that cannot be used.
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
        from hgkd_fairseq.teacher.gauged import Gauged  # here, because that module imports this one

        return Gauged(made, request)
    return made
