"""A live teacher: one or several frozen fairseq models that see every batch the student sees."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Sequence

import numpy as np
import torch
from fairseq.data import Dictionary, LanguagePairDataset, data_utils
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised, checkpoints, features
from hgkd_fairseq.plugin.checkpoints import split_paths
from hgkd_fairseq.plugin.literals import literal
from hgkd_fairseq.teacher.signals import Dense
from hgkd_fairseq.teacher.source import Request, TeacherSource, register_source

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@register_source("checkpoint", help="the checkpoint of --teacher-path, or an ensemble of several")
class LiveTeacher(TeacherSource):
    """Frozen models in eval mode, an ensemble where there are several.

    Args:
        paths: fairseq checkpoints. Architecture and size are free; the dictionaries must be the student's.
        source_dictionary, target_dictionary: the student's.
        dtype: "auto" (the student's), "fp32", "fp16" or "bf16".
        overrides: a dict literal, as fairseq's ``--model-overrides``.
        languages: the student's source and target; None: not known.

    Raises:
        UserError: a file that is missing, refused or no translation model; languages or dictionaries that differ.
    """

    frozen = True

    def __init__(
        self,
        paths: Sequence[str],
        source_dictionary: Dictionary,
        target_dictionary: Dictionary,
        dtype: str = "auto",
        overrides: str = "{}",
        languages: tuple[str | None, str | None] = (None, None),
    ):
        self.paths = list(paths)
        self.dtype = dtype
        given = parse_overrides(overrides)
        self.members = [load_model(path, source_dictionary, target_dictionary, languages, given) for path in self.paths]
        self.hash = fingerprint(self.members)
        for path, model in zip(self.paths, self.members, strict=True):
            logger.info("teacher %s: %s, %d parameters", path, type(model).__name__, count_parameters(model))

    def __repr__(self):
        return f"LiveTeacher({':'.join(self.paths)}, dtype={self.dtype})"

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        options = request.options
        if not options.teacher_path:
            raise UserError(
                "--criterion hard_gate_kd distils from a teacher and there is none: give --teacher-path CHECKPOINT "
                "(fairseq-validate without one: --criterion hard_gate_kd --gate none)"
            )
        if request.state.loaded is None:
            refuse_what_training_writes(options.teacher_path, options.save_dir)
        return cls(
            split_paths(options.teacher_path),
            request.source_dictionary,
            request.target_dictionary,
            dtype=options.teacher_dtype,
            overrides=options.teacher_model_overrides,
            languages=request.languages,
        )

    @property
    def models(self) -> list[torch.nn.Module]:
        return self.members

    @property
    def fingerprint(self) -> str:
        return self.hash

    def check_data(self, split: str, dataset: LanguagePairDataset, limits: tuple[int, int]) -> None:
        for path, model in zip(self.paths, self.members, strict=True):
            for side, sizes, positions, limit in zip(
                ("source", "target"),
                (dataset.src_sizes, dataset.tgt_sizes),
                features.max_positions(model),
                limits,
                strict=True,
            ):
                sizes = np.asarray([] if sizes is None else sizes)
                longest = int(sizes[sizes <= limit].max(initial=0))
                if longest > positions:
                    raise UserError(
                        f"{split} has a {side} sentence of {longest} tokens, and the teacher {path} takes {positions} "
                        f"at most; leave longer ones out with --max-{side}-positions {positions} "
                        "--skip-invalid-size-inputs-valid-test, or name another teacher"
                    )

    @torch.no_grad()
    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Dense:
        return Dense([features.head(model, sample["net_input"]) for model in self.placed(device, dtype)])

    def placed(self, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Module]:
        """The models, where and as the student's are."""
        for model in self.members:
            model.to(device=device, dtype=DTYPES.get(self.dtype, dtype))  # moves on the first batch, then does nothing
        return self.members


def fingerprint(models: Sequence[torch.nn.Module]) -> str:
    """A hash of all weights of some models: the same wherever their files lie, in whichever order."""
    found = []
    for model in models:
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        found.append(digest.hexdigest())
    return " ".join(sorted(found))


def count_parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def parse_overrides(text: str) -> dict:
    try:
        overrides = literal(text)
    except UserError:
        overrides = None
    if not isinstance(overrides, dict) or not all(isinstance(name, str) for name in overrides):
        raise UserError(f"--teacher-model-overrides {text!r} is not a dict; write it as \"{{'data': 'DIR'}}\"")
    return overrides


def load_model(
    path: str,
    source_dictionary: Dictionary,
    target_dictionary: Dictionary,
    languages: tuple[str | None, str | None],
    overrides: dict,
) -> torch.nn.Module:
    """The model of one checkpoint, frozen and in eval mode, on the CPU."""
    if not os.path.exists(path):
        raise UserError(f"--teacher-path names {path}, which does not exist; name a fairseq checkpoint")
    checkpoint = checkpoints.read(path, overrides)
    checkpoints.model_class(checkpoint)
    check_task(path, checkpoint.options("task"), source_dictionary, target_dictionary, languages)
    # The plain task, with no --eval-bleu: building a model through the student's own task would hand its validation
    # the TEACHER to translate with.
    task = TranslationTask(TranslationConfig(), source_dictionary, target_dictionary)
    model = checkpoints.build(checkpoint, task)
    model.eval()
    model.requires_grad_(False)
    return model


def check_task(
    path: str,
    task: dict,
    source_dictionary: Dictionary,
    target_dictionary: Dictionary,
    student: tuple[str | None, str | None],
) -> None:
    """Refuse a teacher of other languages, or of other dictionaries: its token 17 would be another word."""
    folder = (split_paths(str(task.get("data") or "")) or [""])[0]
    languages = (task.get("source_lang"), task.get("target_lang"))
    if None in languages and os.path.isdir(folder):  # the teacher's run left them to fairseq, which reads file names
        languages = tuple(data_utils.infer_language_pair(folder))
    if None not in (*languages, *student) and languages != student:
        raise UserError(
            f"the teacher {path} translates from {languages[0]} to {languages[1]}, the student from {student[0]} to "
            f"{student[1]}; name a teacher of the student's languages, or where only their names differ say so with "
            f"--teacher-model-overrides \"{{'source_lang': '{student[0]}', 'target_lang': '{student[1]}'}}\""
        )
    for side, language, dictionary in zip(
        ("source", "target"), languages, (source_dictionary, target_dictionary), strict=True
    ):
        file = os.path.join(folder, f"dict.{language}.txt")
        if not os.path.isfile(file):
            raise UserError(
                f"the {side} dictionary of the teacher {path}, {file}, does not exist and cannot be compared with "
                "the student's; give its folder with --teacher-model-overrides \"{'data': 'DIR'}\""
            )
        difference = dictionary_difference(binarised.dictionary(file), dictionary)
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


# What fairseq-train writes, replaces or removes in its --save-dir.
WRITTEN = re.compile(r"(checkpoint(\d+|_\d+_\d+|_best|_last|\.best_.+)|crash)(-.+)?\.pt")


def refuse_what_training_writes(teacher_path: str, save_dir: str) -> None:
    """A teacher that lies where the student's checkpoints go, itself or a link to it, would become the student.

    Raises:
        UserError: it names the file.
    """
    folder = os.path.realpath(save_dir)
    for path in split_paths(teacher_path):
        name, seen = path, set()
        while name not in seen:
            seen.add(name)
            if WRITTEN.fullmatch(os.path.basename(name)) and os.path.realpath(os.path.dirname(name) or ".") == folder:
                raise UserError(
                    f"--teacher-path {path} lies in --save-dir {save_dir} under a name that this training writes: it "
                    "would be replaced by the student; give another --save-dir, or move the teacher"
                )
            if os.path.islink(name):
                name = os.path.join(os.path.dirname(name), os.readlink(name))
