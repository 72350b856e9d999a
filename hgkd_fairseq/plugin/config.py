"""The options of the criterion. Those of the gates are generated from the gate registry, so that a gate's parameter is
declared only where the gate is defined."""

# No `from __future__ import annotations` here: fairseq reads the types of the options at run time.
import dataclasses
from dataclasses import dataclass, field
from typing import Any, List, Optional  # noqa: UP035  fairseq's parser reads List[...]

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from hgkd_fairseq.gates import all_parameters
from hgkd_fairseq.loss import DIVERGENCES, IMPLEMENTATIONS
from hgkd_fairseq.loss import options as loss_options
from hgkd_fairseq.ranges import COUNT, NUMBER, POSITIVE, SHARE


@dataclass
class CriterionOptions(FairseqDataclass):
    """The options of the criterion other than the parameters of the gates."""

    gate: str = field(
        default="token",
        metadata={
            "help": "when to learn from the teacher instead of the data: token (HKD-T), where the student gives the "
            "gold token more probability than the teacher does; sentence (HKD-S), the same for whole sentences; "
            "none: never (plain cross-entropy, no teacher needed); `hgkd gates` lists the others"
        },
    )
    gate_on: ChoiceEnum(list(loss_options.GATE_ON)) = field(  # type: ignore[valid-type]
        default="gold",
        metadata={
            "help": "the token whose probability the gate compares: "
            + "; ".join(f"{name}, {it}" for name, it in loss_options.GATE_ON.items())
        },
    )
    gate_dropout: ChoiceEnum(["on", "off"]) = field(  # type: ignore[valid-type]
        default="on",
        metadata={
            "help": "whether the gate reads the student with dropout, as it is trained, or without, which takes "
            "another forward pass"
        },
    )
    teacher_temperature: str = field(
        default=str(loss_options.TEACHER_TEMPERATURE),
        metadata={
            "help": "divides the teacher's logits; the student's stay as they are. auto: the one under which the "
            "validation set (the first of --valid-subset) has the least NLL, fitted at the start and kept in the "
            "checkpoints"
        },
    )
    untempered_gate: bool = field(
        default=False,
        metadata={"help": "compare with the teacher at temperature 1 in the gate, and temper only what is learnt from"},
    )
    teacher_temperature_start: Optional[float] = field(  # noqa: UP045  fairseq's parser reads Optional[...]
        default=None,
        metadata={
            "help": "the teacher's temperature at the first update; its inverse goes evenly to that of "
            "--teacher-temperature (Annealing KD)"
        },
    )
    teacher_temperature_share: float = field(
        default=1.0, metadata={"help": "share of the updates after which --teacher-temperature is reached"}
    )
    divergence: ChoiceEnum(list(DIVERGENCES)) = field(  # type: ignore[valid-type]
        default=loss_options.FUSED,
        metadata={
            "help": "what of the student's distribution p from the teacher's q is made small: "
            + ", ".join(f"{name}: {it.equation}" for name, it in DIVERGENCES.items())
        },
    )
    jsd_beta: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": f"b of --divergence jsd ({loss_options.JSD_BETA}), the teacher's share of the mixture; 0: kl, 1: "
            "reverse-kl, to which the divergence over b and over 1 - b tends"
        },
    )
    skew_alpha: Optional[float] = field(  # noqa: UP045
        default=None,
        metadata={"help": f"a of --divergence skew-kl ({loss_options.SKEW_ALPHA}), the teacher's share of the mixture"},
    )
    on_policy_share: float = field(
        default=0.0,
        metadata={
            "help": "share of the training sentences, drawn anew each time, in whose place the student's own "
            "translations are trained on: of them the teacher's divergence alone is learnt (GKD)"
        },
    )
    on_policy_every: int = field(
        default=1, metadata={"help": "epochs from one time that the student translates to the next"}
    )
    on_policy_beam: int = field(default=1, metadata={"help": "beam of the student's translations; 1: greedy"})
    on_policy_sampling: bool = field(default=False, metadata={"help": "draw the student's translations instead"})
    on_policy_speculative: Optional[int] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "K: as the student translates, a piece outside the teacher's K most probable ones is replaced by "
            "one drawn from the teacher's distribution (Speculative KD, which takes 25)"
        },
    )
    label_smoothing: float = field(
        default=0.0, metadata={"help": "epsilon for label smoothing of the data term, in fairseq's convention"}
    )
    confidence_penalty: float = field(
        default=0.0, metadata={"help": "beta: the data term loses beta times the entropy of the student (ConfPen)"}
    )
    distill_start_update: int = field(
        default=0, metadata={"help": "plain cross-entropy, without the teacher's forward pass, before this update"}
    )
    loss_impl: ChoiceEnum(list(IMPLEMENTATIONS)) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "how the loss is computed; auto: triton on a GPU, native on the CPU, chunked where these cannot be "
            "used, eager without a linear output layer; triton and native are for divergence kl and the gold token or "
            "the argmax, all else is computed in torch"
        },
    )
    report_accuracy: bool = field(default=False, metadata={"help": "report accuracy metric"})
    ignore_prefix_size: int = field(default=0, metadata={"help": "ignore the first N tokens of each target"})
    sentence_avg: bool = II("optimization.sentence_avg")
    max_update: int = II("optimization.max_update")
    max_epoch: int = II("optimization.max_epoch")
    lr: List[float] = II("optimization.lr")  # noqa: RUF009, UP006
    max_tokens: Optional[int] = II("dataset.max_tokens")  # noqa: UP045
    batch_size: Optional[int] = II("dataset.batch_size")  # noqa: UP045
    valid_subset: str = II("dataset.valid_subset")
    combine_valid_subsets: Optional[bool] = II("dataset.combine_valid_subsets")  # noqa: UP045
    disable_validation: bool = II("dataset.disable_validation")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")
    maximize_best_checkpoint_metric: bool = II("checkpoint.maximize_best_checkpoint_metric")
    seed: int = II("common.seed")
    amp: bool = II("common.amp")
    cpu: bool = II("common.cpu")
    fp16: bool = II("common.fp16")
    memory_efficient_fp16: bool = II("common.memory_efficient_fp16")


