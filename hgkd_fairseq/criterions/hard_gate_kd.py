"""Criterion ``hard_gate_kd``: a batch in, loss and log lines out. The mathematics is in gates/ and loss/."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.criterions import FairseqCriterion, register_criterion

from hgkd_fairseq.criterions import by_pair, logged
from hgkd_fairseq.criterions.without_dropout import gold_logprob
from hgkd_fairseq.data import batches
from hgkd_fairseq.gates import Gate
from hgkd_fairseq.gates.pairs import Pair
from hgkd_fairseq.loss import Head, gated_distillation
from hgkd_fairseq.plugin import checks, features, training_state, workers
from hgkd_fairseq.plugin.config import criterion_config, given_temperature, temperature
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.sentence_weights.refresh import Refresh
from hgkd_fairseq.teacher import Dense, Signal, Sparse, TeacherSource, gauge
from hgkd_fairseq.teacher.dictionaries import lost_mass
from hgkd_fairseq.teacher.loras import Loras

HardGateKDConfig = criterion_config(__name__)


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
        self.method = training_state.method(cfg, str(getattr(task.cfg, "teacher_source", "none")))
        if getattr(task.cfg, "leave_out_fold", None):
            self.method["leave_out_fold"] = task.cfg.leave_out_fold
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

    def signal(self, sample: dict, student: Head) -> Signal | None:
        """The teacher's view of the batch; None before --distill-start-update, for a gate that needs none, and where
        a teacher that is the student's own past has not come into being."""
        teacher, updates = self.teacher(), self.state.updates
        training = torch.is_grad_enabled() and updates is not None
        if teacher is None or not teacher.ready or (training and updates < self.cfg.distill_start_update):
            return None
        return teacher.signal(sample, student.hidden.device, student.hidden.dtype)

    def forward(self, model, sample, reduce=True):
        """Returns the summed loss, the sample size that divides its gradient, and log outputs that can be summed."""
        skip, validating = self.cfg.ignore_prefix_size, not torch.is_grad_enabled()
        target = sample["target"][:, skip:]
        lengths = batches.target_lengths(sample, skip, self.padding_idx)
        student = features.head(model, sample["net_input"])
        signal = self.signal(sample, student)
        signal = signal and signal.after(skip)
        student = student._replace(hidden=student.hidden[:, skip:])
        teachers = signal.heads if signal else []
        gate, progress = self.gate_in_use(), self.state.progress(self.cfg.max_update)
        without_dropout = None
        if self.cfg.gate_dropout == "off" and signal and not validating:
            how = {"padding_idx": self.padding_idx, "lengths": lengths, "implementation": self.cfg.loss_impl}
            without_dropout = gold_logprob(model, sample, target, **how)
        tau = temperature(self.cfg, self.teacher_temperature, progress)
        gold = signal.gold.at(1.0 if self.cfg.untempered_gate else tau) if signal and signal.gold else None
        out = gated_distillation(
            student.hidden, student.weight, [one.hidden for one in teachers] or None, [one.weight for one in teachers],
            target,
            padding_idx=self.padding_idx,
            gate=gate if signal or not gate.needs_teacher else "none",
            gate_on=self.cfg.gate_on,
            teacher_temperature=tau,
            tempered_gate=not self.cfg.untempered_gate,
            divergence=self.cfg.divergence,
            label_smoothing=self.cfg.label_smoothing,
            confidence_penalty=self.cfg.confidence_penalty,
            progress=progress,
            student_bias=student.bias, teacher_bias=[one.bias for one in teachers],
            top1=validating or self.cfg.report_accuracy,
            lengths=lengths,
            instance=sample["pair"] if self.of_pair else None if validating else sample["id"],
            student_logprob=without_dropout,
            teacher_gold=gold,
            teacher_sparse=signal.distribution if isinstance(signal, Sparse) else None,
            implementation=self.cfg.loss_impl,
        )  # fmt: skip
        loss = out.loss
        if not validating:
            if teachers and hasattr(self, "learned_teacher"):
                kept = target != self.padding_idx
                seen = student._replace(hidden=student.hidden[kept])
                loss = loss + self.learned_teacher.objective(seen, target[kept])
            workers.show(out, self.gate, self.state.idle)
        sample_size = sample["target"].size(0) if self.cfg.sentence_avg else sample["ntokens"]
        log = logged.sums(out, sample, sample_size, self.cfg.report_accuracy)
        log |= by_pair.sums(out, sample, self.pairs)
        if validating and signal and self.of_pair:
            log |= by_pair.teacher_sums(signal, out, sample, target, self.pairs)
        if validating and isinstance(signal, Dense) and signal.whole:
            log["teacher_lost_mass"] = lost_mass(signal, out.tokens_mask).sum()
        return loss, sample_size, log

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        logged.reduce(logging_outputs)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
