"""Command-line options of the tasks with a teacher."""

# No `from __future__ import annotations` here: fairseq reads the types of the options at run time.
from dataclasses import dataclass, field
from typing import Optional

from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from omegaconf import II

from hgkd_fairseq.teacher import SOURCES


@dataclass
class TeacherConfig:
    teacher_source: ChoiceEnum(list(SOURCES)) = field(  # type: ignore[valid-type]
        default="checkpoint",
        metadata={"help": "what teaches: " + "; ".join(f"{name}, {it.help}" for name, it in SOURCES.items())},
    )
    teacher_path: Optional[str] = field(  # noqa: UP045  fairseq's parser reads Optional[...], not X | None
        default=None,
        metadata={
            "help": "fairseq checkpoint of the teacher, or several with ':' between them, averaged in probability "
            "space, or SRC-TGT=CKPT of each of several language pairs with ',' between them; any architecture and "
            "size, all symbols of the student's dictionaries; needed for training and validation with a distilling "
            "criterion, never for generation"
        },
    )
    teacher_store: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={"help": "in place of --teacher-path: what `hgkd store` wrote of a teacher, which is not run again"},
    )
    gauge_store: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "folder that hgkd store has written: the gate compares the student with what it says of the gold "
            "tokens, and learns from the teacher; written with --kind gold --folds by teachers that were each trained "
            "without the sentences that they are asked of"
        },
    )
    leave_out_fold: Optional[str] = field(  # noqa: UP045
        default=None,
        metadata={
            "help": "K/N: train without the sentences K - 1, K - 1 + N, ... of the training set, for the K-th of N "
            "teachers of a --gauge-store"
        },
    )
    teacher_dtype: ChoiceEnum(["auto", "fp32", "fp16", "bf16"]) = field(  # type: ignore[valid-type]
        default="auto", metadata={"help": "precision of the teacher's forward pass; auto: the student's"}
    )
    teacher_model_overrides: str = field(
        default="{}",
        metadata={
            "help": "a dict that overrides settings in the teacher's checkpoint, as --model-overrides does for the "
            "student's; {'data': 'DIR'} names the folder of its dictionaries where they have moved"
        },
    )
    store_ema: bool = II("ema.store_ema")
    save_dir: str = II("checkpoint.save_dir")
    max_tokens: Optional[int] = II("dataset.max_tokens")  # noqa: UP045
    valid_subset: str = II("dataset.valid_subset")
    tensorboard_logdir: Optional[str] = II("common.tensorboard_logdir")  # noqa: UP045


@dataclass
class TeacherOptions(TeacherConfig, FairseqDataclass):
    """The options of :class:`TeacherConfig` for fairseq's older tasks, which define their options with argparse."""
