"""Refresh of the sentence weights of ALM-KD: a pass over fairseq's training set, shared by the distributed workers."""

from __future__ import annotations

import hashlib
import logging
import re
import time

import numpy as np
import torch
from fairseq import utils
from fairseq.data import FairseqDataset, data_utils
from fairseq.distributed import utils as distributed_utils
from torch import Tensor

from hgkd_fairseq.data import pairs
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss import Options
from hgkd_fairseq.plugin import binarised, features, training_state
from hgkd_fairseq.sentence_weights.gate import Instance
from hgkd_fairseq.sentence_weights.meta_gradient import Group, meta_gradient, step, widen

logger = logging.getLogger(__name__)

GROUP = 2  # training batches per look-ahead step; the published number is 2 to 3
REPETITIONS = 5  # weight updates per group, all with the same held-out batch
LARGEST_SHARE = 0.5


def hash_of_lengths(dataset: FairseqDataset) -> Tensor:
    """Return a hash (0-d int64) of the lengths of all sentences, in order; the sentences themselves are not read."""
    digest = hashlib.blake2b(digest_size=8)
    for part in pairs.parts(dataset):
        digest.update(np.ascontiguousarray(part.sizes, dtype="<i8").tobytes())
    return torch.tensor(int.from_bytes(digest.digest(), "little", signed=True))


