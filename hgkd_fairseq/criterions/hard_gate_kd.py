"""Criterion ``hard_gate_kd``: a batch in, loss and log lines out. The mathematics is in gates/ and loss/."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.distributed import utils as distributed_utils

from hgkd_fairseq.criterions import logged
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.gates import Gate
from hgkd_fairseq.loss import Head, gated_distillation
from hgkd_fairseq.plugin import checks, features, training_state
from hgkd_fairseq.plugin.config import criterion_config
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.sentence_weights.refresh import Refresh
from hgkd_fairseq.teacher import TeacherSource
from hgkd_fairseq.teacher.loras import Loras

HardGateKDConfig = criterion_config(__name__)


def gather(values: torch.Tensor) -> torch.Tensor:
    """One tensor of the same size from each data-parallel worker, joined."""
    group = distributed_utils.get_data_parallel_group()
    if distributed_utils.get_world_size(group) == 1:
        return values
    return torch.cat(distributed_utils.all_gather(values, group))


@register_criterion("hard_gate_kd", dataclass=HardGateKDConfig)
class HardGateKDCriterion(FairseqCriterion):
    """Hard-gate knowledge distillation (arXiv:2210.12427) with a teacher from a task that has one."""

    def __init__(self, cfg: Any, task: Any):
        super().__init__(task)
        self.cfg, self.state = cfg, training_state.of(task)
        self.gate = checks.make_gate(cfg)
        if self.gate.learned:
            self.learned_gate = self.gate.weights  # a child, so that its parameters are trained and saved
        checks.check_options(cfg, self.gate, self.state)
        if self.state.loaded is None:  # else the task was made from a checkpoint, and validates
            checks.check_training(cfg, self.gate, task)
            if isinstance(self.gate.weights, Instance):
                self.refresh = Refresh(self)
        if self.gate.needs_teacher:
            self.check_teacher()
        self.method = training_state.method(cfg, str(getattr(task.cfg, "teacher_source", "none")))
        self.state.method = self.method  # kept in the checkpoints

    def teacher(self) -> TeacherSource | None:
        """None for a gate that needs none."""
        return self.task.load_teacher() if self.gate.needs_teacher else None

    def check_teacher(self) -> None:
        cfg, task = self.cfg, self.task
        if not hasattr(task, "load_teacher"):
            raise UserError(
                f"--criterion hard_gate_kd --gate {cfg.gate} needs a teacher, which the task {type(task).__name__} "
                "does not have; add --task translation_with_teacher --teacher-path CHECKPOINT"
            )
        teacher = task.load_teacher()  # here, so that an unusable teacher stops the run before it starts
        if isinstance(teacher, Loras):
            self.learned_teacher = teacher  # a child, so that its parameters are trained and saved
            if cfg.gate != "always" or cfg.teacher_temperature != 1 or cfg.teacher_temperature_start is not None:
                raise UserError(
                    "--teacher-source loras is a label smoothing and learns with the gate always at temperature 1: "
                    "add --gate always --kd-weight 0.1 --teacher-temperature 1"
                )

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

    def temperature(self) -> float:
        """The teacher's temperature now."""
        end, start = self.cfg.teacher_temperature, self.cfg.teacher_temperature_start
        progress = self.state.progress(self.cfg.max_update)
        return end if start is None else 1 / (1 / start + (1 / end - 1 / start) * progress)

    def gate_in_use(self) -> Gate:
        """The gate; one that remembers finds its memory, which comes with the checkpoint, in the training's state."""
        if self.gate.remembering:
            self.gate.remembering.state = self.state.memory.setdefault("gate", self.gate.remembering.state)
        return self.gate

    def signal(self, sample: dict, student: Head) -> list[Head]:
        """The teacher's view of the batch; nothing before --distill-start-update, for a gate that needs none, and where
        a teacher that is the student's own past has not come into being."""
        teacher, updates = self.teacher(), self.state.updates
        training = torch.is_grad_enabled() and updates is not None
        if teacher is None or not teacher.ready or (training and updates < self.cfg.distill_start_update):
            return []
        return teacher.signal(sample, student.hidden.device, student.hidden.dtype).heads

    def forward(self, model, sample, reduce=True):
        """Returns the summed loss, the sample size that divides its gradient, and log outputs that can be summed."""
        skip, validating = self.cfg.ignore_prefix_size, not torch.is_grad_enabled()
        target = sample["target"][:, skip:]
        # A task with a teacher counts them while they are on the host. Elsewhere they are counted here, before anything
        # of this batch is queued on the device: the host waits for nothing but the last step.
        lengths = None if skip else sample.get("target_lengths")
        if lengths is None:
            lengths = (target != self.padding_idx).sum(1).tolist()
        student = features.head(model, sample["net_input"])
        teachers = self.signal(sample, student)
        student, *teachers = [head._replace(hidden=head.hidden[:, skip:]) for head in (student, *teachers)]
        gate = self.gate_in_use()
        out = gated_distillation(
            student.hidden,
            student.weight,
            [teacher.hidden for teacher in teachers] or None,
            [teacher.weight for teacher in teachers],
            target,
            padding_idx=self.padding_idx,
            gate=gate if teachers or not gate.needs_teacher else "none",
            gate_on=self.cfg.gate_on,
            teacher_temperature=self.temperature(),
            gate_temperature=not self.cfg.untempered_gate,
            divergence=self.cfg.divergence,
            label_smoothing=self.cfg.label_smoothing,
            confidence_penalty=self.cfg.confidence_penalty,
            progress=self.state.progress(self.cfg.max_update),
            student_bias=student.bias,
            teacher_bias=[teacher.bias for teacher in teachers],
            top1=validating or self.cfg.report_accuracy,
            lengths=lengths,
            instance=None if validating else sample["id"],
            implementation=self.cfg.loss_impl,
        )
        loss = out.loss
        if not validating:
            if teachers and hasattr(self, "learned_teacher"):
                kept = target != self.padding_idx
                loss = loss + self.learned_teacher.objective(
                    student._replace(hidden=student.hidden[kept]), target[kept]
                )
            if self.gate.observer:
                # A batch that fairseq repeats only to keep the workers in step counts for nothing.
                nothing = torch.zeros_like(out.tokens_mask)
                seen = dataclasses.replace(out, tokens_mask=nothing) if self.state.idle else out
                self.gate.observer.observe(seen, gather)
        sample_size = sample["target"].size(0) if self.cfg.sentence_avg else sample["ntokens"]
        return loss, sample_size, logged.sums(out, sample, sample_size, self.cfg.report_accuracy)

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        logged.reduce(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
