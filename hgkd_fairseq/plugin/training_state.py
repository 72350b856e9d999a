"""What criterion, gates and teacher may see of a training, and what it has learned and remembers beside its model.

fairseq-train restores the criterion's parameters and the task's memory when it resumes, whatever run they are of, and
fairseq-validate restores neither. `prepare` looks at a checkpoint before fairseq-train takes it up, `keep` and
`restore` bring it back in fairseq-validate.
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
TASK = "TranslationWithTeacherTask"  # under whose name checkpoints without a "method" keep their memory
# Which sentences are kept aside is compared where the data are at hand, and on the sentences themselves.
SENTENCES = "held_out"
DIVERGENCE = ("divergence", "jsd_beta", "skew_alpha")
ON_POLICY = tuple(f"on_policy_{name}" for name in ("share", "every", "beam", "sampling", "speculative"))
# What a run may go on with otherwise than it began, as with another learning rate; a warning says so.
FREE = (
    *("gate_on", "teacher_temperature", "teacher_temperature_start", "teacher_temperature_share"),
    *("gate_dropout", "untempered_gate", "label_smoothing"),
    *("confidence_penalty", "distill_start_update", "refresh_interval", "refresh_change"),
    *DIVERGENCE,
    *ON_POLICY,
)
# Of these, what checkpoints of version 0.1.0 do not have.
NEW = (*DIVERGENCE, *ON_POLICY, "gate_dropout", "teacher_temperature_share")
STORED = ("checkpoint", "store")  # sources of one teacher
KEPT = ("method", "updates", "teacher", "fitted_temperature")  # in the checkpoints, beside the memory


@dataclass(frozen=True)
class Loaded:
    """Of the checkpoint that a task was made from, not to train: what fairseq-validate needs."""

    path: str
    criterion: dict | None  # parameters
    memory: dict[str, Any]
    ema: dict | None  # fairseq's moving average


@dataclass
class TrainingState:
    """Of one task. `of` finds it."""

    updates: int | None = None  # made so far; None outside training
    idle: bool = False  # whether this step's batch is one that only keeps the workers in step, and counts for nothing
    # What a gate or the student's past teacher remembers, by name: tensors in (nested) dicts, in the checkpoints.
    memory: dict[str, dict] = field(default_factory=dict)
    keeps_memory: bool = False  # whether the task saves it
    method: dict[str, Any] = field(default_factory=dict)  # the criterion's, kept in the checkpoints
    loaded: Loaded | None = None
    held_out: HeldOut = field(default_factory=HeldOut)
    teacher_fingerprint: str | None = None
    fitted_temperature: float | None = None  # the teacher's, of --teacher-temperature auto
    # Called with (epoch, model) when data and checkpoint are loaded, and before each epoch of training.
    at_training_begin: list[Callable[[int, torch.nn.Module], None]] = field(default_factory=list)
    at_epoch_begin: list[Callable[[int, torch.nn.Module], None]] = field(default_factory=list)
    # Called with (subset, meters) when a subset has been validated in a training.
    at_validated: list[Callable[[str, Any], None]] = field(default_factory=list)

    def progress(self, max_update: int) -> float:
        """Share of the training's updates that are made; 0 outside of training and where their number is unknown."""
        return min(self.updates / max_update, 1.0) if self.updates and max_update else 0.0

    def checkpoint(self) -> dict[str, Any]:
        """What the task saves."""
        kept: dict[str, Any] = {"method": self.method, "updates": self.updates, "teacher": self.teacher_fingerprint}
        return {**utils.move_to_cpu(self.memory), **kept, "fitted_temperature": self.fitted_temperature}

    def resume(self, kept: dict[str, Any]) -> None:
        """From what was saved."""
        self.memory |= {name: what for name, what in kept.items() if name not in KEPT}
        updates, fitted = kept.get("updates"), kept.get("fitted_temperature")
        self.updates = updates if type(updates) is int and 0 <= updates <= files.LARGEST else None
        self.fitted_temperature = fitted if type(fitted) is float and 0 < fitted < math.inf else None


_states: weakref.WeakKeyDictionary[FairseqTask, TrainingState] = weakref.WeakKeyDictionary()


def of(task: FairseqTask) -> TrainingState:
    """The state of a task, whatever task it is."""
    return _states.setdefault(task, TrainingState())


def method(criterion_cfg: Any, teacher_source: str) -> dict[str, Any]:
    """What decides what a run learns and remembers: its gate with all parameters, and where its teacher comes from."""
    name = str(criterion_cfg.gate)
    found: dict[str, Any] = {"gate": name}
    for parameter in gates.GATES[name].parameters.values() if name in gates.GATES else ():
        given = getattr(criterion_cfg, parameter.name, None)
        if parameter.name != SENTENCES and parameter.name not in FREE:
            found[parameter.name] = parameter.default if given is None else given
    if name not in gates.GATES or gates.GATES[name].needs_teacher:
        found["teacher_source"] = teacher_source
    return found


