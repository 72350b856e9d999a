#!/usr/bin/env python3
"""Benchmark the loss head alone against a lower bound and other implementations: time, error, memory, compile time.

    python scripts/benchmarks/loss.py --csv loss.csv --markdown loss.md      everything, on the CPU
    python scripts/benchmarks/loss.py --time --tokens 16384                  time alone, larger batches
    python scripts/benchmarks/loss.py --device cuda --shape iwslt wmt-base wmt-big nllb --time --memory

Each contestant runs one forward and one backward pass over N tokens, with hidden size d for student and teacher and
vocabulary V, and computes the gradients of the student's hidden states and weight. There is no padding, and every
sentence has 32 tokens. "Ours" is this package's loss; peers are other implementations.

    products   the floor: only the four matrix products, in the same chunks as ours, with reused output buffers
    token, sentence   hard-gate distillation; peer: log_softmax of both heads, kl_div, a mask, autograd on full logits
    token, stored   the same, where the teacher's log-probabilities of the gold tokens are known in advance (from a
               store), so that its product is computed only for the tokens that the gate gives to the teacher. A random
               0.3 or 0.6 of the tokens are less probable under the teacher than under the student: this is the share
               of the teacher for the token gate. The sentence gate ("sentence, stored") decides by the sum over each
               sentence, which gives the teacher about 0.01 or 0.87 of the tokens.
    KL         KL divergence from the teacher at temperature 1, no gate; peer: liger-kernel's compiled chunked loss,
               which divides by N itself (pip install --no-deps liger-kernel==0.8.5)
    CE         only cross-entropy; peer: torch's linear_cross_entropy, plain and chunked

TRL-style peers compute the loss in chunks of 256 tokens and recompute each chunk's logits in the backward pass. On a
GPU, ours also runs with several chunk sizes, and the eager peers also under torch.compile.

Time: all contestants run in turn in one process; the median, the 20th and 80th percentiles, and the median of the
ratios within a round. On a GPU, measured between two events, with the L2 cache flushed before each pass; and once more
("queued") with the device kept busy until the host has queued the whole pass, as in a training whose host is ahead of
the device.
Error: of the gradients of KL against fp64 arithmetic on the same inputs, in the maximum and in the Frobenius norm.
Memory: the peak beyond the inputs, including gradients; for the floor and ours also at 4 N. On the CPU, each contestant
runs in a fresh process.
Compile time: the first call minus the second in a fresh process, first with an empty cache on disk, then with the cache
of that process.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import gc
import itertools
import logging
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import roofline
import torch
import torch.nn.functional as F
from measuring import (
    DTYPES,
    LEAST_REPEATS,
    RUNGS,
    append_csv,
    device_seconds,
    environment,
    in_fresh_process,
    interleaved,
    markdown,
    median_ratio,
    quantile,
    seconds,
    synchronize,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hgkd_fairseq.loss import chunked, gated_distillation  # noqa: E402

logging.disable(logging.INFO)  # importing fairseq enables the messages of all libraries

TAU = 1.5  # teacher temperature, except for KL
PADDING = 1
GATES = {"token": "token", "sentence": "sentence", "KL": "always", "CE": "none"}  # value of `gate` for each work
STORED_SHARES = (0.3, 0.6)  # of the tokens to which the stored teacher gives a lower probability than the student
LIGER_CHUNKS = {"cpu": (256, 1024), "cuda": (1024, 2048, 4096)}
OUR_CHUNKS = (1024, 2048, 4096, 8192)  # on a GPU, in addition to the default and to a single chunk
TRL_CHUNK = 256
TIME, QUEUED = "time", "time, queued"  # measures
GROWTH = 4  # memory is measured at N and at GROWTH N
# With these settings glibc takes blocks of 64 KiB and more from the kernel and returns them when they are freed;
# smaller ones come from a single heap. So resident memory equals memory in use, up to a few hundred KiB.
MEMORY_ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_TOP_PAD_": "0",
    "THP_MEM_ALLOC_ENABLE": "0",
}


# (tokens, dim, vocabulary) of batches in published training settings.
SHAPES = {
    "iwslt": (4096, 512, 10152),
    "wmt-base": (8192, 512, 37000),
    "wmt-big": (8192, 1024, 37000),
    "nllb": (4096, 1024, 256206),
}


class Shape(NamedTuple):
    tokens: int
    dim: int
    vocabulary: int
    dtype: str  # a key of DTYPES
    device: str

    def __str__(self) -> str:
        return f"{self.dtype} N={self.tokens} d={self.dim} V={self.vocabulary}"


class Problem:
    """Random inputs of a shape, without padding; the logits have approximately a standard normal distribution.

    Attributes:
        hidden: (sentences, length, dim) hidden states of the student, with a gradient.
        weight: (vocabulary, dim) output layer of the student, with a gradient.
        teacher_hidden: (sentences, length, dim) hidden states of the teacher.
        teacher_weight: (vocabulary, dim) output layer of the teacher.
        target: (sentences, length) int64 gold tokens.
        lengths: tokens of each sentence.
    """

    def __init__(self, shape: Shape, length: int = 32):
        generator = torch.Generator(shape.device).manual_seed(0)
        sentences = max(1, shape.tokens // length)

        def normal(*sizes: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*sizes, generator=generator, device=shape.device) * scale
            return values.to(DTYPES[shape.dtype])

        self.hidden = normal(sentences, length, shape.dim).requires_grad_()
        self.weight = normal(shape.vocabulary, shape.dim, scale=shape.dim**-0.5).requires_grad_()
        self.teacher_hidden = normal(sentences, length, shape.dim)
        self.teacher_weight = normal(shape.vocabulary, shape.dim, scale=shape.dim**-0.5)
        self.target = torch.randint(2, shape.vocabulary, (sentences, length), generator=generator, device=shape.device)
        self.lengths = [length] * sentences

    @functools.lru_cache  # noqa: B019  a few problems
    def gold(self, share: float) -> Tensor:
        """Return (sentences, length) log-probabilities (nats) of the gold tokens under a stored teacher.

        They are 1 nat below the student's for the tokens of a random `share` of the sentences, and 1 nat above for the
        others, so that the gates "token" and "sentence" open for the same tokens.
        """
        drawn = torch.rand(self.target.size(0), generator=torch.Generator().manual_seed(1))
        opened = (drawn.argsort().argsort() < round(share * len(drawn))).to(self.target.device)[:, None]
        with torch.no_grad():
            found = gated_distillation(
                self.hidden, self.weight, None, None, self.target, padding_idx=PADDING, gate="none"
            )
        return torch.where(opened, -1.0, 1.0) - found.token_nll

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


# --------------------------------------------------------------------------------------------------------- contestants


class Contestant(NamedTuple):
    name: str
    work: str  # "products" or a key of GATES
    run: Callable[[Problem], None]
    peer: bool = False  # another implementation, which may not be installed or not run on this device
    mean: bool = False  # whether its loss is divided by N


def floor(p: Problem) -> None:
    """Compute the four products of a loss head in chunks, with output buffers that are reused."""
    hidden, teacher = p.hidden.detach().flatten(0, 1), p.teacher_hidden.flatten(0, 1)
    weight, teacher_weight = p.weight.detach(), p.teacher_weight
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)
    step = chunked.chunk_tokens(hidden.device, weight.dtype, weight.size(0))
    z = torch.empty(min(step, hidden.size(0)), weight.size(0), dtype=weight.dtype, device=weight.device)
    z_t = torch.empty_like(z)
    for start in range(0, hidden.size(0), step):
        rows = slice(start, min(start + step, hidden.size(0)))
        count = rows.stop - rows.start
        torch.mm(hidden[rows], weight.t(), out=z[:count])
        torch.mm(teacher[rows], teacher_weight.t(), out=z_t[:count])
        torch.mm(z[:count], weight, out=d_hidden[rows])
        torch.mm(z[:count].t(), hidden[rows], out=d_weight)


def ours(work: str, implementation: str) -> Callable[[Problem], None]:
    def run(p: Problem) -> None:
        gated_distillation(
            p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.target,
            padding_idx=PADDING, gate=GATES[work], teacher_temperature=1.0 if work == "KL" else TAU,
            lengths=p.lengths, implementation=implementation,
        ).loss.backward()  # fmt: skip

    return run


def stored(work: str, implementation: str, share: float) -> Callable[[Problem], None]:
    """Return our loss with the teacher's log-probabilities of the gold tokens given, as from a store."""

    def run(p: Problem) -> None:
        gated_distillation(
            p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.target,
            padding_idx=PADDING, gate=GATES[work], teacher_temperature=TAU, lengths=p.lengths,
            teacher_gold=p.gold(share), implementation=implementation,
        ).loss.backward()  # fmt: skip

    return run


