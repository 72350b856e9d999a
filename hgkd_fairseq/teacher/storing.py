"""The command ``hgkd store``: runs a teacher once over data and writes its output for each target token to a store."""

from __future__ import annotations

import hashlib
import io
import logging
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq import utils
from fairseq.tasks.translation import TranslationTask
from torch import Tensor
from tqdm import tqdm

import hgkd_fairseq
from hgkd_fairseq import files
from hgkd_fairseq.data.batches import filled
from hgkd_fairseq.data.shards import Shards
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.plugin import binarised, checkpoints, features
from hgkd_fairseq.plugin.checkpoints import split_paths
from hgkd_fairseq.teacher import inputs, statistics
from hgkd_fairseq.teacher.live import LiveTeacher, parse_overrides
from hgkd_fairseq.teacher.store import FORMAT, Part, bits, ends, key, save
from hgkd_fairseq.teacher.stored import dictionary_hash

logger = logging.getLogger(__name__)

NO_TOKENS = (
    "a store has the sentences of one language pair without them; distil from the teacher itself (--teacher-path)"
)
TRAIN = "train"  # this subset is read from all data folders, together with fairseq's train1, ...


@dataclass(frozen=True)
class StoreOptions:
    """Options of a store and of the run that writes it."""

    kind: str  # one of store.KINDS
    subsets: tuple[str, ...] = ("train", "valid")
    dtype: str = "bf16"  # data type of the hidden states, kind "hidden": a key of store.DTYPES
    temperature: float = 1.5  # temperature of all that is stored, except log q at temperature 1 and hidden states
    draws: int = 32  # draws per token, kind "sampled"; at most 255
    tokens: int = 8  # most probable tokens to store per target token, kind "topk"
    max_tokens: int = 4000  # per batch, including padding
    cpu: bool = False  # whether to run on the CPU although there is a GPU
    overrides: str = "{}"  # dict literal of options that replace those in the teacher's checkpoint
    folds: bool = False  # whether the K-th of N teachers runs only on the K-th fold of the training set; kind "gold"
    shard_size: int = 4096  # sentences per shard


class Source:
    """The data of one part of a store.

    Args:
        part: description of the part.
        dataset: its sentences, a fairseq LanguagePairDataset.
        keys: (S,) uint64, `store.key` of each sentence.
        limits: longest source and longest target that the teacher accepts, in tokens.
    """

    def __init__(self, part: Part, dataset: Any, keys: np.ndarray, limits: tuple[int, int]):
        self.part, self.dataset, self.keys = part, dataset, keys
        # (S,) bool: whether a sentence is short enough for the teacher
        self.kept = (dataset.src_sizes <= limits[0]) & (dataset.tgt_sizes <= limits[1])


