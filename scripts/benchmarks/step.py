#!/usr/bin/env python3
"""Benchmark a whole training step of fairseq (forward, backward, optimizer) with cross-entropy and with distillation.

    python scripts/benchmarks/step.py --csv step.csv --markdown step.md      a small student and teacher
    python scripts/benchmarks/step.py --arch-size iwslt                      6 + 6 layers of 512, vocabulary 10k
    python scripts/benchmarks/step.py --device cuda --arch-size iwslt wmt-base --dtype bf16 fp16

The data are synthetic sentences of 8 to 40 tokens in fairseq's binary format. fairseq builds the task, models,
criterions and trainers from command-line options; the teacher is an untrained checkpoint. All trainers run in turn on
the same batches in one process. The tables show the median time of a step, its 20th and 80th percentiles, target tokens
per second, and the median over the batches of the ratio to another trainer's time on the same batch.

Some parts are also timed separately: the teacher's forward pass; its product with the output layer; and the time that a
data-loading worker takes to read a stored teacher (hidden states in the model's dtype). The lower bound for any exact
loss is the step of a student without an output layer, whose loss is the sum of its features, plus the three matrix
products of an output layer (logits, gradient of the features, gradient of the weight). On a GPU the table also shows
the peak memory of a forward and backward pass beyond what is allocated before it (parameters, optimizer state).
"""

from __future__ import annotations

import argparse
import functools
import itertools
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fairseq import options, tasks, utils
from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.data import Dictionary, indexed_dataset
from fairseq.dataclass import FairseqDataclass
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from measuring import (
    LEAST_REPEATS,
    RUNGS,
    append_csv,
    environment,
    interleaved,
    markdown,
    median_ratio,
    quantile,
    seconds,
)

USER_DIR = Path(__file__).parents[2] / "hgkd_fairseq"
LANGUAGES = ("de", "en")
MAX_UPDATE = 100_000  # never reached
WARM_ROUNDS = 3  # batches that are not counted
PRODUCTS = "output layer's three products"
HEADINGS = ["a training step", "ms", "p20 to p80", "/ CE, fairseq", "/ KD, ours", "tokens/s", "peak MiB"]


class Size(NamedTuple):
    """Size of a transformer."""

    dim: int
    ffn: int
    encoder_layers: int
    decoder_layers: int
    heads: int = 4

    def options(self) -> list[str]:
        values = {"embed-dim": self.dim, "ffn-embed-dim": self.ffn, "attention-heads": self.heads}
        sides = [f"--{side}-{name}={value}" for side in ("encoder", "decoder") for name, value in values.items()]
        return [*sides, f"--encoder-layers={self.encoder_layers}", f"--decoder-layers={self.decoder_layers}"]


@dataclass
class Setting:
    student: Size
    teacher: Size
    vocabulary: int
    max_tokens: int
    dropout: float


SETTINGS = {
    "quickstart": Setting(Size(128, 256, 2, 2), Size(192, 384, 3, 2), 4000, 2048, 0.2),
    "iwslt": Setting(Size(512, 1024, 6, 6), Size(512, 1024, 6, 6), 10152, 4096, 0.3),
    "wmt-base": Setting(Size(512, 2048, 6, 6, 8), Size(512, 2048, 6, 6, 8), 37000, 8192, 0.1),
    "tiny": Setting(Size(16, 32, 1, 1), Size(24, 32, 1, 1), 200, 256, 0.1),
}


@register_criterion("sum_of_features", dataclass=FairseqDataclass)
class SumOfFeatures(FairseqCriterion):
    """Sum of the decoder's features, without an output layer: the part of a step that no loss can save."""

    def forward(self, model: torch.nn.Module, sample: dict) -> tuple[torch.Tensor, int, dict]:
        features, _ = model(**sample["net_input"], features_only=True)
        loss = features.float().sum()
        count = sample["ntokens"]
        return loss, count, {"loss": loss.detach(), "ntokens": count, "sample_size": count}

    @staticmethod
    def reduce_metrics(logging_outputs: list[dict]) -> None:
        metrics.log_scalar("loss", float(sum(output["loss"] for output in logging_outputs)))

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        return True


