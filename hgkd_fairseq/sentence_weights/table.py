"""The learned weights of training sentences in a checkpoint: as a table, as medians, as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hgkd_fairseq import files
from hgkd_fairseq.drawing import figure_class, legend
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.sentence_weights.gate import Instance

HELD = ("cpu", torch.strided)  # numbers that are there: not those of device "meta", nor sparse ones


class Weights(NamedTuple):
    """Of S sentences whose weights the checkpoint's run has learned, in the data set's order."""

    sentence: Tensor  # (S,) int64, number in the training data, from 0 on
    data: Tensor  # (S,)
    teacher: Tensor  # (S,)
    epoch: int  # of the last refresh; 0: there was none yet, and no row is learned

    def medians(self, rows: Tensor) -> str:
        """One line on some rows (S,) bool."""
        if not rows.any():
            return "no sentence"
        data, teacher = self.data[rows], self.teacher[rows]
        share = (teacher / (data + teacher)).nanmedian()  # 0 / 0 where a sentence counts for nothing
        return (
            f"{int(rows.sum())} sentences, median weight data {data.median():.4f}, teacher {teacher.median():.4f}, "
            f"median share of the teacher {share:.4f}"
        )


def read(checkpoint: str) -> Weights:
    """The learned weights in a checkpoint of a run with ``--gate instance``; sentences that were kept aside, or too
    long to train on, have none.

    Raises:
        UserError: no such file, or none of such a run.
    """
    from hgkd_fairseq.plugin import checkpoints, training_state

    memory = checkpoints.read(checkpoint, model=False).state["extra_state"]
    table = checked(checkpoint, training_state.memory_in(memory))
    sentence = Instance.learned_rows(table).nonzero().squeeze(1)
    return Weights(sentence, table["data"][sentence], table["teacher"][sentence], int(table["epoch"]))


def checked(checkpoint: str, memory: Any) -> dict[str, Tensor]:
    """The state of --gate instance in what a task remembers, which is a file's: columns of one length, of weights."""
    table = memory.get("gate") if isinstance(memory, dict) else None
    if not isinstance(table, dict) or "held_out" not in table:
        raise UserError(f"{checkpoint} has no weights of sentences; name a checkpoint of a run with --gate instance")
    weights: list[Any] = [table.get(name) for name in ("data", "teacher")]
    masks = [table[name] for name in ("held_out", "learned") if name in table]
    epoch: Any
    columns, epoch = [*weights, *masks], table.get("epoch")
    whole = (
        all(isinstance(one, Tensor) and (one.device.type, one.layout) == HELD for one in [*columns, epoch])
        and all(column.dim() == 1 for column in columns)
        and len({len(column) for column in columns}) == 1
        and all(mask.dtype == torch.bool for mask in masks)
        and all(column.is_floating_point() and bool((column >= 0).all()) for column in weights)
        and all(bool(column.isfinite().all()) for column in weights)
        and epoch.dtype == torch.int64
        and epoch.numel() == 1
    )
    if not whole:
        raise UserError(f"{checkpoint} holds a table of weights that is damaged; name another checkpoint of its run")
    return table


def numbers(file: str) -> Tensor:
    """Numbers of sentences, one a line."""
    hint = "give numbers of sentences, from 0 on, one a line"
    found = []
    for place, word in enumerate(files.read_text(file, f"--compare: {hint}").split()):
        if not (word.isdecimal() and len(word) < 19):
            raise UserError(f"--compare {file}: {word[:40]} (number {place + 1}) is no number of a sentence; {hint}")
        found.append(int(word))
    return torch.tensor(found, dtype=torch.int64)


def report(checkpoint: str, output: str | None, compare: str | None, plot: str | None) -> None:
    """Print medians of all sentences, or of those in the file `compare` and of the others; write what is asked for."""
    if plot:
        files.figure_format("--plot", plot)
    found = read(checkpoint)
    groups = {"all": torch.ones_like(found.sentence, dtype=torch.bool)}
    if compare:
        listed = torch.isin(found.sentence, numbers(compare))
        name = Path(compare).stem
        groups = {name: listed, "others" if name != "others" else "the others": ~listed}
    for name, rows in groups.items():
        print(f"{name}: {found.medians(rows)}")
    if not found.epoch:
        print("not refreshed yet: all weights are what they began with")
    if output:
        listing = zip(found.sentence.tolist(), found.data.tolist(), found.teacher.tolist(), strict=True)
        lines = [
            "sentence\tdata\tteacher",
            *(f"{sentence}\t{data:.6g}\t{teacher:.6g}" for sentence, data, teacher in listing),
        ]
        files.write_text(output, "".join(f"{line}\n" for line in lines))
    if plot:
        draw(found, groups, plot)


def draw(found: Weights, groups: dict[str, Tensor], output: str) -> None:
    """Histograms of data and teacher weight, a line for each group, scaled to the group's size."""
    figure = figure_class()(figsize=(7.0, 3.2), layout="constrained")
    axes: Sequence = figure.subplots(1, 2, sharey=True)
    styles = ({"color": "#D55E00", "linestyle": "-"}, {"color": "#0072B2", "linestyle": "--"})
    for axis, name, values in zip(axes, ("data", "teacher"), (found.data, found.teacher), strict=True):
        top = max(float(values.max()), 1.0) if len(values) else 1.0
        for rows, style in zip(groups.values(), styles, strict=False):
            counts = torch.histc(values[rows].float(), bins=50, min=0, max=top) / max(int(rows.sum()), 1)
            axis.stairs((100 * counts).tolist(), torch.linspace(0, top, 51).tolist(), **style)
        axis.set_xlabel(f"weight of the {name}")
    axes[0].set_ylabel("sentences, %")
    legend(axes[1], axes[1].patches, list(groups), frameon=False)
    files.write_figure(figure, output)