def in_chunks_of(size: int, run: Callable[[Problem], None]) -> Callable[[Problem], None]:
    """Return `run`, which must be our loss on a GPU, with chunks of `size` tokens."""

    def resized(p: Problem) -> None:
        chunked.CHUNK_TOKENS["cuda"] = size
        try:
            run(p)
        finally:
            del chunked.CHUNK_TOKENS["cuda"]

    return resized


def eager_loss(work: str, hidden, weight, teacher_hidden, teacher_weight, target) -> Tensor:
    """Return the summed loss computed on full logits, as in published fairseq code.

    Args:
        work: "token", "sentence" or "KL".
        hidden: (sentences, length, dim) hidden states of the student.
        weight: (vocabulary, dim) output layer of the student.
        teacher_hidden: (sentences, length, dim) hidden states of the teacher.
        teacher_weight: (vocabulary, dim) output layer of the teacher.
        target: (sentences, length) gold tokens.
    """
    temperature = 1.0 if work == "KL" else TAU
    lprobs = F.log_softmax(F.linear(hidden, weight).float(), dim=-1)
    with torch.no_grad():
        teacher = F.log_softmax(F.linear(teacher_hidden, teacher_weight).float() / temperature, dim=-1)
    kl = F.kl_div(lprobs, teacher, log_target=True, reduction="none").sum(-1)
    if work == "KL":
        return kl.sum()
    gold, gold_t = (x.gather(-1, target[..., None]).squeeze(-1) for x in (lprobs, teacher))
    margin = (gold - gold_t).detach()
    if work == "sentence":
        margin = margin.sum(1, keepdim=True).expand_as(margin)
    return torch.where(margin > 0, kl, -gold).sum()


