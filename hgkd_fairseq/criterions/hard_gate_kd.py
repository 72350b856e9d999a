"""Criterion ``hard_gate_kd``: its options, gate and teacher. The loss of a batch is computed in forward.py."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion

from hgkd_fairseq.criterions import by_pair, logged
from hgkd_fairseq.criterions.forward import forward
from hgkd_fairseq.criterions.on_policy import OnPolicy
from hgkd_fairseq.gates import Gate
from hgkd_fairseq.gates.pairs import Pair
from hgkd_fairseq.plugin import checks, training_state
from hgkd_fairseq.plugin.config import criterion_config, given_temperature
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.sentence_weights.refresh import Refresh
from hgkd_fairseq.teacher import TeacherSource, gauge
from hgkd_fairseq.teacher.loras import Loras

HardGateKDConfig = criterion_config(__name__)


@register_criterion("hard_gate_kd", dataclass=HardGateKDConfig)
class HardGateKDCriterion(FairseqCriterion):
    """Distillation in which a gate chooses between data and teacher (hard-gate KD: Lee et al., EMNLP 2022,
    arXiv:2210.12427, and other gates). The teacher is that of the task.

    Args:
        cfg: options of the criterion, a `HardGateKDConfig`.
        task: task of fairseq; one with a teacher if the gate needs it.

    Raises:
        UserError: if the options, the teacher and the task cannot be used together.
    """

    def __init__(self, cfg: Any, task: Any):
        super().__init__(task)
        self.cfg, self.state = cfg, training_state.of(task)
        task.language_tokens_apart = True
        self.on_policy: OnPolicy | None = None
        self.gate = checks.make_gate(cfg)
        if self.gate.learned:
            self.learned_gate = self.gate.weights  # a child module, so that its parameters are trained and saved
        checks.check_options(cfg, self.gate, self.state)
        self.pairs, self.of_pair = getattr(task, "pair_names", ()), isinstance(self.gate.weights, Pair)
        if self.of_pair:
            by_pair.check(cfg, self.pairs)
            self.state.at_validated.append(self.compare_pairs)
        if self.state.loaded is None:  # otherwise the task was created from a checkpoint and only validates
            checks.check_training(cfg, self.gate, task)
            self.state.at_training_begin.append(self.fit_temperature)
            if isinstance(self.gate.weights, Instance):
                self.refresh = Refresh(self)
        if self.gate.needs_teacher:
            teacher = checks.load_teacher(cfg, task)
            if isinstance(teacher, Loras):
                self.learned_teacher = teacher  # a child module, so that its parameters are trained and saved
            if self.state.loaded is not None:
                checks.check_fitted(cfg, self.state)
        if cfg.on_policy_share and self.state.loaded is None:
            self.on_policy = OnPolicy(self)
        self.method = training_state.method(cfg, str(getattr(task.cfg, "teacher_source", "none")))
        if getattr(task.cfg, "leave_out_fold", None):
            self.method["leave_out_fold"] = task.cfg.leave_out_fold
        if self.of_pair:  # the gate's memory refers to the pairs by their indices
            self.method["lang_pairs"] = ",".join(self.pairs)
        self.state.method = self.method  # kept in the checkpoints

    def teacher(self) -> TeacherSource | None:
        """Return the task's teacher; None if the gate needs none."""
        return self.task.load_teacher() if self.gate.needs_teacher else None

    @property
    def remembers(self) -> str | None:
        """Key, in the task's memory or the checkpoint, of what validation needs of the training; None if nothing."""
        if self.gate.remembering and not isinstance(self.gate.weights, Instance):
            return "gate"
        teacher = self.teacher()
        return teacher.remembers if teacher else None

    def check_model(self, model: torch.nn.Module) -> None:
        """Check the architectures of student and teacher before training.

        Args:
            model: the student, which may be wrapped.

        Raises:
            UserError: if the criterion cannot use one of them.
        """
        teacher = self.teacher()
        checks.check_model(self.cfg, model, teacher.models if teacher else [])

    def fit_temperature(self, epoch: int, model: torch.nn.Module) -> None:
        """Log how well a frozen teacher fits the data and, if --teacher-temperature is auto, fit its temperature.

        Called once data and checkpoint are loaded. A fitted temperature in the checkpoint is kept.

        Args:
            epoch: next epoch; not used.
            model: the student, whose device and precision the teacher is to have.

        Raises:
            UserError: if no temperature can be fitted.
        """
        teacher = self.teacher()
        if teacher is not None and teacher.frozen:
            gauge.begin(self.cfg, self.task, teacher, model, self.state)

    def compare_pairs(self, subset: str, meters: Any) -> None:
        """Update gate `pair` after the validation of the first subset of --valid-subset; others are ignored."""
        if subset == self.cfg.valid_subset.split(",")[0]:
            pair = self.gate_in_use().weights
            assert isinstance(pair, Pair)
            by_pair.compare(pair, self.pairs, subset, meters)

    @property
    def teacher_temperature(self) -> float:
        """The number given as --teacher-temperature, or the fitted temperature; 1 if none has been fitted."""
        return given_temperature(self.cfg) or self.state.fitted_temperature or 1.0

    def gate_in_use(self) -> Gate:
        """Return the gate. The state of one that remembers is that in the task's memory, which checkpoints restore."""
        if self.gate.remembering:
            self.gate.remembering.state = self.state.memory.setdefault("gate", self.gate.remembering.state)
        return self.gate

    def forward(self, model, sample, reduce=True):
        """Return the summed loss (scalar, nats), the sample size that divides its gradient, and the logging outputs.

        Args:
            model: the student, which may be wrapped.
            sample: batch of fairseq.
            reduce: ignored; the loss is always summed.
        """
        return forward(self, model, sample)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        logged.reduce(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
