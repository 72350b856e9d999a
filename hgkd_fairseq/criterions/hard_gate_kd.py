"""Criterion ``hard_gate_kd``: its options, gate and teacher. What a batch costs is in forward.py."""

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
    """Hard-gate knowledge distillation (arXiv:2210.12427) with a teacher from a task that has one."""

    def __init__(self, cfg: Any, task: Any):
        super().__init__(task)
        self.cfg, self.state = cfg, training_state.of(task)
        task.language_tokens_apart = True
        self.on_policy: OnPolicy | None = None
        self.gate = checks.make_gate(cfg)
        if self.gate.learned:
            self.learned_gate = self.gate.weights  # a child, so that its parameters are trained and saved
        checks.check_options(cfg, self.gate, self.state)
        self.pairs, self.of_pair = getattr(task, "pair_names", ()), isinstance(self.gate.weights, Pair)
        if self.of_pair:
            by_pair.check(cfg, self.pairs)
            self.state.at_validated.append(self.compare_pairs)
        if self.state.loaded is None:  # else the task was made from a checkpoint, and validates
            checks.check_training(cfg, self.gate, task)
            self.state.at_training_begin.append(self.fit_temperature)
            if isinstance(self.gate.weights, Instance):
                self.refresh = Refresh(self)
        if self.gate.needs_teacher:
            teacher = checks.load_teacher(cfg, task)
            if isinstance(teacher, Loras):
                self.learned_teacher = teacher  # a child, so that its parameters are trained and saved
            if self.state.loaded is not None:
                checks.check_fitted(cfg, self.state)
        if cfg.on_policy_share and self.state.loaded is None:
            self.on_policy = OnPolicy(self)
        self.method = training_state.method(cfg, str(getattr(task.cfg, "teacher_source", "none")))
        if getattr(task.cfg, "leave_out_fold", None):
            self.method["leave_out_fold"] = task.cfg.leave_out_fold
        if self.of_pair:  # it remembers them by their places
            self.method["lang_pairs"] = ",".join(self.pairs)
        self.state.method = self.method  # kept in the checkpoints

    def teacher(self) -> TeacherSource | None:
        """None for a gate that needs none."""
        return self.task.load_teacher() if self.gate.needs_teacher else None

    @property
    def remembers(self) -> str | None:
        """What of the training validation depends on, by its name in the task's memory or in the checkpoint."""
        if self.gate.remembering and not isinstance(self.gate.weights, Instance):
            return "gate"
        teacher = self.teacher()
        return teacher.remembers if teacher else None

    def check_model(self, model: torch.nn.Module) -> None:
        """Called before training, with the student."""
        teacher = self.teacher()
        checks.check_model(self.cfg, model, teacher.models if teacher else [])

    def fit_temperature(self, epoch: int, model: torch.nn.Module) -> None:
        """Called when data and checkpoint are loaded: log how a frozen teacher fits the data, and where
        --teacher-temperature is auto take the temperature that fits it, once for a run."""
        teacher = self.teacher()
        if teacher is not None and teacher.frozen:
            gauge.begin(self.cfg, self.task, teacher, model, self.state)

    def compare_pairs(self, subset: str, meters: Any) -> None:
        """Called when a subset has been validated."""
        if subset == self.cfg.valid_subset.split(",")[0]:
            pair = self.gate_in_use().weights
            assert isinstance(pair, Pair)
            by_pair.compare(pair, self.pairs, subset, meters)

    @property
    def teacher_temperature(self) -> float:
        """The number that is given, or the fitted one; 1 without a teacher."""
        return given_temperature(self.cfg) or self.state.fitted_temperature or 1.0

    def gate_in_use(self) -> Gate:
        """The gate; one that remembers finds its memory, which comes with the checkpoint, in the training's state."""
        if self.gate.remembering:
            self.gate.remembering.state = self.state.memory.setdefault("gate", self.gate.remembering.state)
        return self.gate

    def forward(self, model, sample, reduce=True):
        """Returns the summed loss, the sample size that divides its gradient, and log outputs that can be summed."""
        return forward(self, model, sample)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        logged.reduce(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