def write(data: str, teacher_path: str, output: str, options: StoreOptions) -> str:
    """Run a teacher over data and write its output to a store.

    A run that was killed is continued by calling the function again with the same arguments, and several processes may
    write the same store at the same time.

    Args:
        data: folder that fairseq-preprocess wrote, or several separated by ':'.
        teacher_path: fairseq checkpoint, or several separated by ':': an ensemble, or with `options.folds` one per
            fold.
        output: folder of the store; new, or started with the same arguments.
        options: options of the store.

    Returns:
        A summary in one line.

    Raises:
        UserError: the data, the teacher, the options or the folder cannot be used, or the disk is too small.
    """
    paths = split_paths(teacher_path)
    check_folds(options, len(paths))
    for place, path in enumerate(paths, 1):
        trained = checkpoints.read(path, model=False).options("task")
        inputs.refuse_language_tokens(path, trained, NO_TOKENS)
        check_fold(path, trained.get("leave_out_fold"), f"{place}/{len(paths)}" if options.folds else None)
    task = make_task(data, teacher_path, options.overrides)
    languages = (task.cfg.source_lang, task.cfg.target_lang)
    teacher = LiveTeacher(paths, task.src_dict, task.tgt_dict, overrides=options.overrides, languages=languages)
    device = torch.device("cuda" if torch.cuda.is_available() and not options.cpu else "cpu")
    for model in teacher.models:
        model.to(device)
    members = [features.max_positions(model) for model in teacher.models]
    limits = (min(source for source, _ in members), min(target for _, target in members))
    vocabulary = len(task.tgt_dict)
    if options.kind == "topk" and options.tokens >= vocabulary:
        raise UserError(f"--k {options.tokens} is no part of a vocabulary of {vocabulary}; give fewer")
    sources = list(sources_of(task, data, options.subsets, limits))
    layers = layers_of(teacher) if options.kind == "hidden" else {}
    manifest = {
        "format": FORMAT, "version": hgkd_fairseq.__version__, "torch": torch.__version__,
        "kind": options.kind, "dtype": options.dtype if options.kind == "hidden" else "fp32",
        "temperature": options.temperature, "draws": options.draws if options.kind == "sampled" else 0,
        "k": options.tokens if options.kind == "topk" else 0, "vocabulary": vocabulary,
        "folds": len(paths) if options.folds else 0,
        "max_tokens": options.max_tokens, "members": len(teacher.models),
        "teacher": " ".join(teacher.hashes) if options.folds else teacher.fingerprint,  # the order of folds matters
        "languages": list(languages),
        "dictionaries": [dictionary_hash(task.src_dict), dictionary_hash(task.tgt_dict)],
        "limits": list(limits),
        "heads": {name: hashlib.sha256(content).hexdigest() for name, content in layers.items()},
        "parts": [source.part._asdict() for source in sources],
    }  # fmt: skip
    tokens = sum(int(source.dataset.tgt_sizes[source.kept].sum()) for source in sources)
    check_room(output, tokens * statistics.bytes_a_token(options, teacher.models, vocabulary), options.kind)
    rows = sum(source.part.sentences for source in sources)
    shards = Shards.create(output, manifest, rows, options.shard_size)
    for name, content in layers.items():
        shards.beside(name, content)
    with tqdm(total=tokens, unit="token", unit_scale=True, disable=not os.isatty(2)) as progress:
        writer = Writer(teacher, shards, sources, options, task, device, progress)
        shards.fill(writer.make)
    sentences = sum(int(source.kept.sum()) for source in sources)
    size = files.size_of(output)
    biased = "; the gradient of its KL is biased: what is outside of the k tokens is one bucket"
    return (
        f"{output}: kind {options.kind}, {sentences} sentences, {tokens} target tokens, {size} bytes, "
        f"{size / tokens:.1f} a token{biased if options.kind == 'topk' else ''}"
    )


def check_folds(options: StoreOptions, teachers: int) -> None:
    """Check the options of a store with folds.

    Args:
        options: options of the store.
        teachers: number of teachers.

    Raises:
        UserError: `options.folds` is set with another kind than "gold", with one teacher or without the subset "train".
    """
    if options.folds and (options.kind != "gold" or teachers < 2):
        raise UserError("--folds needs --kind gold and several teachers in --teacher-path, one for each fold")
    if options.folds and TRAIN not in options.subsets:
        raise UserError(
            f"--folds is of the sentences of {TRAIN}, and --subset {','.join(options.subsets)} lacks it; add it"
        )


def check_fold(path: str, left_out: str | None, wanted: str | None) -> None:
    """Check that a teacher was trained without the fold that it runs on.

    Args:
        path: the teacher's checkpoint, for the error message.
        left_out: value of --leave-out-fold in the teacher's training; None: not given.
        wanted: fold that the teacher runs on, as K/N; None: no folds.

    Raises:
        UserError: `wanted` is given, and `left_out` differs from it.
    """
    if wanted is not None and left_out != wanted:
        trained = f"with --leave-out-fold {left_out}" if left_out else "without --leave-out-fold"
        raise UserError(
            f"--folds asks {path} of fold {wanted}, and it was trained {trained}; name in --teacher-path the teachers "
            "of --leave-out-fold 1/N, 2/N, ... in this order"
        )


def make_task(data: str, teacher_path: str, overrides: str = "{}") -> TranslationTask:
    """Create fairseq's translation task on the data, with the languages of the (first) teacher.

    If the teacher's checkpoint does not name them, fairseq infers the languages from the names of the data files.

    Args:
        data: folder that fairseq-preprocess wrote, or several separated by ':'.
        teacher_path: fairseq checkpoint, or several separated by ':'.
        overrides: dict literal of options that replace those in the checkpoint.

    Raises:
        UserError: the checkpoint or the data cannot be used.
    """
    first = split_paths(teacher_path)[0] if teacher_path else ""
    held = checkpoints.read(first, parse_overrides(overrides)).options("task") if first else {}
    wanted = {name: held.get(name) for name in ("source_lang", "target_lang")}
    binarised.first_shard(data)
    return binarised.translation_task(data, teacher_path, {"upsample_primary": 1, **wanted})