def eager_peer(work: str) -> Callable[[Problem], None]:
    """Return the loss on full logits with autograd."""

    def run(p: Problem) -> None:
        eager_loss(work, p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.target).backward()

    return run


def compiled_peer(work: str) -> Callable[[Problem], None]:
    """Return the eager peer under torch.compile with static shapes."""

    def run(p: Problem) -> None:
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
            compiled_loss(work)(work, p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.target).backward()

    return run


@functools.cache
def compiled_loss(work: str) -> Callable[..., Tensor]:
    return torch.compile(eager_loss)


def trl_peer(work: str) -> Callable[[Problem], None]:
    """Return the loss in chunks of 256 tokens with activation checkpointing, as in TRL: the backward pass recomputes
    the logits."""

    def run(p: Problem) -> None:
        total: Tensor | float = 0.0
        # Chunks of whole sentences, which have 32 tokens each.
        rows = max(1, TRL_CHUNK // p.target.size(1))
        for start in range(0, p.target.size(0), rows):
            part = slice(start, start + rows)
            total = total + checkpoint(
                eager_loss, work, p.hidden[part], p.weight, p.teacher_hidden[part], p.teacher_weight, p.target[part],
                use_reentrant=False,
            )  # fmt: skip
        total.backward()

    return run


def liger_kl(chunk: int) -> Callable[[Problem], None]:
    """Return liger-kernel's chunked distillation loss with only KL(teacher || student) and its own compilation."""

    def run(p: Problem) -> None:
        # Compile each chunk size separately: code with dynamic shapes is slower.
        with torch._dynamo.config.patch(automatic_dynamic_shapes=False, recompile_limit=64):
            loss = liger_function().apply(
                p.hidden.flatten(0, 1), p.weight, p.teacher_hidden.flatten(0, 1), p.teacher_weight,
                p.target.flatten(), chunk,
            )  # fmt: skip
            loss.backward()

    return run


@functools.cache
def liger_function() -> type[torch.autograd.Function]:
    from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase

    class KL(LigerFusedLinearDistillationBase):
        @staticmethod
        def distillation_loss_fn(student_logits, teacher_logits, target=None, ignore_index=None, **_):
            return F.kl_div(
                F.log_softmax(student_logits, dim=-1), F.log_softmax(teacher_logits, dim=-1),
                reduction="sum", log_target=True,
            )  # fmt: skip

        @classmethod
        def forward(cls, ctx, hidden, weight, teacher_hidden, teacher_weight, target, chunk):
            return super().forward(
                cls, ctx, hidden, weight, teacher_hidden, teacher_weight, target, None, None,
                chunk_size=chunk, weight_hard_loss=0.0, weight_soft_loss=1.0, beta=None, ignore_index=PADDING,
                temperature=1.0, compiled=True, compute_ce_loss=False,
            )  # fmt: skip

        @staticmethod
        def backward(ctx, grad_output, *_):
            return *LigerFusedLinearDistillationBase.backward(ctx, grad_output)[:2], None, None, None, None

    return KL


def torch_cross_entropy(in_chunks: bool) -> Callable[[Problem], None]:
    """Return torch's linear_cross_entropy (torch 2.13 and later): plain, or chunked if its options are given."""

    def run(p: Problem) -> None:
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if in_chunks else {}
        F.linear_cross_entropy(
            p.hidden.flatten(0, 1), p.weight, p.target.flatten(), reduction="sum", ignore_index=PADDING, **options
        ).backward()

    return run


def contestants(rungs: tuple[str, ...], device: str, only: str = "", without: Sequence[str] = ()) -> list[Contestant]:
    """Return the contestants to run.

    Args:
        rungs: implementations of our loss; the first is "ours", which the others are compared with.
        device: "cpu" or "cuda".
        only: select contestants whose name contains this.
        without: exclude contestants whose name contains any of these.

    Returns:
        The selected contestants and, in any case, the floor and the first rung on the same work.
    """
    found = [Contestant("floor", "products", floor)]
    for work in GATES:
        found += [Contestant(f"{rung} {work}", work, ours(work, rung)) for rung in rungs]
        if device == "cpu" and work in ("token", "sentence"):
            found += [
                Contestant(f"{rung} {work}, stored, {share} of it", work, stored(work, rung, share))
                for rung in rungs
                for share in STORED_SHARES
            ]
        if device == "cuda" and work in ("token", "sentence"):
            run = ours(work, rungs[0])
            found += [Contestant(f"{rungs[0]} {work}, chunks of {n}", work, in_chunks_of(n, run)) for n in OUR_CHUNKS]
            found.append(Contestant(f"{rungs[0]} {work}, one chunk", work, in_chunks_of(2**30, run)))
        if work != "CE":
            found.append(Contestant(f"eager peer {work}", work, eager_peer(work), peer=True))
        if device == "cuda" and work != "CE":
            found.append(Contestant(f"eager peer {work}, compiled", work, compiled_peer(work), peer=True))
        if work in ("token", "KL"):
            found.append(Contestant(f"TRL-style {work}", work, trl_peer(work), peer=True))
    found += [
        Contestant(f"liger KL, chunks of {n}, compiled", "KL", liger_kl(n), peer=True, mean=True)
        for n in LIGER_CHUNKS[device]
    ]
    found.append(Contestant("torch CE", "CE", torch_cross_entropy(False), peer=True))
    found.append(Contestant("torch CE, in chunks", "CE", torch_cross_entropy(True), peer=True))
    chosen = [c for c in found if only in c.name and not any(part in c.name for part in without)]
    needed = {"floor", *(f"{rungs[0]} {c.work}" for c in chosen)}
    return [c for c in found if c in chosen or c.name in needed]


def runs_here(contestant: Contestant, problem: Problem) -> bool:
    """Run a contestant twice to warm up compilation, caches and the allocator.

    Returns:
        False if it is a peer that cannot run here; the reason is printed on standard error.

    Raises:
        Exception: one of our implementations fails.
    """
    try:
        for _ in range(2):
            problem.clear()
            contestant.run(problem)
    except Exception as error:  # a peer may raise anything, depending on its version and on the device
        if not contestant.peer:
            raise
        print(f"    {contestant.name}: cannot run here: {str(error).strip().splitlines()[0]}", file=sys.stderr)
        return False
    return True


# -------------------------------------------------------------------------------------------------------- measurements


class Row(NamedTuple):
    measure: str
    name: str
    value: float
    unit: str
    over_floor: float | None
    over_ours: float | None
    repeats: int
    p20: float | None = None  # in the same unit
    p80: float | None = None
    over_predicted: float | None = None  # ratio to the prediction of roofline.py, for ours on a GPU in bf16


def time_rows(shape: Shape, entrants: list[Contestant], repeats: int) -> Iterator[Row]:
    torch._dynamo.reset()  # code compiled for previous shapes counts towards the limit of recompilations
    problem = Problem(shape)
    entrants = [c for c in entrants if runs_here(c, problem)]
    runs = {c.name: functools.partial(c.run, problem) for c in entrants}
    best = ours_by_work(entrants)
    for measure, queued in ((TIME, False), (QUEUED, True)) if shape.device == "cuda" else ((TIME, False),):
        clock = functools.partial(device_seconds, queued=queued)
        times = interleaved(runs, repeats, shape.device, before=problem.clear, clock=clock)
        for contestant in entrants:
            mine = times[contestant.name]
            predicted = prediction(contestant, shape)
            yield Row(
                measure,
                contestant.name,
                1e3 * statistics.median(mine),
                "ms",
                median_ratio(mine, times["floor"]),
                median_ratio(mine, times[best[contestant.work]]) if contestant.work in best else None,
                repeats,
                *(1e3 * quantile(mine, share) for share in (0.2, 0.8)),
                over_predicted=statistics.median(mine) / predicted if predicted else None,
            )


def prediction(contestant: Contestant, shape: Shape) -> float | None:
    """Return the time in seconds that the roofline model predicts for our loss with the contestant's chunk size.

    None if the model does not apply: a peer, another work than "token" or "sentence", another data type than bf16, or
    an unknown chip.
    """
    chip = roofline.chip_of(torch.cuda.get_device_name()) if shape.device == "cuda" else None
    if chip is None or shape.dtype != "bf16" or contestant.peer or contestant.work not in ("token", "sentence"):
        return None
    if found := re.search(r"chunks of (\d+)", contestant.name):
        chunk = int(found[1])
    elif "one chunk" in contestant.name:
        chunk = shape.tokens
    else:
        chunk = chunked.chunk_tokens(torch.device(shape.device), DTYPES[shape.dtype], shape.vocabulary)
    return roofline.predict(roofline.Shape("", *shape[:3]), chunk, chip, fused=True).seconds


def ours_by_work(entrants: list[Contestant]) -> dict[str, str]:
    """Return the name of the first contestant of each work that is not a peer."""
    return {c.work: c.name for c in reversed(entrants) if not c.peer and c.work in GATES}


def error_rows(shape: Shape, entrants: list[Contestant]) -> Iterator[Row]:
    """Yield the relative errors of the gradients of KL against fp64."""
    torch._dynamo.reset()
    problem = Problem(shape)
    truth = true_gradients(problem)
    found: dict[str, dict[str, float]] = {}
    entrants = [c for c in entrants if c.work == "KL" and runs_here(c, problem)]
    for contestant in entrants:
        problem.clear()
        contestant.run(problem)
        made = {"dH": problem.hidden.grad.flatten(0, 1), "dW": problem.weight.grad}
        found[contestant.name] = {}
        for name, gradient in made.items():
            exact = truth[name]
            difference = gradient.double() * (problem.target.numel() if contestant.mean else 1) - exact
            found[contestant.name][f"error {name} max"] = (difference.abs().max() / exact.abs().max()).item()
            found[contestant.name][f"error {name} norm"] = (difference.norm() / exact.norm()).item()
    best = ours_by_work(entrants).get("KL")
    for name, errors in found.items():
        for measure, error in errors.items():
            over_ours = error / found[best][measure] if best else None
            yield Row(measure, name, error, "relative", None, over_ours, 1)


def true_gradients(problem: Problem) -> dict[str, Tensor]:
    """Return the gradients dH (N, d) and dW (V, d) of the summed KL at temperature 1, in fp64."""
    hidden, teacher_hidden = (x.detach().flatten(0, 1).double() for x in (problem.hidden, problem.teacher_hidden))
    weight, teacher_weight = problem.weight.detach().double(), problem.teacher_weight.double()
    d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
    for rows in torch.arange(hidden.size(0), device=hidden.device).split(256):
        dz = torch.softmax(hidden[rows] @ weight.t(), 1) - torch.softmax(teacher_hidden[rows] @ teacher_weight.t(), 1)
        d_hidden[rows] = dz @ weight
        d_weight.addmm_(dz.t(), hidden[rows])
    return {"dH": d_hidden, "dW": d_weight}


def memory_rows(shape: Shape, entrants: list[Contestant], rungs: tuple[str, ...]) -> Iterator[Row]:
    """Yield the peak memory of each contestant at N tokens, and of the floor and ours at GROWTH N.

    On the CPU each contestant runs in a new process, after another one that fills the compiler's cache on disk. On a
    GPU they run in this process and torch's allocator reports the peak.
    """
    best = ours_by_work(entrants)
    peaks: dict[str, int] = {}
    measure: Callable[..., int | None] = functools.partial(in_fresh_process, peak_bytes, environment=MEMORY_ENVIRONMENT)
    warm = min(shape.tokens, 2 * max(LIGER_CHUNKS["cpu"]))
    if shape.device == "cuda":
        measure, warm = peak_bytes, shape.tokens
    for contestant in entrants:
        if measure(contestant.name, rungs, shape._replace(tokens=warm), warm) is None:
            continue
        peaks[contestant.name] = measure(contestant.name, rungs, shape, warm)
        if peaks[contestant.name] is not None and contestant.name in ("floor", *best.values()):
            grown = measure(contestant.name, rungs, shape._replace(tokens=GROWTH * shape.tokens), warm)
            if grown is not None:
                yield Row(f"peak memory at {GROWTH} N", contestant.name, grown / 2**20, "MiB", None, None, 1)
    for contestant in entrants:
        if contestant.name in peaks:
            peak, mine = peaks[contestant.name], peaks.get(best.get(contestant.work, ""))
            over_ours = peak / mine if mine else None
            yield Row("peak memory", contestant.name, peak / 2**20, "MiB", peak / peaks["floor"], over_ours, 1)


def peak_bytes(name: str, rungs: tuple[str, ...], shape: Shape, warm_tokens: int) -> int | None:
    """Return the peak memory of one pass in bytes, beyond the inputs; None for a peer that cannot run.

    On the CPU it must be called in a new process. A pass on `warm_tokens` tokens runs first, so that the memory for
    compilation, for the initialisation of libraries and for their threads is not counted.
    """
    (contestant,) = [c for c in contestants(rungs, shape.device) if c.name == name]
    try:
        if not runs_here(contestant, Problem(shape._replace(tokens=warm_tokens))):
            return None
        problem = Problem(shape)
    except torch.OutOfMemoryError:
        return None
    gc.collect()
    if shape.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contestant.run(problem)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to the current resident memory
    before = resident_bytes("VmRSS")
    contestant.run(problem)
    return resident_bytes("VmHWM") - before


def resident_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def compile_rows(shape: Shape, rungs: tuple[str, ...], only: str) -> Iterator[Row]:
    """Yield the compile times of the rungs that are compiled, for each work."""
    for rung, work in itertools.product([rung for rung in rungs if rung != "chunked"], GATES):
        name = f"{rung} {work}"
        if only not in name:
            continue
        with tempfile.TemporaryDirectory() as cache:
            variables = {"XDG_CACHE_HOME": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
            for state in ("cold", "from disk"):
                value = in_fresh_process(compile_seconds, name, rungs, shape, environment=variables)
                yield Row(f"compile, {state}", name, value, "s", None, None, 1)


def compile_seconds(name: str, rungs: tuple[str, ...], shape: Shape) -> float:
    """Return the seconds of the first call minus those of the second, on one sentence; to be run in a new process."""
    (contestant,) = [c for c in contestants(rungs, shape.device) if c.name == name]
    problem = Problem(shape._replace(tokens=32))
    floor(problem)  # loads the libraries for matrix products
    first, second = (seconds(functools.partial(contestant.run, problem), shape.device) for _ in range(2))
    return first - second


def profile(shape: Shape, rungs: tuple[str, ...]) -> str:
    """Return torch's profile of one pass of ours (gate "token") and, for bf16 on a known GPU, the roofline's phases."""
    problem, run = Problem(shape), ours("token", rungs[0])
    for _ in range(3):
        problem.clear()
        run(problem)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if shape.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    problem.clear()
    with torch.profiler.profile(activities=activities) as profiler:
        run(problem)
        synchronize(shape.device)
    key = "self_cuda_time_total" if shape.device == "cuda" else "self_cpu_time_total"
    lines = [f"{shape}, one pass of {rungs[0]} token:", profiler.key_averages().table(sort_by=key, row_limit=14)]
    chip = roofline.chip_of(torch.cuda.get_device_name()) if shape.device == "cuda" else None
    if chip and shape.dtype == "bf16":
        chunk = chunked.chunk_tokens(torch.device("cuda"), DTYPES[shape.dtype], shape.vocabulary)
        lines += roofline.phase_table(roofline.Shape("", *shape[:3]), chip, [min(chunk, shape.tokens)])
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- reports


class Claim(NamedTuple):
    """A performance target: on 2 CPU cores at N=4096, d=512, by dtype; on an H100 at the shape wmt-base in bf16."""

    text: str
    at_most: bool  # whether the target is an upper bound; otherwise a lower bound
    wanted: dict[str, float]  # targets on the CPU, by dtype
    vocabulary: int | None = None  # the only vocabulary size with a target on the CPU; None: any
    on_gpu: float | None = None  # target on the GPU

    def aim(self, shape: Shape) -> float | None:
        if shape.device == "cuda":
            asked = (*shape[:3], shape.dtype) == (*SHAPES["wmt-base"], "bf16")
            return self.on_gpu if asked else None
        asked = (shape.tokens, shape.dim) == (4096, 512) and self.vocabulary in (None, shape.vocabulary)
        return self.wanted.get(shape.dtype) if asked else None


OVER_FLOOR = Claim("time / floor", True, {"fp32": 1.10, "bf16": 1.20}, on_gpu=1.5)
OVER_FLOOR_QUEUED = Claim("time / floor, queued", True, {}, on_gpu=1.5)
STORED = {
    0.3: Claim("time / floor, a stored teacher's share 0.3", True, {"fp32": 0.90}),
    0.6: Claim("time / floor, a stored teacher's share 0.6", True, {"fp32": 0.97}),
}
STORED_OVER_LIVE = Claim("a stored teacher's share 0.6 / live", True, {"fp32": 1.0, "bf16": 1.0})
EAGER = Claim("eager peer / ours", False, {"fp32": 1.5, "bf16": 2.4}, on_gpu=3.5)
LIGER = Claim("liger at its best chunk size / ours", False, {"fp32": 1.1, "bf16": 1.0}, on_gpu=1.0)
LIGER_ERROR = Claim("error of dH, liger / ours", False, {})
MEMORY = Claim("peak memory, eager peer / ours", False, {"fp32": 14, "bf16": 9}, vocabulary=32000, on_gpu=5)
MEMORY_GROWTH = Claim(f"peak memory, growth to {GROWTH} N over the floor's", True, {"fp32": 1.1, "bf16": 1.1})


def claims(rows: list[Row], rungs: tuple[str, ...]) -> Iterator[tuple[Claim, str, float]]:
    """Yield (claim, work, measured value) for the rows of a shape."""
    by = {(row.measure, row.name): row for row in rows}
    grown = f"peak memory at {GROWTH} N"
    for work in ("token", "sentence"):
        mine, eager = f"{rungs[0]} {work}", f"eager peer {work}"
        for measure, claim in ((TIME, OVER_FLOOR), (QUEUED, OVER_FLOOR_QUEUED)):
            if row := by.get((measure, mine)):
                yield claim, work, row.over_floor
        for share, claim in STORED.items():
            if row := by.get((TIME, f"{mine}, stored, {share} of it")):
                yield claim, work, row.over_floor
        if row := by.get((TIME, f"{mine}, stored, 0.6 of it")):
            yield STORED_OVER_LIVE, work, row.over_ours
        if row := by.get((TIME, eager)):
            yield EAGER, work, row.over_ours
        if row := by.get(("peak memory", eager)):
            yield MEMORY, work, row.over_ours
        if (grown, mine) in by:
            own, floors = (by[grown, name].value / by["peak memory", name].value for name in (mine, "floor"))
            yield MEMORY_GROWTH, work, own / floors
    liger = [row for (measure, name), row in by.items() if measure == TIME and name.startswith("liger")]
    if liger:
        fastest = min(liger, key=lambda row: row.value)
        yield LIGER, "KL", fastest.over_ours
        if row := by.get(("error dH norm", fastest.name)):
            yield LIGER_ERROR, "KL", row.over_ours


def summary(results: dict[Shape, list[Row]], rungs: tuple[str, ...], title: str) -> str:
    """Return a markdown report: the targets with the measured values, then all measurements of each shape."""
    lines = [f"{title}\n"]
    claimed = []
    for shape, rows in results.items():
        for claim, work, measured in claims(rows, rungs):
            aim, limit, held = claim.aim(shape), "", ""
            if aim is not None:
                limit = f"{'<=' if claim.at_most else '>='} {aim}"
                held = "yes" if (measured <= aim if claim.at_most else measured >= aim) else "no"
            claimed.append([f"{claim.text}, {work}", str(shape), f"{measured:.2f}", limit, held])
    if claimed:
        lines.append(markdown(["", "shape", "measured", "wanted", "held"], claimed))
    for shape, rows in results.items():
        lines.append(f"{shape}:\n")
        table = [
            [
                *(f"{r.measure}, {r.name}", f"{r.value:.4g} {r.unit}", spread(r)),
                *map(ratio, (r.over_floor, r.over_ours, r.over_predicted)),
            ]
            for r in rows
        ]
        lines.append(markdown(["", "value", "p20 to p80", "/ floor", "/ ours", "/ predicted"], table))
    return "\n".join(lines)


def spread(row: Row) -> str:
    return "" if row.p20 is None else f"{row.p20:.4g} to {row.p80:.4g}"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def measurements(shape: Shape, args: argparse.Namespace) -> Iterator[Row]:
    entrants = contestants(args.rungs, shape.device, args.only, args.without)
    if args.time:
        yield from time_rows(shape, entrants, args.repeats)
    if args.errors:
        yield from error_rows(shape, entrants)
    if args.memory:
        yield from memory_rows(shape, entrants, args.rungs)
    if args.compile_time:
        yield from compile_rows(shape, args.rungs, args.only)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=list(RUNGS))
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--dim", nargs="+", type=int, default=[512])
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[10000, 32000])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--only", default="", help="only names that hold this, besides the floor and ours on the same work"
    )
    parser.add_argument("--without", nargs="+", default=[], help="none whose name holds one of these")
    parser.add_argument(
        "--shape", nargs="+", choices=SHAPES, help="sizes of published settings, instead of --tokens --dim --vocabulary"
    )
    parser.add_argument("--rungs", nargs="+", help="implementations, ours first (default: those of the device)")
    parser.add_argument("--csv", type=Path, help="append the measurements there")
    parser.add_argument("--markdown", type=Path, help="write the summary there")
    parser.add_argument("--profile", action="store_true", help="also print what one pass of ours runs on the device")
    measures = ("time", "errors", "memory", "compile-time")
    for measure in measures:
        parser.add_argument(f"--{measure}", action="store_true", help="measure this (default: everything)")
    args = parser.parse_args()
    if args.repeats < LEAST_REPEATS:
        parser.error(f"--repeats must be at least {LEAST_REPEATS}: a median of fewer says little")
    names = [measure.replace("-", "_") for measure in measures]
    if not any(getattr(args, name) for name in names):
        vars(args).update(dict.fromkeys(names, True))
    args.rungs = tuple(args.rungs or RUNGS[args.device])
    return args


