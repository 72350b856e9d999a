"""A teacher to learn from, combined with a stored one that the gate compares the student with (--gauge-store)."""

from __future__ import annotations

from typing import Any

import torch
from fairseq.data import FairseqDataset

from hgkd_fairseq import loss
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.gates import GATES
from hgkd_fairseq.plugin.config import given_temperature
from hgkd_fairseq.plugin.training_state import TrainingState
from hgkd_fairseq.teacher.signals import Signal
from hgkd_fairseq.teacher.source import Request, TeacherSource
from hgkd_fairseq.teacher.stored import StoredTeacher

BATCH = "stored_gauge"  # key in a fairseq batch


class Gauged(TeacherSource):
    """Wraps a teacher, and takes the gold-token statistics of its output from the store of --gauge-store.

    The student learns from the wrapped teacher; a gate that reads the gold token compares the student with the store.

    Args:
        teacher: source that the student learns from.
        request: the request that the source was constructed from; its options name the store.

    Raises:
        UserError: the store cannot be used.
    """

    def __init__(self, teacher: TeacherSource, request: Request):
        self.teacher, self.name = teacher, teacher.name  # type: ignore[misc]
        folder = request.options.gauge_store
        dictionaries = (request.source_dictionary, request.target_dictionary)
        self.gauge = StoredTeacher(
            folder, *dictionaries, languages=request.languages, name=BATCH, option="--gauge-store"
        )
        self.frozen, self.reindexed = teacher.frozen, teacher.reindexed

    @property
    def ready(self) -> bool:
        return self.teacher.ready

    @property
    def models(self) -> list[torch.nn.Module]:
        return self.teacher.models

    @property
    def fingerprint(self) -> str | None:
        known = self.teacher.fingerprint
        return known and f"{known} gauged by {self.gauge.fingerprint} {self.gauge.store.manifest['folds']}"

    def check_options(self, cfg: Any) -> None:
        self.teacher.check_options(cfg)
        gate, store = GATES[cfg.gate], f"--gauge-store {self.gauge.folder}"
        teacher = self.teacher
        if isinstance(teacher, StoredTeacher) and not teacher.frozen:
            raise UserError(
                f"{store} needs a whole teacher beside it, and --teacher-store {teacher.folder} of the kind "
                f"{teacher.store.kind} has a part of one; write that store with --kind hidden, or drop one of both"
            )
        asks = set(gate.asks)
        if not (gate.compares or asks == loss.options.FUSED_ASKS) or cfg.gate_on != "gold":
            raise UserError(f"{store}: gate {cfg.gate} reading {cfg.gate_on} does not compare the gold tokens; drop it")
        if cfg.gate == "instance" or self.teacher.learns or not self.teacher.frozen:
            raise UserError(f"{store} is for a frozen teacher and a gate without a memory of sentences; drop it")
        known = {self.gauge.store.temperature} if asks else {1.0, self.gauge.store.temperature}
        wanted = 1.0 if cfg.untempered_gate else given_temperature(cfg)
        if wanted not in known or cfg.teacher_temperature_start is not None:
            fitting = "" if asks else " or 1, or --untempered-gate"
            raise UserError(
                f"{store} was written at temperature {self.gauge.store.temperature:g}: give --teacher-temperature "
                f"{self.gauge.store.temperature:g}{fitting}"
            )

    def check_folders(self, split: str, folders: int) -> None:
        self.teacher.check_folders(split, folders)
        self.gauge.check_folders(split, folders)

    def attach(self, split: str, folder: int, dataset: FairseqDataset) -> None:
        self.teacher.attach(split, folder, dataset)
        self.gauge.attach(split, folder, dataset)

    def check_data(self, split: str, dataset: FairseqDataset, limits: tuple[int, int]) -> None:
        self.teacher.check_data(split, dataset, limits)
        self.gauge.check_data(split, dataset, limits)

    def signal(self, sample: dict, device: torch.device, dtype: torch.dtype) -> Signal:
        gold = self.gauge.signal(sample, device, dtype).gold
        assert gold is not None
        return self.teacher.signal(sample, device, dtype)._replace(gold=gold)

    def begin_epoch(self, epoch: int, model: torch.nn.Module, state: TrainingState) -> None:
        self.teacher.begin_epoch(epoch, model, state)
