"""The state of a training run that criterion, gates and teacher share, and the part of it that checkpoints keep.

When fairseq-train resumes, it restores the criterion's parameters and the task's memory without checking which run
they belong to; fairseq-validate restores neither. `prepare` checks a checkpoint before fairseq-train loads it, and
`keep` and `restore` restore both in fairseq-validate.
"""

from __future__ import annotations

import contextlib
import logging
import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq import utils
from fairseq.tasks import FairseqTask

from hgkd_fairseq import files, gates
from hgkd_fairseq.data.held_out import HeldOut
from hgkd_fairseq.errors import UserError, flag

logger = logging.getLogger(__name__)

CRITERION = "hard_gate_kd"
TASK = "TranslationWithTeacherTask"  # key of the memory in checkpoints whose memory has no "method"
# The gate parameter that selects held-out sentences. It is not compared here: sentence_weights/refresh.py compares
# the sentences themselves once the data are loaded.
SENTENCES = "held_out"
DIVERGENCE = ("divergence", "jsd_beta", "skew_alpha")
ON_POLICY = tuple(f"on_policy_{name}" for name in ("share", "every", "beam", "sampling", "speculative"))
# Options that may change when a run is resumed, as the learning rate may; a warning lists the changes.
FREE = (
    *("gate_on", "teacher_temperature", "teacher_temperature_start", "teacher_temperature_share"),
    *("gate_dropout", "untempered_gate", "label_smoothing"),
    *("confidence_penalty", "distill_start_update", "refresh_interval", "refresh_change"),
    *DIVERGENCE,
    *ON_POLICY,
)
# Those of FREE that checkpoints of version 0.1.0 lack.
NEW = (*DIVERGENCE, *ON_POLICY, "gate_dropout", "teacher_temperature_share")
STORED = ("checkpoint", "store")  # teacher sources that may provide the same teacher
KEPT = ("method", "updates", "teacher", "fitted_temperature")  # saved entries that are not part of the memory


@dataclass(frozen=True)
class Loaded:
    """Data of the checkpoint from which a task was created, other than for training, as in fairseq-validate."""

    path: str
    criterion: dict | None  # the criterion's parameters
    memory: dict[str, Any]
    ema: dict | None  # fairseq's moving average of the model's parameters


@dataclass
class TrainingState:
    """The state of the training run of one task, which :func:`of` returns."""

    # Updates made before the latest training step, in this run or the checkpoint's; None before the first step.
    updates: int | None = None
    idle: bool = False  # whether the batch is a dummy that keeps the workers synchronised and is otherwise ignored
    # What a gate, a teacher or on-policy distillation remembers, by name: tensors in dicts, kept in checkpoints.
    memory: dict[str, dict] = field(default_factory=dict)
    keeps_memory: bool = False  # whether the task saves `memory` in checkpoints
    method: dict[str, Any] = field(default_factory=dict)  # as :func:`method` returns it; kept in checkpoints
    loaded: Loaded | None = None  # None in training
    held_out: HeldOut = field(default_factory=HeldOut)
    teacher_fingerprint: str | None = None
    fitted_temperature: float | None = None  # fitted for --teacher-temperature auto
    # Callbacks (epoch, model): once data and checkpoint are loaded, and before each epoch of training.
    at_training_begin: list[Callable[[int, torch.nn.Module], None]] = field(default_factory=list)
    at_epoch_begin: list[Callable[[int, torch.nn.Module], None]] = field(default_factory=list)
    # Callbacks (subset, meters): after a subset has been validated during training.
    at_validated: list[Callable[[str, Any], None]] = field(default_factory=list)

    def progress(self, max_update: int) -> float:
        """Return the fraction of `max_update` updates made so far, in [0, 1]; 0 if either number is unknown."""
        return min(self.updates / max_update, 1.0) if self.updates and max_update else 0.0

    def checkpoint(self) -> dict[str, Any]:
        """Return the dict that the task saves: the memory, on the CPU, and the entries named in `KEPT`."""
        kept: dict[str, Any] = {"method": self.method, "updates": self.updates, "teacher": self.teacher_fingerprint}
        return {**utils.move_to_cpu(self.memory), **kept, "fitted_temperature": self.fitted_temperature}

    def restart_epochs(self) -> None:
        """Forget the epochs of what is remembered, for a run that counts its epochs from 1 again."""
        for kept in self.memory.values():
            if isinstance(kept, dict) and "epoch" in kept:  # that of the unigram teacher is a tensor
                kept["epoch"] = torch.zeros_like(kept["epoch"]) if isinstance(kept["epoch"], torch.Tensor) else 0

    def resume(self, kept: dict[str, Any]) -> None:
        """Restore memory, updates and fitted temperature from a saved dict; invalid numbers become None."""
        self.memory |= {name: what for name, what in kept.items() if name not in KEPT}
        updates, fitted = kept.get("updates"), kept.get("fitted_temperature")
        self.updates = updates if type(updates) is int and 0 <= updates <= files.LARGEST else None
        self.fitted_temperature = fitted if type(fitted) is float and 0 < fitted < math.inf else None


