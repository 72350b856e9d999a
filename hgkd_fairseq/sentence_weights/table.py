"""The command ``hgkd weights``: medians, a table and a figure of the learned sentence weights in a checkpoint."""

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

HELD = ("cpu", torch.strided)  # dense tensors on the CPU: neither on device "meta" nor sparse


class Weights(NamedTuple):
    """Learned weights of S training sentences, in the order of the data set."""

    sentence: Tensor  # (S,) int64, index in the training set, from 0
    data: Tensor  # (S,) weights of the data term
    teacher: Tensor  # (S,) weights of the teacher term
    epoch: int  # epoch of the last refresh; 0: no refresh yet, and S is 0

    def medians(self, rows: Tensor) -> str:
        """Format the number and median weights of the sentences that the mask `rows` (S,) bool selects, as one line."""
        if not rows.any():
            return "no sentence"
        data, teacher = self.data[rows], self.teacher[rows]
        share = (teacher / (data + teacher)).nanmedian()  # 0 / 0 if both weights are 0
        return (
            f"{int(rows.sum())} sentences, median weight data {data.median():.4f}, teacher {teacher.median():.4f}, "
            f"median share of the teacher {share:.4f}"
        )


def read(checkpoint: str) -> Weights:
    """Read the learned sentence weights from a checkpoint of a run with ``--gate instance``.

    Held-out sentences and sentences too long to train on have no learned weights and are omitted.

    Raises:
        UserError: the file cannot be read, is not a checkpoint of such a run, or its weights are damaged.
    """
    from hgkd_fairseq.plugin import checkpoints, training_state

    memory = checkpoints.read(checkpoint, model=False).state["extra_state"]
    table = checked(checkpoint, training_state.memory_in(memory))
    sentence = Instance.learned_rows(table).nonzero().squeeze(1)
    return Weights(sentence, table["data"][sentence], table["teacher"][sentence], int(table["epoch"]))


def checked(checkpoint: str, memory: Any) -> dict[str, Tensor]:
    """Return the state of the gate "instance" from a checkpoint's memory, after checking its untrusted content.

    The weights must be finite and not negative, and all columns must have the same length.

    Args:
        checkpoint: name of the file, for the error messages.
        memory: the task's memory, as `training_state.memory_in` returns it.

    Raises:
        UserError: the memory has no such state, or the state is damaged.
    """
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
    """Read the sentence indices in a text file, one per line, into an int64 tensor of shape (number of indices,).

    Raises:
        UserError: the file cannot be read, or contains something other than indices (integers from 0).
    """
    hint = "give numbers of sentences, from 0 on, one a line"
    found = []
    for place, word in enumerate(files.read_text(file, f"--compare: {hint}").split()):
        if not (word.isdecimal() and len(word) < 19):
            raise UserError(f"--compare {file}: {word[:40]} (number {place + 1}) is no number of a sentence; {hint}")
        found.append(int(word))
    return torch.tensor(found, dtype=torch.int64)


def report(checkpoint: str, output: str | None, compare: str | None, plot: str | None) -> None:
    """Print the median learned weights and optionally write a table and a figure (command ``hgkd weights``).

    Args:
        checkpoint: a checkpoint of a run with ``--gate instance``.
        output: TSV file to write, with the weights of each sentence; None: no table.
        compare: text file with sentence indices; the listed sentences and the others are summarised separately.
        plot: figure to write, .png or .svg; None: no figure.

    Raises:
        UserError: a file cannot be read or written, or its content is not as expected.
    """
    if plot:
        files.figure_format("--plot", plot)
    found = read(checkpoint)
    groups = {"all": torch.ones_like(found.sentence, dtype=torch.bool)}
    if compare:
        asked = numbers(compare)
        listed = torch.isin(found.sentence, asked)
        if found.epoch and not listed.any():
            raise UserError(f"--compare {compare}: none of its numbers is that of a sentence with learned weights")
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
    """Write a figure with histograms of the data and teacher weights: one line per group, in per cent of the group.

    Args:
        found: the learned weights of S sentences.
        groups: the mask (S,) bool of each group, by its name; at most two are drawn.
        output: .png or .svg file to write.
    """
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
