"""The live teacher: one or several frozen fairseq models that run on every batch of the student."""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Mapping, Sequence

import torch
from fairseq.data import Dictionary, FairseqDataset
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Head
from hgkd_fairseq.plugin import checkpoints, features
from hgkd_fairseq.plugin.checkpoints import split_paths
from hgkd_fairseq.plugin.literals import literal
from hgkd_fairseq.teacher import dictionaries, inputs
from hgkd_fairseq.teacher.dictionaries import Selection
from hgkd_fairseq.teacher.signals import Dense
from hgkd_fairseq.teacher.source import Request, TeacherSource, register_source
from hgkd_fairseq.teacher.store import DTYPES

logger = logging.getLogger(__name__)


@register_source("checkpoint", help="the checkpoint of --teacher-path, or an ensemble of several")
class LiveTeacher(TeacherSource):
    """Teacher from checkpoints: one or several frozen models in eval mode. Several models form an ensemble, whose
    distribution is the mean of the members' distributions.

    Args:
        paths: fairseq checkpoints of translation models, of any architecture and size. Their dictionaries must contain
            all symbols of the student's.
        source_dictionary, target_dictionary: the student's dictionaries.
        dtype: precision of the models: "auto" (the student's), "fp32", "fp16" or "bf16".
        overrides: dict literal of options that replace those in the checkpoints, as fairseq's ``--model-overrides``.
        languages: the student's source and target language; None: unknown.
        added: what :func:`inputs.added` returns for the student's task; None: the task adds no tokens to sentences.
        pairs: for a student of several language pairs, the pairs that each checkpoint teaches, by path.

    Raises:
        UserError: a checkpoint does not exist, cannot be used or is not a translation model; its languages,
            dictionaries or added tokens do not fit the student's; it was not trained on a language pair that it
            teaches.
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
        added: dict | None = None,
        pairs: Mapping[str, Sequence[str]] | None = None,
    ):
        self.paths = list(paths)
        self.dtype = dtype
        given = parse_overrides(overrides)
        self.members, self.selections = [], {}
        for path in self.paths:
            taught = (pairs or {}).get(path, ())
            model, selection = load_model(
                path, source_dictionary, target_dictionary, languages, given, added or {}, taught
            )
            self.members.append(model)
            self.selections[model] = selection
        selected = [self.selections[model].fingerprint for model in self.members]
        self.reindexed = any(selected)
        self.hashes = hashes(self.members, selected)
        self.hash = " ".join(sorted(self.hashes))
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
        from hgkd_fairseq.teacher.per_pair import TeacherOfEachPair, paths  # here, because that module imports this one

        of_pairs = paths(options.teacher_path, request.pairs)
        files = of_pairs or split_paths(options.teacher_path)
        if request.state.loaded is None:
            for file in files:
                refuse_what_training_writes(file, options.save_dir)
        taught: dict[str, list[str]] = {}
        for file, pair in (
            zip(of_pairs, request.pairs, strict=True) if of_pairs else itertools.product(files, request.pairs)
        ):
            taught.setdefault(file, []).append(pair)
        return (TeacherOfEachPair if of_pairs else cls)(
            files,
            request.source_dictionary,
            request.target_dictionary,
            dtype=options.teacher_dtype,
            overrides=options.teacher_model_overrides,
            languages=request.languages,
            added=inputs.added(request.options),
            pairs=taught,
        )

    @property
    def models(self) -> list[torch.nn.Module]:
        return self.members

    @property
    def fingerprint(self) -> str:
        return self.hash

    def check_data(self, split: str, dataset: FairseqDataset, limits: tuple[int, int]) -> None:
        for path, model in zip(self.paths, self.members, strict=True):
            positions = features.max_positions(model)
            inputs.check_lengths(split, dataset, positions, limits, f"the teacher {path}", "name another teacher")

    @torch.no_grad()
    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Dense:
        members = self.placed(device, dtype)
        heads, whole = zip(*[self.heads(model, sample["net_input"]) for model in members], strict=True)
        larger = any(one.vocabulary != its.vocabulary for one, its in zip(heads, whole, strict=True))
        return Dense([*heads], whole=whole if larger else ())

    def placed(self, device: torch.device, dtype: torch.dtype) -> list[torch.nn.Module]:
        """Return the models, moved to `device` and converted to the option's dtype, or to `dtype` for "auto"."""
        for model in self.members:
            model.to(device=device, dtype=DTYPES.get(self.dtype, dtype))  # does nothing after the first batch
        return self.members

    def heads(self, model: torch.nn.Module, net_input: dict) -> tuple[Head, Head]:
        """Run a member on a batch.

        Args:
            model: one of :attr:`models`.
            net_input: the ``net_input`` of a fairseq batch, with the student's token ids.

        Returns:
            Two heads, over the student's V symbols and over all symbols of the member. Their `hidden` is (B, T, D), or
            log-probabilities (B, T, V) for a member without a linear output layer.
        """
        selection = self.selections[model]
        whole = features.head(model, selection.inputs(net_input))
        return selection.head(whole), whole

    def output_layer(self, model: torch.nn.Module) -> Head | None:
        """Return a member's linear output layer, restricted to the student's V symbols.

        The weight of the returned head is (V, D), and its `hidden` (0, D) is empty; None if the member has no linear
        output layer.
        """
        layer = features.linear_output(model)
        if layer is None:
            return None
        return self.selections[model].head(Head(layer.weight[:0], layer.weight, layer.bias))