def memory_in(extra_state: dict) -> dict[str, Any]:
    """The memory of a task of ours, or of one derived from it, in a checkpoint's extra state."""
    found = [kept for kept in extra_state.values() if isinstance(kept, dict) and isinstance(kept.get("method"), dict)]
    older = extra_state.get(TASK)
    return found[0] if found else older if isinstance(older, dict) else {}


def method_of(state: dict) -> dict[str, Any] | None:
    """The method of a checkpoint's run; None where it had another criterion."""
    cfg = state.get("cfg")
    criterion, task = (getattr(cfg, part, None) for part in ("criterion", "task"))
    if getattr(criterion, "_name", None) != CRITERION:
        return None
    kept = memory_in(state.get("extra_state") or {}).get("method")
    return kept or method(criterion, str(getattr(task, "teacher_source", "checkpoint")))


def changes(asked_cfg: Any, held_cfg: Any) -> str:
    """Of the options that a run may go on with otherwise: those of the criterion that differ, in words. A checkpoint
    of an older version has fewer of them."""
    names = [name for name in FREE if name not in NEW or getattr(held_cfg, name, None) is not None]
    found: list[dict[str, Any]] = [{name: getattr(cfg, name, None) for name in names} for cfg in (asked_cfg, held_cfg)]
    for values in found:  # a number in checkpoints of version 0.1.0
        with contextlib.suppress(ValueError, TypeError):
            values["teacher_temperature"] = float(values["teacher_temperature"])
    return differences(*found)


def differences(asked: dict[str, Any], held: dict[str, Any]) -> str:
    """What is asked for and what a checkpoint holds, in words; "" where they are the same. A store of a checkpoint is
    the same teacher: `changed` tells another one."""
    names = [name for name in {**asked, **held} if asked.get(name) != held.get(name)]
    if (asked.get("teacher_source"), held.get("teacher_source")) in (STORED, STORED[::-1]):
        names.remove("teacher_source")
    if "gate" in names:
        names = [name for name in names if name in ("gate", "teacher_source")]  # the rest follows from it

    def words(values: dict[str, Any]) -> str:
        given = [f"{flag(name)} {values[name]}" for name in names if values.get(name) is not None]
        return " ".join(given) or "the default"

    return f"{words(asked)} is asked for, and {words(held)} made it" if names else ""


def same_shapes(mine: dict, theirs: dict | None) -> bool:
    return theirs is not None and {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}


def prepare(state: dict, path: str, task, criterion, new_run: bool) -> None:
    """Compare the `state` of a checkpoint with the run that is about to take it up, before it does.

    In a new run, which takes the model alone (--finetune-from-model, --reset-optimizer), what belongs to another method
    is left out of `state`, and what the criterion learns begins anew.

    Raises:
        UserError: the run is no new one and the checkpoint is of another method or teacher.
    """
    ours = getattr(criterion, "method", None)
    if ours is None and not utils.has_parameters(criterion):
        return
    remedy = (
        "resume it as it was, or take its model alone: with --finetune-from-model in another --save-dir, or with "
        "--reset-optimizer"
    )
    held = method_of(state)
    memory = memory_in(state.get("extra_state") or {})
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
    if learned and (problem or not same_shapes(learned, state.get("criterion"))):
        if not new_run:
            raise UserError(f"{path} has no parameters of the criterion, or others; {remedy}")
        logger.info("what the criterion learns begins anew: %s has no such parameters", path)
        state["criterion"] = utils.move_to_cpu(learned)
    if problem:
        state["extra_state"] = {name: kept for name, kept in state["extra_state"].items() if kept is not memory}


def changed(kept: str | None, state: TrainingState) -> bool:
    """Whether a checkpoint's run had another teacher than this one."""
    return None not in (kept, state.teacher_fingerprint) and kept != state.teacher_fingerprint


def keep(task: FairseqTask, path: str, state: dict) -> None:
    """Keep in a task that was made from a checkpoint what its criterion and teacher will need of it."""
    extra, ours = state.get("extra_state") or {}, of(task)
    ours.loaded = Loaded(path, state.get("criterion"), memory_in(extra), extra.get("ema"))
    if ours.loaded.memory:
        ours.resume(ours.loaded.memory)
        if ours.updates is None:  # of an older checkpoint; validation came within the last update
            ours.updates = (state.get("optimizer_history") or [{}])[-1].get("num_updates", 1) - 1


def restore(task: FairseqTask, criterion) -> None:
    """Bring back what the criterion learned, in a task that was made from a checkpoint.

    Raises:
        UserError: the checkpoint has no such thing, or is of another method.
    """
    ours = of(task)
    assert ours.loaded is not None
    loaded, remembers = ours.loaded, getattr(criterion, "remembers", None)
    memory, learned = loaded.memory, criterion.state_dict()
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
    if changed(memory.get("teacher"), ours):
        logger.warning("%s was distilled from another teacher than this one", loaded.path)