_states: weakref.WeakKeyDictionary[FairseqTask, TrainingState] = weakref.WeakKeyDictionary()


def of(task: FairseqTask) -> TrainingState:
    """Return the state of a task of any class; it is created on the first call."""
    return _states.setdefault(task, TrainingState())


def method(criterion_cfg: Any, teacher_source: str) -> dict[str, Any]:
    """Return the settings that determine what a run learns and remembers, and that must not change on resuming.

    They are the gate, its parameters other than `SENTENCES` and those in `FREE`, and the teacher's source unless the
    gate is known to need no teacher.

    Args:
        criterion_cfg: options of the criterion.
        teacher_source: value of --teacher-source.
    """
    name = str(criterion_cfg.gate)
    found: dict[str, Any] = {"gate": name}
    for parameter, default in defaults(name).items():
        given = getattr(criterion_cfg, parameter, None)
        found[parameter] = default if given is None else given
    if name not in gates.GATES or gates.GATES[name].needs_teacher:
        found["teacher_source"] = teacher_source
    return found


def defaults(gate: str) -> dict[str, Any]:
    """Return the defaults of a gate's parameters other than `SENTENCES` and those in `FREE`; {} of an unknown gate."""
    parameters = gates.GATES[gate].parameters.values() if gate in gates.GATES else ()
    return {one.name: one.default for one in parameters if one.name != SENTENCES and one.name not in FREE}


def memory_in(extra_state: dict) -> dict[str, Any]:
    """Return the memory that a task with a teacher saved in a checkpoint's extra state; {} if there is none."""
    found = [kept for kept in extra_state.values() if isinstance(kept, dict) and isinstance(kept.get("method"), dict)]
    older = extra_state.get(TASK)
    return found[0] if found else older if isinstance(older, dict) else {}


def method_of(state: dict) -> dict[str, Any] | None:
    """Return the :func:`method` of a checkpoint's run; None if the run used another criterion.

    A parameter that the gate did not have yet when the run began has its default.
    """
    cfg = state.get("cfg")
    criterion, task = (getattr(cfg, part, None) for part in ("criterion", "task"))
    if getattr(criterion, "_name", None) != CRITERION:
        return None
    kept = memory_in(state.get("extra_state") or {}).get("method")
    if kept:
        return {**defaults(str(kept.get("gate"))), **kept}
    return method(criterion, str(getattr(task, "teacher_source", "checkpoint")))


def changes(asked_cfg: Any, held_cfg: Any) -> str:
    """Describe the options in `FREE` that differ between this run and a checkpoint's run; "" if none differs.

    Options in `NEW` are skipped if the checkpoint does not have them.
    """
    names = [name for name in FREE if name not in NEW or name in held_cfg]
    found: list[dict[str, Any]] = [{name: getattr(cfg, name, None) for name in names} for cfg in (asked_cfg, held_cfg)]
    for values in found:  # checkpoints of version 0.1.0 store the temperature as a number
        with contextlib.suppress(ValueError, TypeError):
            values["teacher_temperature"] = float(values["teacher_temperature"])
    return differences(*found)


def differences(asked: dict[str, Any], held: dict[str, Any]) -> str:
    """Describe how the requested settings differ from those of a checkpoint; "" if they are the same.

    The teacher sources in `STORED` are not distinguished: :func:`changed` detects another teacher.
    """
    names = [name for name in {**asked, **held} if asked.get(name) != held.get(name)]
    if (asked.get("teacher_source"), held.get("teacher_source")) in (STORED, STORED[::-1]):
        names.remove("teacher_source")
    if "gate" in names:
        names = [name for name in names if name in ("gate", "teacher_source")]  # the parameters differ with the gate

    def words(values: dict[str, Any]) -> str:
        given = [f"{flag(name)} {values[name]}" for name in names if values.get(name) is not None]
        return " ".join(given) or "the default"

    return f"{words(asked)} is asked for, and {words(held)} made it" if names else ""


