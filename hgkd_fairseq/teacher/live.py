"""A live teacher: one or several frozen fairseq models that see every batch the student sees."""

from __future__ import annotations

import ast
import logging
import os
from argparse import Namespace
from collections.abc import Sequence

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary, data_utils
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq import binarised, features
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class LiveTeacher:
    """Frozen models in eval mode, an ensemble where there are several.

    Args:
        paths: fairseq checkpoints. Architecture and size are free; the dictionaries must be the student's.
        source_dictionary, target_dictionary: the student's.
        dtype: "auto" (the student's), "fp32", "fp16" or "bf16".
        overrides: a dict literal, as fairseq's ``--model-overrides``.

    Raises:
        UserError: a file that is missing, refused or no translation model; dictionaries that differ.
    """

    ready = True

    def __init__(
        self,
        paths: Sequence[str],
        source_dictionary: Dictionary,
        target_dictionary: Dictionary,
        dtype: str = "auto",
        overrides: str = "{}",
    ):
        self.paths = list(paths)
        self.dtype = dtype
        self.models = [
            load_model(path, source_dictionary, target_dictionary, parse_overrides(overrides)) for path in self.paths
        ]
        for path, model in zip(self.paths, self.models, strict=True):
            logger.info("teacher %s: %s, %d parameters", path, type(model).__name__, count_parameters(model))

    def __repr__(self):
        return f"LiveTeacher({':'.join(self.paths)}, dtype={self.dtype})"

    @torch.no_grad()
    def heads(self, sample: dict, device: torch.device, dtype: torch.dtype) -> list[Head]:
        for model in self.models:
            model.to(device=device, dtype=DTYPES.get(self.dtype, dtype))  # moves on the first batch, then does nothing
        return [features.head(model, sample["net_input"]) for model in self.models]


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parse_overrides(text: str) -> dict:
    try:
        overrides = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        overrides = None
    if not isinstance(overrides, dict):
        raise UserError(f"--teacher-model-overrides {text!r} is not a dict; write it as \"{{'data': 'DIR'}}\"")
    return overrides


def load_model(
    path: str, source_dictionary: Dictionary, target_dictionary: Dictionary, overrides: dict
) -> torch.nn.Module:
    """The model of one checkpoint, frozen and in eval mode, on the CPU."""
    if not os.path.exists(path):
        raise UserError(f"--teacher-path names {path}, which does not exist; name a fairseq checkpoint")
    state = checkpoint_utils.load_checkpoint_to_cpu(path, dict(overrides))
    cfg = state.get("cfg")
    if cfg is None and isinstance(state.get("args"), Namespace):
        cfg = convert_namespace_to_omegaconf(state["args"])
    if cfg is None or "model" not in state:
        raise UserError(f"--teacher-path names {path}, which is no fairseq model; name a checkpoint of fairseq-train")
    check_dictionaries(path, cfg.task, source_dictionary, target_dictionary)
    # The plain task, with no --eval-bleu: building a model through the student's own task would hand its validation
    # the TEACHER to translate with.
    task = TranslationTask(TranslationConfig(), source_dictionary, target_dictionary)
    try:
        model = task.build_model(cfg.model, from_checkpoint=True)
        model.load_state_dict(state["model"], strict=True, model_cfg=cfg.model)
    except RuntimeError as error:
        raise UserError(
            f"the weights in --teacher-path {path} do not fit its own architecture with the student's dictionaries: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    model.eval()
    model.requires_grad_(False)
    return model


def check_dictionaries(path: str, task, source_dictionary: Dictionary, target_dictionary: Dictionary) -> None:
    """Refuse a teacher whose dictionaries differ from the student's: its token 17 would be another word."""
    folder = str(getattr(task, "data", "") or "").split(os.pathsep)[0]
    languages = (task.get("source_lang"), task.get("target_lang"))
    if None in languages and os.path.isdir(folder):  # the teacher's run left them to fairseq, which reads file names
        languages = data_utils.infer_language_pair(folder)
    for side, language, student in zip(
        ("source", "target"), languages, (source_dictionary, target_dictionary), strict=True
    ):
        file = os.path.join(folder, f"dict.{language}.txt")
        if not os.path.exists(file):
            raise UserError(
                f"the {side} dictionary of the teacher {path}, {file}, does not exist and cannot be compared with "
                "the student's; give its folder with --teacher-model-overrides \"{'data': 'DIR'}\""
            )
        difference = dictionary_difference(binarised.dictionary(file), student)
        if difference:
            raise UserError(
                f"the {side} dictionaries of the teacher {path} and of the student differ: {difference}; "
                "preprocess the student's data with the teacher's dictionaries (fairseq-preprocess --srcdict --tgtdict)"
            )


def dictionary_difference(teacher: Dictionary, student: Dictionary) -> str | None:
    """What differs first, sizes, then symbols, then special ids; None where nothing does."""
    if len(teacher) != len(student):
        return f"the teacher's has {len(teacher)} types, the student's {len(student)}"
    for index, (theirs, ours) in enumerate(zip(teacher.symbols, student.symbols, strict=True)):
        if theirs != ours:
            return f"type {index} is {theirs!r} for the teacher and {ours!r} for the student"
    for name in ("bos", "pad", "eos", "unk"):
        theirs, ours = getattr(teacher, name)(), getattr(student, name)()
        if theirs != ours:
            return f"{name} is {theirs} for the teacher and {ours} for the student"
    return None