def hashes(models: Sequence[torch.nn.Module], selections: Sequence[str]) -> list[str]:
    """Return for each model the SHA-256 of its parameters and buffers, which does not depend on the file's name.

    If the student's dictionaries differ from the model's, "-" and the fingerprint of its :class:`Selection` follow.
    """
    found = []
    for model, selected in zip(models, selections, strict=True):
        digest = hashlib.sha256()
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        found.append(f"{digest.hexdigest()}-{selected}" if selected else digest.hexdigest())
    return found


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
    added: dict,
    pairs: Sequence[str],
) -> tuple[torch.nn.Module, Selection]:
    """Load the model of a checkpoint, frozen and in eval mode, on the CPU.

    Args:
        path: fairseq checkpoint.
        source_dictionary, target_dictionary, languages, added: as of :class:`LiveTeacher`.
        overrides: options that replace those in the checkpoint.
        pairs: language pairs that the model teaches; empty: those of `languages`, for a multilingual model.

    Returns:
        The model, and the mapping between its dictionaries and the student's.

    Raises:
        UserError: as of :class:`LiveTeacher`.
    """
    if not os.path.exists(path):
        raise UserError(f"--teacher-path names {path}, which does not exist; name a fairseq checkpoint")
    checkpoint = checkpoints.read(path, overrides)
    checkpoints.model_class(checkpoint)
    task_options = checkpoint.options("task")
    inputs.check_added(path, task_options, added)
    if not pairs and None not in languages and inputs.kind(task_options) == inputs.MULTILINGUAL:
        pairs = [f"{languages[0]}-{languages[1]}"]
    inputs.check_pairs(f"the teacher {path}", task_options, pairs)
    students = (source_dictionary, target_dictionary)
    own = own_dictionaries(path, task_options, students, languages)
    # A plain task without --eval-bleu, because a task keeps a generator of the last model that it has built: with the
    # student's own task, validation would translate with the teacher.
    task = TranslationTask(TranslationConfig(), *own)
    model = checkpoints.build(checkpoint, task)
    model.eval()
    model.requires_grad_(False)
    return model, Selection(*[dictionaries.ids(*pair) for pair in zip(own, students, strict=True)])


def own_dictionaries(
    path: str,
    task: dict,
    students: tuple[Dictionary, Dictionary],
    languages: tuple[str | None, str | None],
) -> tuple[Dictionary, Dictionary]:
    """Load a teacher's source and target dictionary, and check that its languages and symbols fit the student's.

    Args:
        path: the teacher's checkpoint, for the error message.
        task: options of the teacher's task.
        students: the student's source and target dictionary.
        languages: the student's source and target language; None: unknown.

    Raises:
        UserError: the languages differ, a dictionary cannot be read, or lacks a symbol of the student's.
    """
    own = inputs.pair_of(task)
    if None not in (*own, *languages) and own != languages and inputs.kind(task) != inputs.MULTILINGUAL:
        raise UserError(
            f"the teacher {path} translates from {own[0]} to {own[1]}, the student from {languages[0]} to "
            f"{languages[1]}; name a teacher of the student's languages, or where only their names differ say so with "
            f"--teacher-model-overrides \"{{'source_lang': '{languages[0]}', 'target_lang': '{languages[1]}'}}\""
        )
    found = []
    for side, dictionary in zip(("source", "target"), students, strict=True):
        found.append(inputs.dictionary(path, task, side))
        difference = dictionaries.difference(found[-1], dictionary)
        if difference:
            raise UserError(
                f"the {side} dictionaries of the teacher {path} and of the student differ: {difference}; "
                "preprocess the student's data with the teacher's dictionaries, or with some of their lines "
                "(fairseq-preprocess --srcdict --tgtdict)"
            )
    return found[0], found[1]


# Names of the files that fairseq-train writes, replaces or removes in its --save-dir.
WRITTEN = re.compile(r"(checkpoint(\d+|_\d+_\d+|_best|_last|\.best_.+)|crash)(-.+)?\.pt")


def refuse_what_training_writes(teacher_path: str, save_dir: str) -> None:
    """Refuse a teacher that the student's checkpoints would overwrite, directly or through a symbolic link.

    Args:
        teacher_path: a checkpoint, or several separated by ':'.
        save_dir: folder that the student's checkpoints are written to.

    Raises:
        UserError: a checkpoint, or a link on the way to it, is in `save_dir` under a name that the training writes.
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