def same_shapes(mine: dict, theirs: dict | None) -> bool:
    return theirs is not None and {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


def prepare(state: dict, path: str, task, criterion, new_run: bool, ema: bool = False) -> None:
    """Compare a checkpoint with the run that is about to load it.

    In a new run, `state` is adapted: the memory is removed, the training time is 0, the moving average begins with the
    model's weights, and the criterion's initial parameters replace those of the checkpoint. The moving average also
    begins with the weights if a run is resumed from a checkpoint without one, with which fairseq fails.

    Args:
        state: content of the checkpoint.
        path: its file, for messages.
        task: task of the run.
        criterion: criterion of the run.
        new_run: whether the run takes only the model (--finetune-from-model, --reset-optimizer).
        ema: whether the run keeps a moving average of the model (--store-ema).

    Raises:
        UserError: if the run is not new and the checkpoint is of another method or teacher, or its parameters of the
            criterion are missing or of other shapes.
    """
    extra = state.setdefault("extra_state", {})
    if new_run:
        for name in ("ema", "ema_fp32_params"):
            extra.pop(name, None)
        extra["previous_training_time"] = 0.0
    if ema:
        extra.setdefault("ema", dict(state["model"]))
    ours = getattr(criterion, "method", None)
    if ours is None and not utils.has_parameters(criterion):
        return
    remedy = (
        "resume it as it was, or take its model alone: with --finetune-from-model in another --save-dir, or with "
        "--reset-optimizer"
    )
    held = method_of(state)
    memory = memory_in(extra)
    problem = ""
    if ours is not None:
        of_criterion = (state.get("optimizer_history") or [{}])[-1].get("criterion_name", "another criterion")
        problem = f"{of_criterion} made it" if held is None else differences(ours, held)
        if not problem and changed(memory.get("teacher"), of(task)):
            problem = "another teacher taught its student, or its training data were others"
    if problem and not new_run:
        raise UserError(f"{path} is of another run: {problem}; {remedy}")
    if ours is not None and held is not None and not new_run:
        others = changes(criterion.cfg, state["cfg"].criterion)
        if others:
            logger.warning("%s is resumed with other options: %s", path, others)
    learned = criterion.state_dict()
    if learned and not new_run and not same_shapes(learned, state.get("criterion")):
        raise UserError(f"{path} has no parameters of the criterion, or others; {remedy}")
    if new_run:
        if learned:
            logger.info("the parameters of the criterion are initialised: only the model of %s is used", path)
            state["criterion"] = utils.move_to_cpu(learned)
        state["extra_state"] = {name: kept for name, kept in extra.items() if kept is not memory}


def changed(kept: str | None, state: TrainingState) -> bool:
    """Return whether a checkpoint's run had another teacher than this run; False if either teacher is unknown.

    Args:
        kept: fingerprint of the checkpoint's teacher.
        state: state of this run.
    """
    return None not in (kept, state.teacher_fingerprint) and kept != state.teacher_fingerprint


def keep(task: FairseqTask, path: str, state: dict) -> None:
    """Store in a task's state the parts of its checkpoint that its criterion and teacher will need."""
    extra, ours = state.get("extra_state") or {}, of(task)
    ours.loaded = Loaded(path, state.get("criterion"), memory_in(extra), extra.get("ema"))
    if ours.loaded.memory:
        ours.resume(ours.loaded.memory)
        # Older checkpoints do not hold the number. In training, validation sees one less than fairseq's count.
        if ours.updates is None:
            ours.updates = (state.get("optimizer_history") or [{}])[-1].get("num_updates", 1) - 1


def restore(task: FairseqTask, criterion) -> None:
    """Restore the learned parameters of the criterion of a task that was created from a checkpoint.

    A warning is logged if the teacher is another one than that of the training. Nothing else is checked for a criterion
    that neither learns nor remembers anything.

    Raises:
        UserError: if the checkpoint is of another method, or lacks what the criterion has learned or remembers.
    """
    ours = of(task)
    assert ours.loaded is not None
    loaded, remembers = ours.loaded, getattr(criterion, "remembers", None)
    memory, learned = loaded.memory, criterion.state_dict()
    if changed(memory.get("teacher"), ours):
        logger.warning("%s was distilled from another teacher than this one", loaded.path)
    if not learned and not remembers:
        return
    problem = ""
    if hasattr(criterion, "method") and "method" in memory:
        problem = differences(criterion.method, memory["method"])
    elif remembers and memory.get(remembers) is None and (remembers != "ema" or loaded.ema is None):
        problem = "it does not hold what such a run remembers"
    if not problem and learned and not same_shapes(learned, loaded.criterion):
        problem = "it has no parameters of the criterion, or others"
    if problem:
        raise UserError(
            f"{loaded.path} cannot be validated in this way: {problem}; give the options of its training, or "
            "--criterion hard_gate_kd --gate none"
        )
    if learned:
        criterion.load_state_dict(loaded.criterion)
