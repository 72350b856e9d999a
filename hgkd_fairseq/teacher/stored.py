"""The stored teacher: reads a teacher's output from a store, in the workers of the data loader, and runs no model."""

from __future__ import annotations

import bisect
import functools
import hashlib
from collections.abc import Callable
from typing import Any

import torch
from fairseq.data import ConcatDataset, Dictionary, LanguagePairDataset
from torch import Tensor

from hgkd_fairseq import loss
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.gates import GATES
from hgkd_fairseq.loss import Head
from hgkd_fairseq.plugin.config import given_temperature
from hgkd_fairseq.teacher import inputs
from hgkd_fairseq.teacher.signals import Dense, Gold, Signal, Sparse
from hgkd_fairseq.teacher.source import Request, TeacherSource, register_source
from hgkd_fairseq.teacher.store import DTYPES, Part, Store, key

BATCH = "stored_teacher"  # key in a fairseq batch


def dictionary_hash(dictionary: Dictionary) -> str:
    """Return the SHA-256 of a dictionary's symbols, in order, and of the ids of its special symbols, in hexadecimal."""
    special = [getattr(dictionary, name)() for name in ("bos", "pad", "eos", "unk")]
    return hashlib.sha256("\n".join([*map(str, special), *dictionary.symbols]).encode()).hexdigest()


@register_source("store", help="what --teacher-store holds of a teacher")
class StoredTeacher(TeacherSource):
    """Teacher whose output is read from a store.

    It is `frozen` only with the kind "hidden", which has the whole distribution; the other kinds have a part of it, at
    one temperature.

    Args:
        folder: folder that `hgkd store` wrote.
        source_dictionary, target_dictionary: the student's dictionaries.
        dtype: data type of the hidden states and output layers: "auto" (the student's), "fp32", "fp16" or "bf16".
        languages: the student's source and target language; None: unknown.
        name: key under which the stored output is added to a batch.
        option: command-line option that names the folder, for error messages.

    Raises:
        UserError: the store is damaged, not finished, or has other languages or dictionaries.
    """

    def __init__(
        self,
        folder: str,
        source_dictionary: Dictionary,
        target_dictionary: Dictionary,
        dtype: str = "auto",
        languages: tuple[str | None, str | None] = (None, None),
        name: str = BATCH,
        option: str = "--teacher-store",
    ):
        self.store = Store(folder, option)
        self.folder, self.dtype, self.of_batch = folder, dtype, name
        found = self.store.manifest
        if None not in languages and found["languages"] != list(languages):
            raise UserError(
                f"{self.store.named} is of the languages {'-'.join(found['languages'])}, the student of "
                f"{'-'.join(map(str, languages))}; name a store of the student's"
            )
        for side, mine, theirs in zip(
            ("source", "target"), (source_dictionary, target_dictionary), found["dictionaries"], strict=True
        ):
            if dictionary_hash(mine) != theirs:
                raise UserError(
                    f"{self.store.named} was written with another {side} dictionary than the data's; write it "
                    "from these data with hgkd store"
                )
        self.pad = target_dictionary.pad()
        self.frozen = hidden = self.store.kind == "hidden"
        self.layers = [self.store.head(member) for member in range(found["members"])] if hidden else []

    def __repr__(self):
        return f"StoredTeacher({self.folder}, kind={self.store.kind}, dtype={self.dtype})"

    @classmethod
    def make(cls, request: Request) -> TeacherSource:
        options = request.options
        if not options.teacher_store:
            raise UserError("--teacher-source store needs --teacher-store STORE, which hgkd store writes")
        if options.teacher_model_overrides != "{}":
            raise UserError("--teacher-model-overrides is for a checkpoint, and --teacher-store needs none; drop it")
        made = cls(
            options.teacher_store,
            request.source_dictionary,
            request.target_dictionary,
            options.teacher_dtype,
            request.languages,
        )
        if made.store.kind == "gold":
            raise UserError(
                f"{made.store.named} holds the gold tokens' probabilities alone: give it in --gauge-store, "
                "beside a teacher"
            )
        return made

    @property
    def fingerprint(self) -> str:
        """The live teacher's fingerprint; for kinds other than "hidden", with the kind and the number of draws or k."""
        found = self.store.manifest
        if self.store.kind == "hidden":
            return found["teacher"]
        kept = found["draws"] or found.get("k", 0)
        return f"{found['teacher']} {self.store.kind} {kept}".removesuffix(" 0")

    def check_options(self, cfg: Any) -> None:
        if self.store.kind == "hidden":
            return
        store = f"{self.store.named} of the kind {self.store.kind}"
        tau = self.store.temperature
        if given_temperature(cfg) != tau or cfg.teacher_temperature_start is not None:
            raise UserError(
                f"{store} holds the teacher at temperature {tau:g} alone: give --teacher-temperature {tau:g}, or write "
                "a store with another one with hgkd store --teacher-temperature"
            )
        for option, given, needed in (
            ("--gate-on", cfg.gate_on, "gold"),
            ("--divergence", cfg.divergence, loss.options.FUSED),
        ):
            if given != needed:
                raise UserError(
                    f"{option} {given} needs the whole distribution and {store} has a part; use kind hidden"
                )
        if cfg.gate == "instance" or set(GATES[cfg.gate].asks) - loss.options.FUSED_ASKS:
            raise UserError(f"--gate {cfg.gate} needs the whole distribution and {store} has a part; use kind hidden")

    def check_folders(self, split: str, folders: int) -> None:
        for folder in range(folders):
            self.store.part(split, folder)

    def check_data(self, split: str, dataset: Any, limits: tuple[int, int]) -> None:
        positions = self.store.manifest.get("limits", limits)
        inputs.check_lengths(
            split, dataset, positions, limits, f"the teacher of {self.store.named}", "name another store"
        )

    def attach(self, split: str, folder: int, dataset: LanguagePairDataset) -> None:
        part = self.store.part(split, folder)
        sentences = sum(len(one) for one in concatenated(dataset.tgt))
        if sentences != part.sentences:
            raise UserError(
                f"{self.store.named} was written for {part.sentences} sentences of {split}, and the data "
                f"have {sentences}; write it from these data with hgkd store"
            )
        read = Reader(self.store, part, numbering(dataset.tgt), self.pad)
        read.sentence(dataset[0], trained=False)  # detects another corpus before the training
        dataset.collater = functools.partial(with_teacher, dataset.collater, read, self.of_batch)

    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Signal:
        found = sample.get(self.of_batch)
        if found is None:
            raise UserError(f"{self.store.named} has nothing of a batch of these data; use --teacher-path")
        if "problem" in found:
            raise UserError(found["problem"])
        found = {name: values.to(device) for name, values in found.items()}
        gold = Gold(self.store.temperature, *found["gold"].float().unbind(-1))
        if self.store.kind == "hidden":
            wanted, stored = DTYPES.get(self.dtype, dtype), DTYPES[self.store.manifest["dtype"]]
            heads = []
            for member, layer in enumerate(self.layers):
                hidden = found[f"hidden-{member}"].view(stored).to(wanted)
                weight, bias = layer
                layer = weight.to(device, wanted), None if bias is None else bias.to(device, wanted)
                self.layers[member] = layer  # moved and converted once, for the first batch
                heads.append(Head(hidden, *layer))
            return Dense(heads, gold)
        if self.store.kind == "gold":
            return Dense([], gold)
        if self.store.kind == "sampled":
            shares = found["counts"].float() / self.store.manifest["draws"]
            return Sparse(loss.Sparse(found["ids"], shares, None, gold.entropy), gold)
        logprobs, rest = (found[name].view(torch.float32) for name in ("logprobs", "rest"))
        return Sparse(loss.Sparse(found["ids"], logprobs.exp(), rest.exp()), gold)


