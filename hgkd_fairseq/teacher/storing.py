"""Writes a store: a teacher is run once over data, and what it says of each target token is kept (`hgkd store`)."""

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
TRAIN = "train"  # subsets of this name are of all data folders, with fairseq's train1, ...


@dataclass(frozen=True)
class StoreOptions:
    """What is written."""

    kind: str  # of store.KINDS
    subsets: tuple[str, ...] = ("train", "valid")
    dtype: str = "bf16"  # of hidden states: a key of store.DTYPES
    temperature: float = 1.5
    draws: int = 32  # a token, of the kind sampled
    tokens: int = 8  # the most probable ones that are kept, of the kind topk
    max_tokens: int = 4000  # a batch
    cpu: bool = False
    overrides: str = "{}"  # of the teacher's checkpoint, as --teacher-model-overrides has them
    folds: bool = False  # of N teachers the i-th is asked of the training sentences i, i + N, ... alone; kind gold
    shard_size: int = 4096  # sentences


class Source:
    """The sentences of one part of the store."""

    def __init__(self, part: Part, dataset: Any, keys: np.ndarray, limits: tuple[int, int]):
        self.part, self.dataset, self.keys, self.limits = part, dataset, keys, limits

    def kept(self, index: int) -> bool:
        """Whether the teacher has positions for a sentence."""
        sizes = (self.dataset.src_sizes[index], self.dataset.tgt_sizes[index])
        return all(size <= limit for size, limit in zip(sizes, self.limits, strict=True))


def write(data: str, teacher_path: str, output: str, options: StoreOptions) -> str:
    """Fill the folder `output`; a run that was killed goes on, and several fill it together.

    Args:
        data: folder of fairseq-preprocess, or several with ':' between them.
        teacher_path: fairseq checkpoint, or an ensemble.
        output: folder, new, or begun with the same arguments.
        options: what is written.

    Returns:
        What was written, in a line.

    Raises:
        UserError: data, teacher or folder cannot be used, or there is no room.
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
        "teacher": " ".join(teacher.hashes) if options.folds else teacher.fingerprint,  # of folds their order matters
        "languages": list(languages),
        "dictionaries": [dictionary_hash(task.src_dict), dictionary_hash(task.tgt_dict)],
        "limits": list(limits),
        "heads": {name: hashlib.sha256(content).hexdigest() for name, content in layers.items()},
        "parts": [source.part._asdict() for source in sources],
    }  # fmt: skip
    tokens = sum(int(source.dataset.tgt_sizes.sum()) for source in sources)
    check_room(output, tokens * statistics.bytes_a_token(options, teacher.models, vocabulary), options.kind)
    rows = sum(source.part.sentences for source in sources)
    shards = Shards.create(output, manifest, rows, options.shard_size)
    for name, content in layers.items():
        shards.beside(name, content)
    with tqdm(total=tokens, unit="token", unit_scale=True, disable=not os.isatty(2)) as progress:
        writer = Writer(teacher, shards, sources, options, task, device, progress)
        shards.fill(writer.make)
    size = sum(file.stat().st_size for file in Path(output).rglob("*") if file.is_file())
    biased = "; the gradient of its KL is biased: what is outside of the k tokens is one bucket"
    return (
        f"{output}: kind {options.kind}, {rows} sentences, {tokens} target tokens, {size} bytes, {size / tokens:.1f} a "
        f"token{biased if options.kind == 'topk' else ''}"
    )


def check_folds(options: StoreOptions, teachers: int) -> None:
    """Raises:
    UserError: folds are asked for, and there are none.
    """
    if options.folds and (options.kind != "gold" or teachers < 2):
        raise UserError("--folds needs --kind gold and several teachers in --teacher-path, one for each fold")
    if options.folds and TRAIN not in options.subsets:
        raise UserError(
            f"--folds is of the sentences of {TRAIN}, and --subset {','.join(options.subsets)} lacks it; add it"
        )


def check_fold(path: str, left_out: str | None, wanted: str | None) -> None:
    """Raises:
    UserError: a teacher that is asked of the fold `wanted` (K/N) of the sentences was not trained without it.
    """
    if wanted is not None and left_out != wanted:
        trained = f"with --leave-out-fold {left_out}" if left_out else "without --leave-out-fold"
        raise UserError(
            f"--folds asks {path} of fold {wanted}, and it was trained {trained}; name in --teacher-path the teachers "
            "of --leave-out-fold 1/N, 2/N, ... in this order"
        )


def make_task(data: str, teacher_path: str, overrides: str = "{}") -> TranslationTask:
    """fairseq's own, with the teacher's languages, or those that the data's files have."""
    first = split_paths(teacher_path)[0] if teacher_path else ""
    held = checkpoints.read(first, parse_overrides(overrides)).options("task") if first else {}
    wanted = {name: held.get(name) for name in ("source_lang", "target_lang")}
    binarised.first_shard(data)
    return binarised.translation_task(data, teacher_path, {"upsample_primary": 1, **wanted})


