#!/usr/bin/env python3
"""What a stored teacher costs and loses: bytes a token, and the gradient's error against the live teacher's, by kind.

    store.py DATA --teacher-path CKPT --student-path CKPT [--subset valid] [--teacher-temperature 1.5]

The student's gradient at its output layer (KL alone, --gate always) is made batch by batch from the live teacher and
from a store of each kind, written anew. Printed: the norm of the difference over that of the live gradient, the mean
over batches and of the sum of all; and the gates of HKD-T that differ. A table for a page.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch

from hgkd_fairseq import plugin
from hgkd_fairseq.errors import guarded
from hgkd_fairseq.evaluation import forced
from hgkd_fairseq.loss import gated_distillation
from hgkd_fairseq.plugin import features
from hgkd_fairseq.teacher import storing
from hgkd_fairseq.teacher.store import Store
from hgkd_fairseq.teacher.stored import StoredTeacher

KINDS = {
    "hidden, fp32": {"kind": "hidden", "dtype": "fp32"},
    "hidden, bf16": {"kind": "hidden"},
    "sampled, 50 draws": {"kind": "sampled"},
}
SENTENCES = 32  # a batch


def kinds(args: argparse.Namespace) -> dict[str, dict]:
    return KINDS | {f"topk, {k}": {"kind": "topk", "tokens": k} for k in args.topk}


def gradients(student, target: torch.Tensor, gate: str, tau: float, pad: int, **teacher):
    """The loss's output, and its gradient at the output layer."""
    hidden, weight = (tensor.detach().clone().requires_grad_() for tensor in student[:2])
    out = gated_distillation(
        hidden, weight, target=target, padding_idx=pad, gate=gate, teacher_temperature=tau, student_bias=student.bias,
        **{"teacher_hidden": None, "teacher_weight": None} | teacher,
    )  # fmt: skip
    return out, torch.autograd.grad(out.loss, weight)[0]


def dense(heads) -> dict:
    hidden, weight, bias = (list(column) for column in zip(*heads, strict=True))
    return {"teacher_hidden": hidden, "teacher_weight": weight, "teacher_bias": bias}


def measure(args: argparse.Namespace, kind: str, folder: Path) -> list[str]:
    tau = args.teacher_temperature
    moved = repr({"data": args.data})  # the dictionaries of the checkpoints
    how = storing.StoreOptions(subsets=(args.subset,), temperature=tau, cpu=True, overrides=moved, **kinds(args)[kind])
    storing.write(args.data, args.teacher_path, str(folder), how)
    (live,), task, device = forced.load(args.data, args.teacher_path, cpu=True)
    (model,), _, _ = forced.load(args.data, args.student_path, cpu=True)
    task.load_dataset(args.subset)
    dataset, pad = task.dataset(args.subset), task.target_dictionary.pad()
    stored = StoredTeacher(str(folder), task.source_dictionary, task.target_dictionary)
    stored.attach(args.subset, 0, dataset)
    errors, total, difference, gates, tokens = [], 0.0, 0.0, 0, 0
    for start in range(0, len(dataset), SENTENCES):
        sample = dataset.collater([dataset[i] for i in range(start, min(start + SENTENCES, len(dataset)))])
        with torch.no_grad():
            student, teacher = (features.head(one, sample["net_input"]) for one in (model, live))
        signal = stored.signal(sample, device, torch.float32)
        told = dense(signal.heads) if signal.heads else {"teacher_sparse": signal.distribution}
        told["teacher_gold"] = signal.gold.at(tau)
        common = (student, sample["target"])
        (_, true), (_, found) = (gradients(*common, "always", tau, pad, **it) for it in (dense([teacher]), told))
        (mine, _), (theirs, _) = (gradients(*common, "token", tau, pad, **it) for it in (dense([teacher]), told))
        errors.append(float((found - true).norm() / true.norm()))
        total, difference = total + true, difference + found - true
        gates += int((mine.teacher_mask != theirs.teacher_mask).sum())
        tokens += int(mine.tokens)
    arrays = sum(file.stat().st_size for file in folder.rglob("shard-*/*.npy"))
    assert Store(str(folder)).shards.rows == len(dataset)
    whole = float(difference.norm() / total.norm())
    return [
        kind,
        f"{arrays / tokens:.0f}",
        f"{sum(errors) / len(errors):.1e}",
        f"{whole:.1e}",
        f"{gates} of {tokens:,}",
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of fairseq-preprocess")
    parser.add_argument("--teacher-path", required=True, metavar="CKPT")
    parser.add_argument("--student-path", required=True, metavar="CKPT")
    parser.add_argument("--subset", default="valid", metavar="SPLIT")
    parser.add_argument("--teacher-temperature", type=float, default=1.5, metavar="T")
    parser.add_argument("--topk", type=int, nargs="+", default=(8, 32, 128), metavar="K", help="(default: 8 32 128)")
    args = parser.parse_args()
    plugin.register()
    logging.getLogger().setLevel(logging.WARNING)
    warnings.simplefilter("ignore")
    return guarded("store.py: error", lambda: show(args), False)


def show(args: argparse.Namespace) -> int:
    print("| kind | bytes a token | error of a batch's gradient | of all batches' | gates that differ |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for place, kind in enumerate(kinds(args)):
            print(f"| {' | '.join(measure(args, kind, Path(folder, str(place))))} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