def concatenated(dataset: Any) -> list:
    """Return the data sets that one side of the data was concatenated from, without fairseq's wrappers around them."""
    inner = unwrapped(dataset)
    return inner.datasets if isinstance(inner, ConcatDataset) else [inner]


def unwrapped(dataset: Any) -> Any:
    while not isinstance(dataset, ConcatDataset) and hasattr(dataset, "dataset"):
        dataset = dataset.dataset
    return dataset


def numbering(dataset: Any) -> Callable[[int], int]:
    """Return a function from an index of the data to the sentence's number, which ignores repetitions.

    With --upsample-primary, the copies of a sentence have different indices and the same number.

    Args:
        dataset: one side of the data.
    """
    inner = unwrapped(dataset)
    if not isinstance(inner, ConcatDataset):
        return int
    return functools.partial(number_in, inner.cumulative_sizes, inner.real_sizes)


def number_in(ends: list[int], sizes: list[int], index: int) -> int:
    which = bisect.bisect_right(ends, index)
    start = ends[which - 1] if which else 0
    return sum(sizes[:which]) + (index - start) % sizes[which]


class Reader:
    """Reads the stored output for the batches of one part of a store, in the process that collates them.

    Args:
        store: the store.
        part: the part with the data set's sentences.
        number: function from a sample's "id" to the sentence's number in the part, from :func:`numbering`.
        pad: id of the padding token.
    """

    def __init__(self, store: Store, part: Part, number: Callable[[int], int], pad: int):
        self.store, self.part, self.number, self.pad = store, part, number, pad

    def sentence(self, sample: dict, trained: bool = True) -> dict:
        """Read the arrays of one sample (:meth:`Store.sentence`), after checking that the store has the same sentence.

        Args:
            sample: sample of the data set, with "id", "source" and "target".
            trained: whether the sentence is used; if not, it may be one that was too long for the teacher.

        Raises:
            UserError: the store has another sentence under this number, no tokens of it, or is damaged.
        """
        number = int(sample["id"])
        found, arrays = self.store.sentence(self.part.first + self.number(number))
        source, target = (sample[side][sample[side] != self.pad] for side in ("source", "target"))
        where = f"{self.store.named}: sentence {number} of {self.part.name}"
        if found != key(source, target):
            raise UserError(
                f"{where} is another one there; write the store from these data with hgkd store, and train without "
                "--truncate-source and what else changes sentences"
            )
        if trained and len(arrays["gold"]) != len(target):
            raise UserError(
                f"{where} was too long for the teacher; leave such out with --max-source-positions and "
                "--max-target-positions"
            )
        return arrays

    def __call__(self, samples: list[dict], batch: dict) -> dict:
        of_id = {int(sample["id"]): sample for sample in samples}
        kept: Tensor = batch["target"] != self.pad
        return self.store.batch([self.sentence(of_id[int(one)]) for one in batch["id"]], kept)


def with_teacher(collater: Callable[..., dict], read: Reader, name: str, samples: list, **options) -> dict:
    """Collate samples and add the stored output to the batch under the key `name`.

    If the store cannot be read, {"problem": message} is added instead, and the error is raised in the main process: an
    exception in a worker of the data loader would be shown with two tracebacks.
    """
    batch = collater(samples, **options)
    if batch.get("target") is not None:
        try:
            batch[name] = read(samples, batch)
        except (UserError, OSError) as error:
            batch[name] = {"problem": str(error)}
    return batch