def main() -> int:
    args = arguments()
    where = environment(args.device)
    title = ", ".join(f"{key} {value}" for key, value in where.items() if value != "")
    print(title)
    results: dict[Shape, list[Row]] = {}
    sizes = [SHAPES[name] for name in args.shape or ()]
    sizes = sizes or list(itertools.product(args.tokens, args.dim, args.vocabulary))
    for dtype, size in itertools.product(args.dtype, sizes):
        shape = Shape(*size, dtype, args.device)
        chunk = chunked.chunk_tokens(torch.device(args.device), DTYPES[dtype], shape.vocabulary)
        print(f"{shape}, chunks of {chunk}", flush=True)
        results[shape] = []
        for row in measurements(shape, args):
            results[shape].append(row)
            print(
                f"  {row.measure:20} {row.name:28} {row.value:11.4g} {row.unit:8} "
                f"{ratio(row.over_floor):>8} / floor {ratio(row.over_ours):>8} / ours",
                flush=True,
            )
            if args.csv:
                append_csv(args.csv, [{**shape._asdict(), **where, **row._asdict()}])
        if args.markdown:  # rewritten after each shape, so that an interrupted run leaves partial results
            args.markdown.write_text(summary(results, args.rungs, title))
        if args.profile:
            print(profile(shape, args.rungs))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