def write_data(folder: Path, vocabulary: int, pairs: int) -> None:
    """Write training pairs of random tokens in the format of `fairseq-preprocess --joined-dictionary`."""
    dictionary = Dictionary()
    for index in range(vocabulary - len(dictionary)):
        dictionary.add_symbol(f"w{index}", n=1)
    rng = random.Random(0)
    for language in LANGUAGES:
        dictionary.save(str(folder / f"dict.{language}.txt"))
        prefix = str(folder / f"train.{'-'.join(LANGUAGES)}.{language}")
        builder = indexed_dataset.make_builder(f"{prefix}.bin", "mmap", len(dictionary))
        for _ in range(pairs):
            words = [rng.randrange(dictionary.nspecial, len(dictionary)) for _ in range(rng.randint(7, 39))]
            builder.add_item(torch.tensor([*words, dictionary.eos()], dtype=torch.int32))
        builder.finalize(f"{prefix}.idx")


def make_trainer(data: Path, size: Size, setting: Setting, device: str, dtype: str, *extra: str) -> Trainer:
    """Build the trainer that fairseq-train builds from the same command line; `extra` are further options."""
    command = [
        str(data), f"--user-dir={USER_DIR}", "--arch=transformer_iwslt_de_en", *size.options(),
        "--share-all-embeddings", f"--dropout={setting.dropout}", f"--max-tokens={setting.max_tokens}", "--seed=1",
        "--optimizer=adam", "--adam-betas=(0.9, 0.98)", "--lr=1e-4", "--clip-norm=1.0", "--lr-scheduler=fixed",
        f"--max-update={MAX_UPDATE}", "--distributed-world-size=1", *extra,
    ]  # fmt: skip
    command += ["--cpu"] if device == "cpu" else []
    command += [f"--{dtype}"] if dtype != "fp32" else []
    cfg = convert_namespace_to_omegaconf(options.parse_args_and_arch(options.get_training_parser(), command))
    utils.set_torch_seed(cfg.common.seed)
    task = tasks.setup_task(cfg.task)
    return Trainer(cfg, task, task.build_model(cfg.model), task.build_criterion(cfg.criterion))


def competitors(
    data: Path, teacher: Path, store: Path, setting: Setting, device: str, dtype: str, rungs: Sequence[str]
) -> dict[str, Trainer]:
    """Return trainers whose students have the same initial weights and differ in their criterion or teacher."""
    build = functools.partial(make_trainer, data, setting.student, setting, device, dtype)
    task = ("--task=translation_with_teacher", "--criterion=hard_gate_kd")
    distil = (*task, f"--teacher-path={teacher}")
    return {
        "CE, fairseq": build("--criterion=label_smoothed_cross_entropy", "--label-smoothing=0"),
        f"CE, {rungs[0]}": build("--criterion=hard_gate_kd", "--gate=none", f"--loss-impl={rungs[0]}"),
        **{f"KD, {rung}": build(*distil, "--gate=token", f"--loss-impl={rung}") for rung in (*rungs, "eager")},
        f"KD, {rungs[0]}, stored": build(*task, "--gate=token", f"--teacher-store={store}", f"--loss-impl={rungs[0]}"),
        "no output layer": build("--criterion=sum_of_features"),
    }


def teacher_parts(trainer: Trainer) -> dict[str, Callable[[dict], None]]:
    """Return the parts of a distillation step that run the teacher, as functions of a batch.

    The forward pass must be called before the output product, which uses the hidden states of the last forward pass.
    """
    source = trainer.task.load_teacher()
    dtype = next(trainer.model.parameters()).dtype
    heads: list = []  # hgkd_fairseq.loss.Head of each teacher

    def forward(batch: dict) -> None:
        sample, _ = trainer._prepare_sample(batch)
        heads[:] = source.signal(sample, trainer.device, dtype).heads

    @torch.no_grad()
    def product(batch: dict) -> None:
        kept = (batch["target"] != trainer.task.target_dictionary.pad()).to(trainer.device)
        for head in heads:
            F.linear(head.hidden[kept], head.weight, head.bias)

    return {"teacher's forward pass": forward, "teacher's output product": product}


def three_products(trainer: Trainer) -> dict[str, Callable[[dict], None]]:
    """Return the three products of the student's output layer as a function of a batch.

    They compute the logits and the gradients of the features and of the weight: the minimum for any exact loss.
    """
    weight = next(trainer.model.decoder.output_projection.parameters()).detach()

    @torch.no_grad()
    def products(batch: dict) -> None:
        features = weight.new_ones((batch["ntokens"], weight.size(1)))
        logits = features @ weight.T
        logits @ weight
        logits.T @ features

    return {PRODUCTS: products}