class Refresh:
    """Refreshes the sentence weights of the gate "instance" at the beginning of every --refresh-interval-th epoch.

    The constructor checks the options and registers :meth:`begin_training` and :meth:`begin_epoch` with the task's
    training state. A refresh processes the training set in groups of `GROUP` batches. The groups are independent of
    each other: each worker processes its share of them, and the results are then combined, so that the weights do not
    depend on the number of workers.

    Args:
        criterion: the criterion ``hard_gate_kd`` with the gate "instance", which provides options, task and teacher.

    Raises:
        UserError: the held-out sentences or other options cannot be used with this gate.
    """

    def __init__(self, criterion):
        self.criterion, self.cfg, self.task = criterion, criterion.cfg, criterion.task
        self.state = training_state.of(criterion.task)
        self.subset: str | None = None
        self.share = 0.0
        held_out = self.gate().held_out
        try:
            self.share = float(held_out)
        except ValueError:
            self.subset = held_out
        self.check()
        self.state.held_out.share = self.share
        self.state.at_training_begin.append(self.begin_training)
        self.state.at_epoch_begin.append(self.begin_epoch)

    def gate(self) -> Instance:
        return self.criterion.gate_in_use().weights

    def check(self) -> None:
        cfg, data = self.cfg, self.task.cfg
        if len(utils.split_paths(data.data)) > 1:
            raise UserError(
                "--gate instance numbers the training sentences and needs them in one folder; join the data"
            )
        if cfg.divergence != "kl":
            raise UserError(f"--divergence {cfg.divergence}: gate instance learns its weights with kl; drop the option")
        if cfg.teacher_temperature_start is not None:
            raise UserError("--teacher-temperature-start: gate instance learns its weights at one temperature; drop it")
        if self.subset is None:
            if not 0 < self.share <= LARGEST_SHARE:
                raise UserError(f"--held-out {self.share}: a share of the training sentences above 0, at most 0.5")
            if data.upsample_primary > 1:
                raise UserError("--held-out: with --upsample-primary copies of the sentences kept aside are trained on")
            return
        if re.fullmatch(re.escape(data.train_subset) + r"\d*", self.subset):  # fairseq trains on train1, ... too
            raise UserError(f"--held-out {self.subset}: that is trained on; name another subset, or a share as 0.02")
        chooses = cfg.valid_subset.split(",")
        if self.subset in chooses or (cfg.combine_valid_subsets and self.subset.startswith("valid")):
            raise UserError(
                f"--held-out {self.subset}: --valid-subset chooses the checkpoint by it; name another subset, or a "
                "share of the training sentences as 0.02"
            )
        try:
            if "/" in self.subset:  # it may be a path to one of the subsets refused above
                raise binarised.NoSubset
            self.task.load_dataset(self.subset)
        except (binarised.NoSubset, KeyError):  # KeyError: from fairseq's multilingual task
            raise UserError(
                f"--held-out {self.subset}: there is no such subset in {data.data}, and it is no share as 0.02"
            ) from None
        if any(part.tgt is None for part in pairs.parts(self.task.dataset(self.subset)) if hasattr(part, "tgt")):
            raise UserError(f"--held-out {self.subset}: it has no target sentences in {data.data}; name another subset")

    def begin_training(self, epoch: int, model: torch.nn.Module) -> None:
        """Initialise the weights unless a checkpoint has provided them; then check that they belong to these data.

        Raises:
            UserError: the checkpoint has other held-out or training sentences, or all held-out ones are too long.
        """
        gate = self.gate()
        held_out = torch.from_numpy(self.state.held_out.mask(len(self.training())))
        self.held_out_sentences(epoch, model)
        shown = hash_of_lengths(self.training())
        if not gate.state:
            if 0 < self.cfg.max_epoch < gate.interval:
                raise UserError(
                    f"--refresh-interval {gate.interval}: the training ends before, at --max-epoch "
                    f"{self.cfg.max_epoch}, so that no weight is ever learned; give a smaller number"
                )
            gate.begin(held_out)
            gate.state["lengths"] = shown
        elif not torch.equal(gate.state["held_out"].cpu(), held_out):
            count = gate.state["held_out"].numel()
            raise UserError(
                f"--held-out: the checkpoint has weights of {count} training sentences of which others are kept aside; "
                "resume with the same data and the same --held-out"
            )
        elif not torch.equal(gate.state.get("lengths", shown).cpu(), shown):  # older checkpoints have no "lengths"
            raise UserError(
                "--gate instance: the checkpoint has weights of other training sentences, or in another order; "
                "resume with the same data"
            )

    def begin_epoch(self, epoch: int, model: torch.nn.Module) -> None:
        """Refresh the weights if a refresh is due in this epoch and the teacher is ready.

        A run that is resumed in the middle of the epoch does not repeat the refresh.
        """
        gate = self.gate()
        due = epoch % gate.interval == 0 and int(gate.state["epoch"]) != epoch
        if due and self.task.load_teacher().ready:
            self.walk(epoch, model)
            gate.state["epoch"] = torch.tensor(epoch)

    def training(self):
        return self.task.every_sentence()

    def batches(self, dataset, indices: np.ndarray) -> list[np.ndarray]:
        """Split sentence indices into batches, limited by --max-tokens and --batch-size as in training."""
        if getattr(dataset, "supports_prefetch", False):
            dataset.prefetch(indices)
        return list(dataset.batch_by_size(indices, max_tokens=self.cfg.max_tokens, max_sentences=self.cfg.batch_size))

    def limit(self, model: torch.nn.Module):
        return utils.resolve_max_positions(
            self.task.max_positions(), features.max_positions(model), self.cfg.max_tokens
        )

    def held_out_sentences(self, epoch: int, model: torch.nn.Module):
        """Return the data set that contains the held-out sentences, and their indices in it (int64 array).

        Sentences that are too long for the model are excluded.

        Raises:
            UserError: no held-out sentence is short enough.
        """
        dataset = self.training() if self.subset is None else self.task.dataset(self.subset)
        with data_utils.numpy_seed(epoch):
            there = dataset.ordered_indices()
        there, _ = dataset.filter_indices_by_size(there, self.limit(model))
        if self.subset is None:
            there = there[self.state.held_out.mask(len(dataset))[there]]
        if not len(there):
            raise UserError(
                f"--held-out {self.gate().held_out}: none of its sentences is short enough; keep more aside"
            )
        return dataset, there

    def plan(self, epoch: int, model: torch.nn.Module):
        """Return the held-out data set and a list of groups, each a pair (training batches, held-out batch).

        The plan depends only on the data, the options and the epoch, so it is the same on all workers.
        """
        training = self.training()
        with data_utils.numpy_seed(epoch):
            trained = training.ordered_indices()
        held_out, there = self.held_out_sentences(epoch, model)
        trained = self.task.filter_indices_by_size(trained, training, self.limit(model), ignore_invalid_inputs=True)
        generator = np.random.default_rng(epoch)
        # Held-out batches mix sentences of all lengths, so that none of their gradients is specific to one length.
        batches, there = self.batches(training, trained), self.batches(held_out, generator.permutation(there))
        order = generator.permutation(len(batches))
        against = np.resize(generator.permutation(len(there)), len(batches))
        groups = [
            ([batches[i] for i in order[start : start + GROUP]], there[against[number]])
            for number, start in enumerate(range(0, len(order), GROUP))
        ]
        return held_out, groups

    def group(self, model, dataset, batches, with_teacher: bool) -> tuple[Group, Tensor]:
        """Compute the features of several batches.

        Returns:
            The batches joined into one :class:`Group` of S sentences, and the sentence numbers (S,) int64.
        """
        device, skip = next(model.parameters()).device, self.cfg.ignore_prefix_size
        students, teachers, targets, lengths, numbers = [], [], [], [], []
        for batch in batches:
            sample = dataset.collater([dataset[i] for i in batch])
            if device.type == "cuda":
                sample = utils.move_to_cuda(sample, device)
            target = sample["target"][:, skip:]
            kept = target != self.criterion.padding_idx
            student = features.head(model, sample["net_input"])
            heads = [student]
            if with_teacher:
                heads += self.task.load_teacher().signal(sample, device, student.hidden.dtype).heads
            first, *others = [widen(head._replace(hidden=head.hidden[:, skip:][kept])) for head in heads]
            students.append(first)
            teachers.append(others)
            targets.append(target[kept])
            lengths += kept.sum(1).tolist()
            numbers.append(sample["id"])

        def joined(heads):
            return heads[0]._replace(hidden=torch.cat([head.hidden for head in heads]))

        ensemble = [joined(member) for member in zip(*teachers, strict=True)]
        return Group(joined(students), ensemble, torch.cat(targets), lengths), torch.cat(numbers)

    @torch.no_grad()
    def walk(self, epoch: int, model: torch.nn.Module) -> None:
        start, gate, training = time.perf_counter(), self.gate(), self.training()
        workers = distributed_utils.get_data_parallel_group()
        count = distributed_utils.get_world_size(workers)
        rank = distributed_utils.get_rank(workers) if count > 1 else 0
        cfg, device = self.cfg, next(model.parameters()).device
        learning_rate = cfg.lr[min(epoch, len(cfg.lr)) - 1]
        options = Options(
            self.criterion.gate,
            teacher_temperature=self.criterion.teacher_temperature,
            label_smoothing=cfg.label_smoothing,
            confidence_penalty=cfg.confidence_penalty,
        )
        before = torch.stack([gate.state["data"], gate.state["teacher"]], 1).to(device)  # (S, 2)
        fresh, seen = torch.zeros_like(before), torch.zeros_like(before[:, 0])
        with features.without_dropout(model):
            held_out, groups = self.plan(epoch, model)
            for batches, against in groups[rank::count]:
                group, numbers = self.group(model, training, batches, with_teacher=True)
                there, _ = self.group(model, held_out, [against], with_teacher=False)
                divisor = len(numbers) if cfg.sentence_avg else group.target.numel()
                weights = before[numbers]
                for _ in range(REPETITIONS):
                    gradient = meta_gradient(group, weights, there, learning_rate / divisor, options)
                    weights = step(weights, gradient, gate.change / REPETITIONS, gate.rule)
                fresh[numbers], seen[numbers] = weights, 1
        if count > 1:
            distributed_utils.all_reduce(fresh, workers)
            distributed_utils.all_reduce(seen, workers)
        after = torch.where(seen[:, None] > 0, fresh, before)
        gate.state["learned"] = gate.learned_rows(gate.state).to(device) | (seen > 0)
        gate.state["data"], gate.state["teacher"] = after.unbind(1)
        moved = (after - before)[seen > 0]
        data, teacher = moved.abs().median(0).values.tolist()
        logger.info(
            "weights of %d sentences refreshed in %.1f s: median change data %.3f, teacher %.3f; median now %.3f, %.3f",
            len(moved), time.perf_counter() - start, data, teacher, *after[seen > 0].median(0).values.tolist(),
        )  # fmt: skip
