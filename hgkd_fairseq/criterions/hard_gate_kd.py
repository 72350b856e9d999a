"""Criterion ``hard_gate_kd``: a batch in, loss and log lines out. The mathematics is in gates.py and loss/."""

# No `from __future__ import annotations` here: fairseq reads the types of the options at run time.
import dataclasses
import math
from dataclasses import dataclass, field
from typing import List, Optional  # noqa: UP035  fairseq's parser reads List[...]

import torch
from fairseq import utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.distributed import utils as distributed_utils
from fairseq.logging import metrics
from omegaconf import II

from hgkd_fairseq import features
from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.calibration.histogram import tabulate
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.gates import GateError, Instance, Observer, get_gate
from hgkd_fairseq.loss import IMPLEMENTATIONS, gated_distillation, unusable
from hgkd_fairseq.loss import options as loss_options
from hgkd_fairseq.plugin import training_state
from hgkd_fairseq.ranges import COUNT, POSITIVE
from hgkd_fairseq.refresh import Refresh
from hgkd_fairseq.teacher.loras import Loras
from hgkd_fairseq.teacher.past import PastTeacher


@dataclass
class HardGateKDConfig(FairseqDataclass):
    gate: str = field(
        default="token",
        metadata={
            "help": "when to learn from the teacher instead of the data: token (HKD-T), where the student gives the "
            "gold token more probability than the teacher does; sentence (HKD-S), the same for whole sentences; "
            "none: never (plain cross-entropy, no teacher needed); `hgkd gates` lists the others"
        },
    )
    gate_on: ChoiceEnum(["gold", "argmax"]) = field(  # type: ignore[valid-type]
        default="gold",
        metadata={"help": "the token whose probability the gate compares: the gold one or the student's argmax"},
    )
    teacher_temperature: float = field(
        default=1.5, metadata={"help": "divides the teacher's logits; the student's stay as they are"}
    )
    untempered_gate: bool = field(
        default=False,
        metadata={"help": "compare with the teacher at temperature 1 in the gate, and temper only what is learnt from"},
    )
    teacher_temperature_start: Optional[float] = field(  # noqa: UP045  fairseq's parser reads Optional[...]
        default=None,
        metadata={
            "help": "the teacher's temperature at the first update; its inverse goes evenly to that of "
            "--teacher-temperature at the last (Annealing KD)"
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "epsilon for label smoothing of the data term, in fairseq's convention"}
    )
    confidence_penalty: float = field(
        default=0.0, metadata={"help": "beta: the data term loses beta times the entropy of the student (ConfPen)"}
    )
    kd_weight: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "weight of the teacher's term, of the gates always, progressive, selective-*, beta, ..."},
    )
    gate_share: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "share of tokens of the gates random and selective-*; share of updates of the gate annealed"},
    )
    gate_queue: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "tokens whose NLL the gate selective-global remembers"}
    )
    gate_sharpness: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "steepness of the gates soft and soft-learned (where it starts)"}
    )
    virtual_gold: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "probability of the gold token under the gate virtual-teacher's teacher"}
    )
    virtual_temperature: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "temperature of the gate virtual-teacher's teacher"}
    )
    beta_shape: Optional[float] = field(  # noqa: UP045
        default=None, metadata={"help": "a of the gate beta's Beta(a, 1)"}
    )
    held_out: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "sentences by which the gate instance learns its weights: a share of the training sentences, which "
            "is kept aside and not trained on, or the name of another subset in the data folder; never the one that "
            "chooses the checkpoint"
        },
    )
    refresh_interval: Optional[int] = field(  # noqa: UP045
        default=None, metadata={"help": "the gate instance learns its weights anew in every N-th epoch"}
    )
    refresh_change: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": "the gate instance scales its step so that the median weight goes this far in a refresh"},
    )
    weight_rule: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "weights of the gate instance: independent, each between 0 and 2, or convex, with sum 1"},
    )
    distill_start_update: int = field(
        default=0, metadata={"help": "plain cross-entropy, without the teacher's forward pass, before this update"}
    )
    loss_impl: ChoiceEnum(list(IMPLEMENTATIONS)) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "how the loss is computed; auto: triton on a GPU, native on the CPU, chunked where these cannot be "
            "used, eager without a linear output layer"
        },
    )
    report_accuracy: bool = field(default=False, metadata={"help": "report accuracy metric"})
    ignore_prefix_size: int = field(default=0, metadata={"help": "ignore the first N tokens of each target"})
    sentence_avg: bool = II("optimization.sentence_avg")
    max_update: int = II("optimization.max_update")
    lr: List[float] = II("optimization.lr")  # noqa: RUF009, UP006
    max_tokens: Optional[int] = II("dataset.max_tokens")  # noqa: UP045
    batch_size: Optional[int] = II("dataset.batch_size")  # noqa: UP045
    valid_subset: str = II("dataset.valid_subset")
    combine_valid_subsets: Optional[bool] = II("dataset.combine_valid_subsets")  # noqa: UP045
    disable_validation: bool = II("dataset.disable_validation")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")
    cpu: bool = II("common.cpu")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")