def sources_of(task: TranslationTask, data: str, subsets: tuple[str, ...], limits: tuple[int, int]) -> Iterator[Source]:
    """Load the data of each subset and folder, and yield them as the parts of a store.

    Args:
        task: task on the data; its option `data` is set to each folder in turn.
        data: folder that fairseq-preprocess wrote, or several separated by ':'.
        subsets: names of the subsets.
        limits: longest source and longest target that the teacher accepts, in tokens; a warning reports longer ones.

    Raises:
        UserError: a subset does not exist or cannot be used.
    """
    first, folders = 0, utils.split_paths(data)
    for name in dict.fromkeys(subsets):
        for folder, path in enumerate(folders if name == TRAIN else folders[:1]):
            task.cfg.data = path
            dataset = binarised.subset(task, name, combine=name == TRAIN, option="--subset")
            keys = np.array([key(dataset.src[i], dataset.tgt[i]) for i in range(len(dataset))], np.uint64)
            part = Part(name, folder, first, len(dataset), hashlib.sha256(keys.tobytes()).hexdigest())
            first += len(dataset)
            source = Source(part, dataset, keys, limits)
            if long := int((~source.kept).sum()):
                logger.warning(
                    "%d of %d sentences of %s are longer than the teacher takes and are left out",
                    long,
                    len(dataset),
                    name,
                )
            yield source


def layers_of(teacher: LiveTeacher) -> dict[str, bytes]:
    """Return the content of the files with the output layers of a teacher's members (.npy, fp32), by file name.

    Raises:
        UserError: a model has no linear output layer.
    """
    found = {}
    for member, model in enumerate(teacher.models):
        output = teacher.output_layer(model)
        if output is None:
            raise UserError(f"--kind hidden needs a teacher with a linear output layer, and {type(model).__name__} has "
                            "none; use sampled or topk")  # fmt: skip
        for name, tensor in (("weight", output.weight), ("bias", output.bias)):
            if tensor is not None:
                stream = io.BytesIO()
                np.save(stream, tensor.detach().float().cpu().numpy(), allow_pickle=False)
                found[f"member-{member}.{name}.npy"] = stream.getvalue()
    return found