def reading(trainer: Trainer) -> dict[str, Callable[[dict], None]]:
    """Return what a data-loading worker does to read the stored teacher, as a function of a batch.

    This includes fetching the samples from the data set, but not their collation.
    """
    dataset = trainer.task.datasets["train"]
    _, reader, _ = dataset.collater.args

    def read(batch: dict) -> None:
        reader([dataset[int(number)] for number in batch["id"]], batch)

    return {"reading the store": read}


class Row(NamedTuple):
    name: str
    median_ms: float
    p20_ms: float
    p80_ms: float
    over_ce: float  # ratio to "CE, fairseq"
    over_ours: float  # ratio to distillation with the first rung
    tokens_a_second: float  # target tokens, without padding
    peak_mib: float | None  # on a GPU, beyond what is allocated before the pass; None for parts and on the CPU


def measure(setting: Setting, device: str, dtype: str, rungs: Sequence[str], repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rounds = WARM_ROUNDS + repeats
        write_data(folder, setting.vocabulary, 2 * rounds * setting.max_tokens // 24)
        teacher = folder / "teacher.pt"
        build = functools.partial(make_trainer, folder, setting.teacher, setting, device, "fp32")
        untrained = build("--criterion=cross_entropy")
        untrained.consolidate_optimizer()  # Trainer.save_checkpoint requires it
        untrained.save_checkpoint(str(teacher), {})
        from hgkd_fairseq.teacher import storing  # only after fairseq has imported --user-dir

        store = folder / "store"
        storing.write(str(folder), str(teacher), str(store), storing.StoreOptions("hidden", ("train",), dtype))
        trainers = competitors(folder, teacher, store, setting, device, dtype, rungs)
        distilling, stored = f"KD, {rungs[0]}", f"KD, {rungs[0]}, stored"
        batches = trainers[stored].get_train_iterator(1).next_epoch_itr(shuffle=True)
        chosen = list(itertools.islice(batches, rounds))
        parts = teacher_parts(trainers[distilling]) | reading(trainers[stored]) | three_products(trainers[stored])
        times = take_turns(trainers, parts, chosen, device)
        peaks = {name: peak(trainer, chosen[-1]) for name, trainer in trainers.items()} if device == "cuda" else {}
    base, ours = times["CE, fairseq"], times[distilling]
    tokens = [batch["ntokens"] for batch in chosen[WARM_ROUNDS:]]
    return [
        Row(
            name,
            *(1e3 * value for value in (statistics.median(mine), quantile(mine, 0.2), quantile(mine, 0.8))),
            median_ratio(mine, base),
            median_ratio(mine, ours),
            statistics.median(count / time for count, time in zip(tokens, mine, strict=True)),
            peaks.get(name),
        )
        for name, mine in times.items()
    ]


def peak(trainer: Trainer, batch: dict) -> float:
    """Return the peak memory of a forward and backward pass in MiB, beyond what is allocated before it.

    The peak of a whole `Trainer.train_step` cannot be read, because that resets the allocator's peak before it returns.
    """
    sample, _ = trainer._prepare_sample(batch)
    trainer.model.train()
    trainer.zero_grad()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.criterion(trainer.model, sample)[0].backward()
    torch.cuda.synchronize()
    found = (torch.cuda.max_memory_allocated() - before) / 2**20
    trainer.zero_grad()
    return found


def take_turns(
    trainers: dict[str, Trainer], parts: dict[str, Callable[[dict], None]], batches: list[dict], device: str
) -> dict[str, list[float]]:
    """Time a step of every trainer and every part on each batch.

    Every trainer first runs an untimed step on the batch: on a GPU, the first step on a batch of a new shape takes at
    least 100 ms longer, whichever trainer it is. The parts run after the trainers, in their order, because the
    teacher's output product uses the result of its forward pass.

    Returns:
        Seconds by name, one value for each batch except the first WARM_ROUNDS.
    """

    from hgkd_fairseq.teacher.stored import BATCH, StoredTeacher  # only after fairseq has imported --user-dir

    def step(trainer: Trainer, batch: dict) -> None:
        # Only a stored teacher needs what the batches hold of the store, which the others would copy to a GPU.
        if not isinstance(getattr(trainer.task, "teacher", None), StoredTeacher):
            batch = {name: value for name, value in batch.items() if name != BATCH}
        trainer.train_step([batch])

    for trainer in trainers.values():
        trainer.begin_epoch(1)
    runs = {name: functools.partial(step, trainer) for name, trainer in trainers.items()}
    times: dict[str, list[float]] = {name: [] for name in (*runs, *parts)}
    for index, batch in enumerate(batches):
        for run in runs.values():
            run(batch)
        turn = interleaved({name: functools.partial(run, batch) for name, run in runs.items()}, 1, device, seed=index)
        turn |= {name: [seconds(functools.partial(part, batch), device)] for name, part in parts.items()}
        if index >= WARM_ROUNDS:
            for name, (value,) in turn.items():
                times[name].append(value)
    return times


def summary(rows: list[Row]) -> Iterator[str]:
    by = {row.name: row for row in rows}
    ours, eager = next(row for row in rows if row.name.startswith("KD")), by["KD, eager"]
    yield f"A step of KD ({ours.name}) over one of CE (fairseq): {ours.over_ce:.2f}; of eager KD: {eager.over_ce:.2f}."
    yield f"A step of eager KD over one of {ours.name}: {eager.over_ours:.2f}."
    parts = [by[f"teacher's {part}"].over_ours for part in ("forward pass", "output product")]
    yield f"Of a step of {ours.name}: teacher's forward pass {parts[0]:.0%}, its output product {parts[1]:.0%}."
    stored = by[f"{ours.name}, stored"]
    waits = by["reading the store"].median_ms / stored.median_ms
    yield f"A step of {stored.name}, over one of CE (fairseq): {stored.over_ce:.2f}; it is read in {waits:.1%} of that."
    bare, products = by["no output layer"].over_ce, by[PRODUCTS].over_ce
    yield f"Without an output layer {bare:.2f} of CE (fairseq), its products {products:.2f}: the sum is the least."
    if ours.peak_mib and eager.peak_mib:
        yield f"Peak memory of a step of eager KD over one of {ours.name}: {eager.peak_mib / ours.peak_mib:.2f}."


def size(values: list[int] | None, default: Size) -> Size:
    return Size(*values) if values else default


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch-size", nargs="+", default=["quickstart"], choices=SETTINGS)
    sizes = {"nargs": 4, "type": int, "metavar": ("DIM", "FFN", "ENCODER_LAYERS", "DECODER_LAYERS")}
    parser.add_argument("--student", **sizes, help="another size of student")
    parser.add_argument("--teacher", **sizes, help="another size of teacher")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--device", default="cpu", choices=list(RUNGS))
    parser.add_argument("--rungs", nargs="+", help="values of --loss-impl, ours first (default: those of the device)")
    parser.add_argument("--dtype", nargs="+", default=["fp32"], choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--csv", type=Path, help="append the measurements there")
    parser.add_argument("--markdown", type=Path, help="append the tables there")
    args = parser.parse_args()
    if args.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}: a median of fewer says little")
    settings = [
        Setting(
            size(args.student, chosen.student),
            size(args.teacher, chosen.teacher),
            args.vocabulary or chosen.vocabulary,
            args.max_tokens or chosen.max_tokens,
            chosen.dropout,
        )
        for chosen in map(SETTINGS.__getitem__, args.arch_size)
    ]
    logging.disable(logging.INFO)
    utils.import_user_module(argparse.Namespace(user_dir=str(USER_DIR)))
    where = environment(args.device)
    title = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    for setting, dtype in itertools.product(settings, args.dtype):
        rows = measure(setting, args.device, dtype, args.rungs or RUNGS[args.device], args.repeats)
        table = [
            [
                *(row.name, f"{row.median_ms:.1f}", f"{row.p20_ms:.1f} to {row.p80_ms:.1f}"),
                *(f"{row.over_ce:.3f}", f"{row.over_ours:.3f}"),
                *(f"{row.tokens_a_second:,.0f}", "" if row.peak_mib is None else f"{row.peak_mib:,.0f}"),
            ]
            for row in rows
        ]
        shape = (
            f"{dtype}, student {'/'.join(map(str, setting.student))}, teacher {'/'.join(map(str, setting.teacher))}, "
            f"V={setting.vocabulary}, batches of {setting.max_tokens} tokens"
        )
        text = "\n\n".join([
            f"{title}\n{shape}",
            markdown(HEADINGS, table).strip(),
            "\n".join(summary(rows)) + "\n",
        ])  # fmt: skip
        print(text, flush=True)
        if args.markdown:
            with args.markdown.open("a") as out:
                out.write(text + "\n")
        if args.csv:
            common = {
                **where, "dtype": dtype, "student": "/".join(map(str, setting.student)),
                "teacher": "/".join(map(str, setting.teacher)), "vocabulary": setting.vocabulary,
                "max_tokens": setting.max_tokens, "repeats": args.repeats,
            }  # fmt: skip
            append_csv(args.csv, [{**common, **row._asdict()} for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
