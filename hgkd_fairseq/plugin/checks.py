"""Checks of the options at start-up; the error messages name the option and the remedy."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.tasks import FairseqTask

from hgkd_fairseq.errors import UserError, flag
from hgkd_fairseq.gates import Gate, GateError, all_parameters, get_gate
from hgkd_fairseq.gates.pairs import Pair
from hgkd_fairseq.loss import DIVERGENCES, unusable
from hgkd_fairseq.loss.options import FUSED
from hgkd_fairseq.plugin import features
from hgkd_fairseq.plugin.config import RANGES, CriterionOptions, given_temperature
from hgkd_fairseq.plugin.training_state import ON_POLICY, TrainingState


def default(name: str) -> Any:
    """Return the default value of an option of the criterion."""
    return CriterionOptions.__dataclass_fields__[name].default


def make_gate(cfg: Any) -> Gate:
    """Return the gate named by --gate, with the gate parameters that are set.

    Raises:
        UserError: if there is no such gate, or it does not take a parameter or its value.
    """
    given = {name: getattr(cfg, name) for name in all_parameters() if getattr(cfg, name, None) is not None}
    try:
        return get_gate(cfg.gate, **given)
    except GateError as error:
        raise UserError(f"{flag(error.option)}: {error}") from None


def check_options(cfg: Any, gate: Gate, state: TrainingState) -> None:
    """Check the options of the criterion, for training and validation with any task.

    Raises:
        UserError: if a value is out of its range, or an option is missing or has no effect with the others.
    """
    if gate.remembering and not state.keeps_memory:
        several = isinstance(gate.weights, Pair)
        task = "translation_multi_simple_epoch_with_teacher" if several else "translation_with_teacher"
        raise UserError(f"--gate {cfg.gate} has a state, which checkpoints have to hold: add --task {task}")
    if not gate.compares and (cfg.gate_on != "gold" or cfg.untempered_gate):
        which = "--untempered-gate" if cfg.untempered_gate else "--gate-on"
        raise UserError(f"{which}: gate {cfg.gate} does not compare the student with the teacher; drop the option")
    if gate.timed and not cfg.max_update:
        raise UserError(f"--gate {cfg.gate} changes over the training and needs to know its length: --max-update N")
    drawn = cfg.gate == "random" and cfg.gate_share is not None
    if drawn and (cfg.gate_on != "gold" or cfg.untempered_gate or cfg.gate_dropout == "off"):
        raise UserError("--gate random --gate-share draws, and reads nothing: drop what says what it should read")
    reads = gate.needs_teacher and not gate.constant and not gate.uniform and not gate.asks
    if cfg.gate_dropout == "off" and (not reads or cfg.gate_on != "gold"):
        raise UserError(
            "--gate-dropout off: it is for gates that read the student's probability of the gold token, which --gate "
            f"{cfg.gate} --gate-on {cfg.gate_on} does not; drop the option"
        )
    smooth = next((name for name in ("label_smoothing", "confidence_penalty") if getattr(cfg, name)), None)
    if gate.uniform and smooth:
        raise UserError(f"{flag(smooth)}: --gate {cfg.gate} smooths the targets itself; drop the option")
    for name, divergence in DIVERGENCES.items():
        taken = divergence.parameter
        if taken and name != cfg.divergence and getattr(cfg, taken, None) is not None:
            raise UserError(f"{flag(taken)} is of --divergence {name}, not {cfg.divergence}; drop one of them")
    for name in ON_POLICY:
        if not cfg.on_policy_share and getattr(cfg, name) != default(name):
            raise UserError(f"{flag(name)} is about the student's own translations: add --on-policy-share, or drop it")
    try:
        given_temperature(cfg)
    except ValueError as error:
        raise UserError(f"--teacher-temperature {cfg.teacher_temperature}: {error}") from None
    start = cfg.teacher_temperature_start
    if start is None and cfg.teacher_temperature_share != default("teacher_temperature_share"):
        raise UserError("--teacher-temperature-share is of --teacher-temperature-start: add it, or drop the option")
    if start is not None and not cfg.max_update:
        raise UserError("--teacher-temperature-start needs to know the length of the training: give --max-update N")
    for name, span in RANGES.items():
        value = getattr(cfg, name)
        if value is not None and (problem := span.problem(value)):
            raise UserError(f"{flag(name)} {value}: {problem}")


def check_training(cfg: Any, gate: Gate, task: FairseqTask) -> None:
    """Check the options of a training run; not called for a task created from a checkpoint, which only validates.

    Raises:
        UserError: if the training would end before it distils, lacks the validation that it needs, has a divergence
            without effect, cannot run on this machine, or selects checkpoints by a metric that is not logged.
    """
    device = "cuda" if torch.cuda.is_available() and not cfg.cpu else "cpu"
    if cfg.max_update and gate.needs_teacher and cfg.distill_start_update >= cfg.max_update:
        raise UserError(
            f"--distill-start-update {cfg.distill_start_update}: the training ends before, at --max-update "
            f"{cfg.max_update}; start earlier, or give --gate none"
        )
    if cfg.teacher_temperature_start is not None and not cfg.teacher_temperature_share:
        raise UserError(
            "--teacher-temperature-share 0: --teacher-temperature-start is then never used; give a share above 0"
        )
    if given_temperature(cfg) is None and gate.needs_teacher and cfg.disable_validation:
        raise UserError(
            "--teacher-temperature auto needs a validation set: drop --disable-validation, or give a number"
        )
    if cfg.divergence != FUSED and (gate.uniform or not gate.needs_teacher):
        raise UserError(f"--divergence {cfg.divergence}: --gate {cfg.gate} has none; drop the option")
    if device == "cpu" and cfg.fp16 and not cfg.memory_efficient_fp16:
        raise UserError("--fp16 needs a GPU; on the CPU give --memory-efficient-fp16, --amp or --bf16")
    if problem := unusable(cfg.loss_impl, device):
        raise UserError(f"--loss-impl {cfg.loss_impl}: {problem}; use auto")
    logged = {"loss", "nll_loss", "ppl", "kd_loss", "teacher_share", "gap", "ece"}
    logged |= {"accuracy"} if cfg.report_accuracy else set()
    logged |= {"bleu"} if getattr(task.cfg, "eval_bleu", False) else set()
    of_pair = ("nll_loss", "teacher_share", "ece", "accuracy")
    logged |= {f"{pair}_{name}" for pair in getattr(task, "pair_names", ()) for name in of_pair}
    known = type(task).__module__.startswith(("fairseq.", "hgkd_fairseq."))  # a task of another plugin may log more
    if known and not cfg.disable_validation and cfg.best_checkpoint_metric not in logged:
        raise UserError(
            f"--best-checkpoint-metric {cfg.best_checkpoint_metric}: name one of {', '.join(sorted(logged))}, "
            "which validation logs (accuracy comes with --report-accuracy, bleu with --eval-bleu)"
        )
    if known and not cfg.disable_validation:
        check_direction(cfg.best_checkpoint_metric, cfg.maximize_best_checkpoint_metric)


def check_direction(metric: str, maximize: bool) -> None:
    """Check that fairseq, which keeps the checkpoint with the lowest metric unless told otherwise, keeps the best one.

    Raises:
        UserError: if --maximize-best-checkpoint-metric is missing, or given for a metric that is better when lower.
    """
    if metric.endswith(("bleu", "accuracy")) and not maximize:
        raise UserError(
            f"--best-checkpoint-metric {metric}: fairseq would keep the checkpoint with the lowest one; add "
            "--maximize-best-checkpoint-metric"
        )
    if metric.endswith(("loss", "ppl", "ece")) and maximize:
        raise UserError(
            f"--maximize-best-checkpoint-metric: a lower {metric} is better; drop the option, or name another "
            "--best-checkpoint-metric"
        )


def load_teacher(cfg: Any, task: Any) -> Any:
    """Load the task's teacher at start-up, so that one that cannot be used stops the run before training begins.

    Raises:
        UserError: if the task has no teacher, or the teacher cannot be used, at all or with the other options.
    """
    if not hasattr(task, "load_teacher"):
        raise UserError(
            f"--criterion hard_gate_kd --gate {cfg.gate} needs a teacher, which the task {type(task).__name__} "
            "does not have; add --task translation_with_teacher --teacher-path CHECKPOINT"
        )
    teacher, start = task.load_teacher(), cfg.teacher_temperature_start
    teacher.check_options(cfg)
    fixed = given_temperature(cfg)
    if fixed is None and not teacher.frozen and not teacher.learns:
        raise UserError(
            f"--teacher-temperature auto fits a frozen model and --teacher-source {teacher.name} is none; give a number"
        )
    if teacher.learns and (cfg.gate != "always" or fixed != 1 or start is not None):
        raise UserError(
            f"--teacher-source {teacher.name} is a label smoothing and learns with the gate always at temperature 1: "
            "add --gate always --kd-weight 0.1 --teacher-temperature 1"
        )
    return teacher


def check_fitted(cfg: Any, state: TrainingState) -> None:
    """Check, for validation only, that a fitted temperature is known if --teacher-temperature is auto.

    Raises:
        UserError: if the checkpoint was trained with a fixed temperature and holds no fitted one.
    """
    if given_temperature(cfg) is None and state.fitted_temperature is None:
        raise UserError(
            "--teacher-temperature auto: the checkpoint was not trained with it and holds no fitted temperature; give "
            "the number that `hgkd calibration temperature` fits to the teacher"
        )


def check_model(cfg: Any, model: torch.nn.Module, teachers: list[torch.nn.Module]) -> None:
    """Check the architectures of the student and the teachers.

    Args:
        cfg: options of the criterion.
        model: the student, which may be wrapped.
        teachers: models of the teacher; empty if it has none.

    Raises:
        UserError: if the loss, its implementation or the gate cannot use one of them.
    """
    features.check_student(model)
    linear = [features.linear_output(member) is not None for member in (model, *teachers)]
    if cfg.loss_impl not in ("auto", "eager") and not all(linear):
        raise UserError(
            f"--loss-impl {cfg.loss_impl} needs a student and a teacher with a linear output layer; use auto"
        )
    if cfg.gate == "instance" and not linear[0]:
        raise UserError("--gate instance needs a student with a linear output layer; use another --gate or --arch")