def sources_of(task: TranslationTask, data: str, subsets: tuple[str, ...], limits: tuple[int, int]) -> Iterator[Source]:
    """The data of each subset and folder."""
    first, folders = 0, utils.split_paths(data)
    for name in dict.fromkeys(subsets):
        for folder, path in enumerate(folders if name == TRAIN else folders[:1]):
            task.cfg.data = path
            dataset = binarised.subset(task, name, combine=name == TRAIN, option="--subset")
            keys = np.array([key(dataset.src[i], dataset.tgt[i]) for i in range(len(dataset))], np.uint64)
            part = Part(name, folder, first, len(dataset), hashlib.sha256(keys.tobytes()).hexdigest())
            first += len(dataset)
            source = Source(part, dataset, keys, limits)
            if long := sum(not source.kept(index) for index in range(len(dataset))):
                logger.warning(
                    "%d of %d sentences of %s are longer than the teacher takes and are left out",
                    long,
                    len(dataset),
                    name,
                )
            yield source


def layers_of(teacher: LiveTeacher) -> dict[str, bytes]:
    """The files of the output layers.

    Raises:
        UserError: a model that has none.
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
    """Raises:
    UserError: the disk has no room for what is about to be written.
    """
    there = Path(output).resolve()
    written = sum(file.stat().st_size for file in there.rglob("*.npy")) if there.is_dir() else 0
    if not there.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {there.parent}; make it first")
    free = shutil.disk_usage(there.parent).free
    logger.info("about %s are written, %s are free", amount(needed), amount(free))
    if needed - written > free:
        raise UserError(
            f"--output {output}: about {amount(needed)} of kind {kind} do not fit, {amount(free)} are free; "
            "name another disk, or --kind sampled, which takes least"
        )


class Writer:
    """Makes shards."""

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
        """Write the files of a shard; its sentences."""
        numbers = self.shards.numbers(shard)
        generator = torch.Generator(self.device).manual_seed(shard + 1)  # of draws, whoever makes the shard
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
        """What is said of some sentence, for a shard all of whose sentences are left out.

        Raises:
            UserError: all are.
        """
        for source in self.sources:
            index = next(filter(source.kept, range(len(source.dataset))), None)
            if index is not None:
                return self.ask(source, [index], self.teacher.models, torch.Generator(self.device))[0]
        raise UserError("--teacher-path: the teacher takes no sentence of these data, all of which are longer")

    def asked(self, source: Source, indices: list[int]) -> Iterator[tuple[list, list[int]]]:
        """(models, the sentences that they are asked of)."""
        models = self.teacher.models
        if not self.options.folds or source.part.name != TRAIN:
            yield models, indices
            return
        for fold, model in enumerate(models):
            yield [model], [index for index in indices if index % len(models) == fold]

    def batches(self, source: Source, indices: list[int]) -> Iterator[list[int]]:
        """Of similar length, of at most so many tokens with pads."""
        dataset = source.dataset
        lengths = {i: (int(dataset.tgt_sizes[i]), int(dataset.src_sizes[i])) for i in indices if source.kept(i)}
        order = sorted(lengths, key=lambda i: (lengths[i], i))
        return filled(order, lambda i: max(lengths[i]), self.options.max_tokens)

    @torch.no_grad()
    def ask(
        self, source: Source, indices: list[int], models: list, generator: torch.Generator
    ) -> list[dict[str, np.ndarray]]:
        """What models say of some sentences, in their order."""
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
        cut = {}
        for name, values in rows.items():
            of_tokens = rows.get(statistics.DRAWN.get(name, ""))  # how many a token has of it, where that is not one
            cut[name] = values.split(lengths if of_tokens is None else [int(n.sum()) for n in of_tokens.split(lengths)])
        of_id = {
            int(number): {name: narrow(name, parts[place], self.vocabulary) for name, parts in cut.items()}
            for place, number in enumerate(batch["id"])
        }
        return [of_id[index] for index in indices]


def narrow(name: str, values: Tensor, vocabulary: int) -> np.ndarray:
    """As it is stored."""
    found = bits(values)
    if name == "ids":
        return found.astype(np.uint16 if vocabulary <= 2**16 else np.uint32)
    return found.astype(np.uint8) if name in ("counts", "distinct", "repeated") else found