# --teacher-temperature is checked by `given_temperature`.
RANGES = {
    **{name: span for name, span in loss_options.RANGES.items() if name != "teacher_temperature"},
    "teacher_temperature_share": SHARE,
    "teacher_temperature_start": POSITIVE,
    "ignore_prefix_size": COUNT,
    "distill_start_update": COUNT,
    "on_policy_share": SHARE,
    "on_policy_every": NUMBER,
    "on_policy_beam": NUMBER,
    "on_policy_speculative": NUMBER,
}


def divergence_parameters(cfg: Any) -> dict[str, Any]:
    """Return the parameters of the divergences that are set, as keyword arguments of the loss."""
    given = {it.parameter: getattr(cfg, it.parameter, None) for it in DIVERGENCES.values() if it.parameter}
    return {name: value for name, value in given.items() if value is not None}


AUTO = "auto"


def given_temperature(cfg: Any) -> float | None:
    """Return the number given as --teacher-temperature; None for "auto", which is fitted to the validation set.

    Raises:
        ValueError: if the value is neither "auto" nor a number in range.
    """
    given = str(cfg.teacher_temperature)
    if given == AUTO:
        return None
    try:
        value = float(given)
    except ValueError:
        raise ValueError(f"it is neither a number nor {AUTO}") from None
    if problem := loss_options.RANGES["teacher_temperature"].problem(value):
        raise ValueError(f"{problem}, or {AUTO}")
    return value


def temperature(cfg: Any, end: float, progress: float) -> float:
    """Return the teacher's temperature at a point of the training (Annealing KD, arXiv:2104.07163).

    It is `end` without --teacher-temperature-start. With it, the inverse temperature changes linearly from the inverse
    of that option to 1 / `end` over the first --teacher-temperature-share of the updates.

    Args:
        cfg: options of the criterion.
        end: final temperature.
        progress: fraction of the updates made so far, in [0, 1].
    """
    start, share = cfg.teacher_temperature_start, cfg.teacher_temperature_share
    if start is None or progress >= share:
        return end
    return 1 / (1 / start + (1 / end - 1 / start) * progress / share)


def gate_help(takers: list[tuple[str, Any]]) -> str:
    """Return the help text of a gate option: each of its meanings, with the gates that use it and their defaults.

    Args:
        takers: name of each gate that has the option, and its parameter.
    """
    meanings: dict[str, list[str]] = {}
    for name, parameter in takers:
        default = "" if parameter.default is None else f" ({parameter.default})"
        meanings.setdefault(parameter.option.help, []).append(name + default)
    texts = [f"{help}; of the gate{'s' * (len(gates) > 1)} {', '.join(gates)}" for help, gates in meanings.items()]
    choices = takers[0][1].option.choices
    return ". ".join(texts).replace("%", "%%") + (f". One of {', '.join(choices)}" if choices else "")


def criterion_config(module: str) -> type[CriterionOptions]:
    """Create the dataclass of the criterion's options, with the parameters of all gates registered so far.

    Args:
        module: name of the module that binds the class to its name, HardGateKDConfig, as pickling it requires.

    Raises:
        ValueError: if a gate's parameter has the name of another option, or two gates declare a parameter with
            different types.
    """
    taken = {one.name for one in dataclasses.fields(CriterionOptions)}
    options = []
    for name, takers in all_parameters().items():
        if name in taken:
            raise ValueError(f"parameter {name} of gate {takers[0][0]} has the name of an option of the criterion")
        kind = takers[0][1].type
        option = field(default=None, metadata={"help": gate_help(takers)})
        options.append((name, Optional[kind], option))  # noqa: UP045
    made = dataclasses.make_dataclass("HardGateKDConfig", options, bases=(CriterionOptions,))
    made.__module__ = module
    return made