GATE_OPTIONS = (
    "kd_weight",
    "gate_share",
    "gate_queue",
    "gate_sharpness",
    "virtual_gold",
    "virtual_temperature",
    "beta_shape",
    "held_out",
    "refresh_interval",
    "refresh_change",
    "weight_rule",
)


RANGES = {
    **loss_options.RANGES,
    "teacher_temperature_start": POSITIVE,
    "ignore_prefix_size": COUNT,
    "distill_start_update": COUNT,
}


def option(name: str) -> str:
    return "--" + name.replace("_", "-")


def gather(values: torch.Tensor) -> torch.Tensor:
    """One tensor of the same size from each data-parallel worker, joined."""
    group = distributed_utils.get_data_parallel_group()
    if distributed_utils.get_world_size(group) == 1:
        return values
    return torch.cat(distributed_utils.all_gather(values, group))


@register_criterion("hard_gate_kd", dataclass=HardGateKDConfig)
class HardGateKDCriterion(FairseqCriterion):
    """Hard-gate knowledge distillation (arXiv:2210.12427) with a teacher from the task ``translation_with_teacher``.

    Logged, in bits where fairseq's own losses are: ``loss`` (the gated objective), ``nll_loss`` and ``ppl`` (the
    student's plain cross-entropy, comparable across methods), ``kd_loss`` (KL per token that the gate gave to the
    teacher), ``teacher_share`` (share of such tokens), ``gap`` (student over teacher, log-probability of the token that
    the gate reads), and in validation ``ece`` (top-1, teacher-forced, with EOS, a fraction).
    """

    def __init__(self, cfg: HardGateKDConfig, task):
        super().__init__(task)
        self.cfg = cfg
        self.gate = self.make_gate()
        # A task that was made from a checkpoint validates; what follows from training does not concern it.
        self.trains = getattr(task, "loaded", None) is None
        if self.gate.learned:
            self.learned_gate = self.gate.weights  # a child, so that its parameters are trained and saved
        elif hasattr(self.gate.weights, "state") and not hasattr(task, "memory"):
            raise UserError(f"--gate {cfg.gate} remembers past batches: add --task translation_with_teacher")
        self.check_options()
        if isinstance(self.gate.weights, Instance) and self.trains:
            Refresh(self)  # the task calls it
        if self.gate.needs_teacher:
            self.check_teacher()
        self.method = training_state.method(cfg, str(getattr(task.cfg, "teacher_source", "none")))
        if hasattr(task, "method"):
            task.method = self.method  # kept in the checkpoints

    def check_teacher(self):
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
        if hasattr(self.gate.weights, "state") and not isinstance(self.gate.weights, Instance):
            return "gate"
        if self.gate.needs_teacher and isinstance(self.task.load_teacher(), PastTeacher):
            return {"ema": "ema", "previous-epoch": "previous_epoch"}[str(self.task.cfg.teacher_source)]
        return None

    def make_gate(self):
        given = {name: getattr(self.cfg, name) for name in GATE_OPTIONS if getattr(self.cfg, name) is not None}
        try:
            return get_gate(self.cfg.gate, **given)
        except GateError as error:
            raise UserError(f"{option(error.option)}: {error}") from None

    def check_options(self):
        cfg = self.cfg
        if not self.gate.compares and (cfg.gate_on != "gold" or cfg.untempered_gate):
            which = "--untempered-gate" if cfg.untempered_gate else "--gate-on"
            raise UserError(f"{which}: gate {cfg.gate} does not compare the student with the teacher; drop the option")
        if self.gate.timed and not cfg.max_update:
            raise UserError(f"--gate {cfg.gate} changes over the training and needs to know its length: --max-update N")
        if cfg.teacher_temperature_start is not None and not cfg.max_update:
            raise UserError("--teacher-temperature-start needs to know the length of the training: give --max-update N")
        for name, span in RANGES.items():
            value = getattr(cfg, name)
            if value is not None and (problem := span.problem(value)):
                raise UserError(f"{option(name)} {value}: {problem}")
        if self.trains:
            self.check_training()

    def check_training(self):
        cfg, task = self.cfg, self.task
        device = "cuda" if torch.cuda.is_available() and not cfg.cpu else "cpu"
        if cfg.max_update and self.gate.needs_teacher and cfg.distill_start_update >= cfg.max_update:
            raise UserError(
                f"--distill-start-update {cfg.distill_start_update}: the training ends before, at --max-update "
                f"{cfg.max_update}; start earlier, or give --gate none"
            )
        if device == "cpu" and cfg.fp16 and not cfg.memory_efficient_fp16:
            raise UserError("--fp16 needs a GPU; on the CPU give --memory-efficient-fp16, --amp or --bf16")
        if problem := unusable(cfg.loss_impl, device):
            raise UserError(f"--loss-impl {cfg.loss_impl}: {problem}; use auto")
        logged = {"loss", "nll_loss", "ppl", "kd_loss", "teacher_share", "gap", "ece"}
        logged |= {"accuracy"} if cfg.report_accuracy else set()
        logged |= {"bleu"} if getattr(task.cfg, "eval_bleu", False) else set()
        known = type(task).__module__.startswith(("fairseq.", "hgkd_fairseq."))  # another's task may log more
        if known and not cfg.disable_validation and cfg.best_checkpoint_metric not in logged:
            raise UserError(
                f"--best-checkpoint-metric {cfg.best_checkpoint_metric}: name one of {', '.join(sorted(logged))}, "
                "which validation logs (accuracy comes with --report-accuracy, bleu with --eval-bleu)"
            )

    def check_model(self, model) -> None:
        """Called before training, with the student.

        Raises:
            UserError: options that do not fit the student's or the teacher's architecture.
        """
        features.check_student(model)
        teachers = getattr(self.task.load_teacher(), "models", []) if self.gate.needs_teacher else []
        linear = [features.linear_output(member) is not None for member in (model, *teachers)]
        if self.cfg.loss_impl not in ("auto", "eager") and not all(linear):
            raise UserError(
                f"--loss-impl {self.cfg.loss_impl} needs a student and a teacher with a linear output layer; use auto"
            )
        if isinstance(self.gate.weights, Instance) and not linear[0]:
            raise UserError("--gate instance needs a student with a linear output layer; use another --gate or --arch")

    def distils(self) -> bool:
        """Whether this step has a teacher: always outside training, in training from --distill-start-update on; a
        teacher that is the student's own past must have come into being."""
        if not self.gate.needs_teacher or not self.task.load_teacher().ready:
            return False
        updates = self.task.num_updates
        training = torch.is_grad_enabled() and updates is not None
        return not training or updates >= self.cfg.distill_start_update

    def progress(self) -> float:
        """Share of the training's updates that are made; 0 outside of training and where their number is unknown."""
        updates = getattr(self.task, "num_updates", None)
        return min(updates / self.cfg.max_update, 1.0) if updates and self.cfg.max_update else 0.0

    def temperature(self) -> float:
        """The teacher's temperature now."""
        end, start = self.cfg.teacher_temperature, self.cfg.teacher_temperature_start
        return end if start is None else 1 / (1 / start + (1 / end - 1 / start) * self.progress())

    def gate_in_use(self):
        """The gate; one that remembers finds its memory, which comes with the checkpoint, in the task."""
        if hasattr(self.gate.weights, "state"):
            self.gate.weights.state = self.task.memory.setdefault("gate", self.gate.weights.state)
        return self.gate

    def forward(self, model, sample, reduce=True):
        """Returns the summed loss, the sample size that divides its gradient, and log outputs that can be summed."""
        skip = self.cfg.ignore_prefix_size
        target = sample["target"][:, skip:]
        # The task translation_with_teacher counts them while they are on the host. Elsewhere they are counted here,
        # before anything of this batch is queued on the device: the host waits for nothing but the last step.
        lengths = None if skip else sample.get("target_lengths")
        if lengths is None:
            lengths = (target != self.padding_idx).sum(1).tolist()
        student = features.head(model, sample["net_input"])
        teachers = []
        if self.distils():
            teachers = self.task.load_teacher().heads(sample, student.hidden.device, student.hidden.dtype)
        validating = not torch.is_grad_enabled()
        gate = self.gate_in_use()
        out = gated_distillation(
            student.hidden[:, skip:],
            student.weight,
            [teacher.hidden[:, skip:] for teacher in teachers] or None,
            [teacher.weight for teacher in teachers],
            target,
            padding_idx=self.padding_idx,
            gate=gate if teachers or not gate.needs_teacher else "none",
            gate_on=self.cfg.gate_on,
            teacher_temperature=self.temperature(),
            gate_temperature=not self.cfg.untempered_gate,
            label_smoothing=self.cfg.label_smoothing,
            confidence_penalty=self.cfg.confidence_penalty,
            progress=self.progress(),
            student_bias=student.bias,
            teacher_bias=[teacher.bias for teacher in teachers],
            top1=validating or self.cfg.report_accuracy,
            lengths=lengths,
            instance=None if validating else sample["id"],
            implementation=self.cfg.loss_impl,
        )
        loss = out.loss
        if teachers and not validating and hasattr(self, "learned_teacher"):
            kept = target != self.padding_idx
            seen = student._replace(hidden=student.hidden[:, skip:][kept])
            loss = loss + self.learned_teacher.objective(seen, target[kept])
        if not validating and isinstance(self.gate.weights, Observer):
            # A batch that fairseq repeats only to keep the workers in step counts for nothing.
            idle = getattr(self.task, "ignore_grad", False)
            seen = dataclasses.replace(out, tokens_mask=torch.zeros_like(out.tokens_mask)) if idle else out
            self.gate.weights.observe(seen, gather)
        sample_size = sample["target"].size(0) if self.cfg.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": out.loss.detach(),
            "nll_loss": out.nll,
            "kd_loss": out.kd,
            "gap": out.gap,
            "teacher_tokens": out.teacher_tokens,
            "tokens": out.tokens,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.cfg.report_accuracy:
            logging_output["n_correct"] = out.correct.sum()
        if validating:
            # Unlike the histogram's update, this takes NaN: of a run that has diverged fairseq logs nan and goes on.
            rows, bins = out.tokens_mask, CalibrationHistogram().bins
            logging_output["calibration"] = tabulate(out.confidence[rows], out.correct[rows], bins)[0]
        return loss, sample_size, logging_output

    @classmethod
    def reduce_metrics(cls, logging_outputs) -> None:
        """Aggregate log outputs over workers and update_freq."""

        def total(key):
            return sum(log.get(key, 0) for log in logging_outputs)

        bits = 1 / math.log(2)
        sample_size, tokens, teacher_tokens = total("sample_size"), total("tokens"), total("teacher_tokens")
        metrics.log_scalar("loss", total("loss") / max(sample_size, 1) * bits, sample_size, round=3)
        metrics.log_scalar("nll_loss", total("nll_loss") / max(tokens, 1) * bits, tokens, round=3)
        metrics.log_derived("ppl", lambda meters: utils.get_perplexity(meters["nll_loss"].avg))
        metrics.log_scalar("kd_loss", total("kd_loss") / max(teacher_tokens, 1) * bits, teacher_tokens, round=3)
        metrics.log_scalar("teacher_share", teacher_tokens / max(tokens, 1), tokens, round=4)
        metrics.log_scalar("gap", total("gap") / max(tokens, 1) * bits, tokens, round=3)
        if any("n_correct" in log for log in logging_outputs):
            metrics.log_scalar("accuracy", 100 * total("n_correct") / max(tokens, 1), tokens, round=3)
        if any("calibration" in log for log in logging_outputs):
            # Sums per bin, added up by the meter; ECE is derived from them when it is printed.
            metrics.log_scalar("_calibration", total("calibration").cpu())
            metrics.log_derived(
                "ece", lambda meters: round(CalibrationHistogram(sums=meters["_calibration"].sum).ece(), 4)
            )

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True
