#!/usr/bin/env python3
"""Measure the size, gradient error and writing speed of a stored teacher, by kind of store.

    store.py DATA --teacher-path CKPT --student-path CKPT [--subset valid] [--teacher-temperature 1.5] [--repeats 7]

For each batch the gradient of the student's output weight (only KL, --gate always) is computed with the live teacher
and with a newly written store of each kind. The first markdown table shows bytes per target token; the norm of the
difference of the gradients relative to that of the live gradient, as the mean over the batches and for the sum over all
batches; and the number of tokens for which the gate of HKD-T differs. With --repeats, a second table shows how many
target tokens per second `hgkd store` writes, and the ratio of this speed to that of fairseq-validate with the same
teacher; both are whole runs that alternate in this process.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import statistics
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from fairseq import options
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq_cli import validate
from measuring import interleaved, markdown, median_ratio

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
    "sampled, 32 draws": {"kind": "sampled"},
}
SENTENCES = 32  # per batch


def kinds(args: argparse.Namespace) -> dict[str, dict]:
    return KINDS | {f"topk, {k}": {"kind": "topk", "tokens": k} for k in args.topk}


def write(args: argparse.Namespace, kind: str, folder: Path) -> None:
    moved = repr({"data": args.data})  # where the checkpoints find their dictionaries
    how = {"subsets": (args.subset,), "temperature": args.teacher_temperature, "cpu": True, "overrides": moved}
    storing.write(args.data, args.teacher_path, str(folder), storing.StoreOptions(**how, **kinds(args)[kind]))


def gradients(student, target: torch.Tensor, gate: str, tau: float, pad: int, **teacher):
    """Return the output of the loss and the gradient (V, D) of the student's output weight."""
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
    write(args, kind, folder)
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


def validated(args: argparse.Namespace) -> None:
    words = [
        args.data, "--path", args.teacher_path, "--valid-subset", args.subset, "--max-tokens", "4000", "--cpu",
        "--task", "translation", "--criterion", "cross_entropy", "--no-progress-bar", "--log-format", "none",
    ]  # fmt: skip
    given, overrides = (
        options.parse_args_and_arch(options.get_validation_parser(), words, suppress_defaults=alone)
        for alone in (False, True)
    )
    validate.main(convert_namespace_to_omegaconf(given), overrides)


def speeds(args: argparse.Namespace, folder: Path) -> list[list[str]]:
    numbers = itertools.count()
    runs = {"fairseq-validate": functools.partial(validated, args)}
    for kind in kinds(args):
        runs[kind] = lambda kind=kind: write(args, kind, folder / str(next(numbers)))
    for run in runs.values():
        run()  # to warm up
    times = interleaved(runs, args.repeats, "cpu")
    first = Store(str(folder / "0"))
    tokens = sum(len(first.sentence(number)[1]["gold"]) for number in range(first.shards.rows))
    return [
        [kind, f"{tokens / statistics.median(mine):,.0f}", f"{median_ratio(times['fairseq-validate'], mine):.2f}"]
        for kind, mine in times.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", metavar="DATA", help="folder of fairseq-preprocess")
    parser.add_argument("--teacher-path", required=True, metavar="CKPT")
    parser.add_argument("--student-path", required=True, metavar="CKPT")
    parser.add_argument("--subset", default="valid", metavar="SPLIT")
    parser.add_argument("--teacher-temperature", type=float, default=1.5, metavar="T")
    parser.add_argument("--topk", type=int, nargs="+", default=(8, 32, 128), metavar="K", help="(default: 8 32 128)")
    rounds = "in which writing is timed; 7 say something (default: 0)"
    parser.add_argument("--repeats", type=int, default=0, metavar="N", help=rounds)
    args = parser.parse_args()
    plugin.register()
    warnings.simplefilter("ignore")
    logging.disable(logging.INFO)
    return guarded("store.py: error", lambda: show(args), False)


def show(args: argparse.Namespace) -> int:
    print("| kind | bytes a token | error of a batch's gradient | of all batches' | gates that differ |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for place, kind in enumerate(kinds(args)):
            print(f"| {' | '.join(measure(args, kind, folder / str(place)))} |", flush=True)
        if args.repeats:
            (folder / "timed").mkdir()
            print(
                "\n" + markdown(["", "tokens a second", "/ fairseq-validate"], speeds(args, folder / "timed")), end=""
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