def amount(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def check_room(output: str, needed: float, kind: str) -> None:
    """Check before writing a store that the disk has enough free space.

    Args:
        output: folder of the store; arrays that it already contains are subtracted from `needed`.
        needed: approximate size of the whole store, in bytes.
        kind: kind of the store, for the error message.

    Raises:
        UserError: the free space is too small, or the parent folder does not exist.
    """
    there = Path(output).resolve()
    written = files.size_of(there, ".npy")
    if not there.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {there.parent}; make it first")
    free = shutil.disk_usage(there if there.is_dir() else there.parent).free
    logger.info("about %s are written, %s are free", amount(needed), amount(free))
    if needed - written > free:
        raise UserError(
            f"--output {output}: about {amount(needed)} of kind {kind} do not fit, {amount(free)} are free; "
            f"name another disk{SMALLER.get(kind, '')}"
        )


# What needs less space than a store of a kind, for the error message above.
SMALLER = {"hidden": ", or --kind sampled", "sampled": ", or fewer --draws", "topk": ", or a smaller --k"}


class Writer:
    """Writes the shards of a store; :meth:`make` is the function that :meth:`Shards.fill` calls."""

    def __init__(
        self,
        teacher: LiveTeacher,
        shards: Shards,
        sources: list[Source],
        options: StoreOptions,
        task: TranslationTask,
        device: torch.device,
        progress: Any,
    ):
        self.teacher, self.shards, self.sources, self.options = teacher, shards, sources, options
        self.pad, self.vocabulary, self.device, self.progress = (
            task.tgt_dict.pad(),
            len(task.tgt_dict),
            device,
            progress,
        )

    def make(self, shard: int, folder: Path) -> int:
        """Write the arrays of a shard to a folder, and return the number of its sentences."""
        numbers = self.shards.numbers(shard)
        generator = torch.Generator(self.device).manual_seed(shard + 1)  # independent of the process
        found: dict[int, dict[str, np.ndarray]] = {}
        keys = []
        for source in self.sources:
            first = source.part.first
            inside = range(max(numbers.start, first), min(numbers.stop, first + source.part.sentences))
            keys.append(source.keys[inside.start - first : inside.stop - first] if inside else source.keys[:0])
            for models, asked in self.asked(source, [number - first for number in inside]):
                for some in self.batches(source, asked):
                    for index, arrays in zip(some, self.ask(source, some, models, generator), strict=True):
                        found[first + index] = arrays
                        self.progress.update(len(arrays["gold"]))
        empty = {name: values[:0] for name, values in (next(iter(found.values()), None) or self.any_one()).items()}
        rows = [found.get(number, empty) for number in numbers]
        save(folder, "keys", np.concatenate(keys))
        save(folder, "offsets", ends([len(one["gold"]) for one in rows]))
        for name in empty:
            save(folder, name, np.concatenate([one[name] for one in rows]))
            if self.options.kind == "sampled" and name in statistics.DRAWN:
                save(folder, f"{name}_offsets", ends([len(one[name]) for one in rows]))
        return len(numbers)

    def any_one(self) -> dict[str, np.ndarray]:
        """Run the teacher on an arbitrary sentence, and return its arrays.

        A shard without any sentence that is short enough takes the names, widths and dtypes of its arrays from them.

        Raises:
            UserError: all sentences of the data are too long for the teacher.
        """
        for source in self.sources:
            if source.kept.any():
                generator = torch.Generator(self.device)
                return self.ask(source, [int(source.kept.argmax())], self.teacher.models, generator)[0]
        raise UserError("--teacher-path: the teacher takes no sentence of these data, all of which are longer")

    def asked(self, source: Source, indices: list[int]) -> Iterator[tuple[list, list[int]]]:
        """Yield pairs of models and the indices of the sentences that they run on; with folds, one pair per fold."""
        models = self.teacher.models
        if not self.options.folds or source.part.name != TRAIN:
            yield models, indices
            return
        for fold, model in enumerate(models):
            yield [model], [index for index in indices if index % len(models) == fold]

    def batches(self, source: Source, indices: list[int]) -> Iterator[list[int]]:
        """Yield batches of indices: sentences of similar length, at most `max_tokens` tokens including padding.

        Sentences that are too long for the teacher are left out.
        """
        dataset = source.dataset
        lengths = {i: (int(dataset.tgt_sizes[i]), int(dataset.src_sizes[i])) for i in indices if source.kept[i]}
        order = sorted(lengths, key=lambda i: (lengths[i], i))
        return filled(order, lambda i: max(lengths[i]), self.options.max_tokens)

    @torch.no_grad()
    def ask(
        self, source: Source, indices: list[int], models: list, generator: torch.Generator
    ) -> list[dict[str, np.ndarray]]:
        """Run models on a batch of sentences, and return the arrays of each sentence, in the order of `indices`.

        Raises:
            UserError: a statistic of a target token is not finite, or a hidden state exceeds the range of --dtype.
        """
        batch = source.dataset.collater([source.dataset[index] for index in indices])
        batch = utils.move_to_cuda(batch) if self.device.type == "cuda" else batch
        kept: Tensor = batch["target"] != self.pad
        heads = [self.teacher.heads(model, batch["net_input"])[0] for model in models]
        heads = [head._replace(hidden=head.hidden[kept]) for head in heads]  # (N, D)
        rows = statistics.of_rows(heads, batch["target"][kept], self.options, generator)
        lengths = kept.sum(1).tolist()
        if not bool(torch.isfinite(rows["gold"]).all()):
            raise UserError(
                f"the teacher gives probabilities that are NaN or 0 to targets of {source.part.name}; its training has "
                "diverged: name an earlier checkpoint"
            )
        if not all(bool(torch.isfinite(values).all()) for name, values in rows.items() if name.startswith("hidden")):
            raise UserError(
                f"--dtype {self.options.dtype}: hidden states of the teacher exceed its range; give bf16 or fp32"
            )
        cut = {}
        for name, values in rows.items():
            of_tokens = rows.get(statistics.DRAWN.get(name, ""))  # number of values per token; None: one
            cut[name] = values.split(lengths if of_tokens is None else [int(n.sum()) for n in of_tokens.split(lengths)])
        of_id = {
            int(number): {name: narrow(name, parts[place], self.vocabulary) for name, parts in cut.items()}
            for place, number in enumerate(batch["id"])
        }
        return [of_id[index] for index in indices]


def narrow(name: str, values: Tensor, vocabulary: int) -> np.ndarray:
    """Convert the values of an array to the numpy dtype in which a store holds them."""
    found = bits(values)
    if name == "ids":
        return found.astype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    return found.astype(np.uint8) if name in ("counts", "distinct", "repeated") else found
