#!/usr/bin/env python3
"""The loss head alone: time over the floor, against peers, one process, interleaved repeats; one CSV row a measurement.

    python scripts/benchmarks/loss.py                          2 CPU cores' worth of shapes
    python scripts/benchmarks/loss.py --device cuda --csv out.csv

The FLOOR is the four matrix products alone, in the chunks that ours uses: two forward, two backward. Every contestant
does one forward and one backward pass: student hidden states and weight get their gradients.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from hgkd_fairseq import gates
from hgkd_fairseq.loss import chunked, gated_distillation

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TAU = 1.5
PADDING = 1


@gates.register_gate("always", equation="data 0, teacher 1", source="plain KL, for comparison with peers")
def always(statistics):
    return gates.hard_weights(torch.ones_like(statistics.student_logprob, dtype=torch.bool), torch.float32)


class Problem:
    """Inputs of one shape: B sentences of `length` tokens, no pads."""

    def __init__(self, tokens: int, dim: int, vocabulary: int, dtype: torch.dtype, device: str, length: int = 32):
        generator = torch.Generator().manual_seed(0)
        sentences = tokens // length

        def normal(*shape, scale=1.0):
            return (torch.randn(*shape, generator=generator) * scale).to(device=device, dtype=dtype)

        self.hidden = normal(sentences, length, dim).requires_grad_()
        self.weight = normal(vocabulary, dim, scale=dim**-0.5).requires_grad_()
        self.teacher_hidden = normal(sentences, length, dim)
        self.teacher_weight = normal(vocabulary, dim, scale=dim**-0.5)
        self.target = torch.randint(2, vocabulary, (sentences, length), generator=generator).to(device)
        self.lengths = [length] * sentences
        self.device = device

    def clear(self):
        self.hidden.grad = self.weight.grad = None


def floor(problem: Problem) -> None:
    """The four products, in chunks, each into a buffer that is used again."""
    hidden, teacher = problem.hidden.detach().flatten(0, 1), problem.teacher_hidden.flatten(0, 1)
    weight, teacher_weight = problem.weight.detach(), problem.teacher_weight
    d_hidden = torch.empty_like(hidden)
    d_weight = torch.empty_like(weight)
    step = chunked.chunk_tokens(hidden.device, weight.size(0))
    z = torch.empty(min(step, hidden.size(0)), weight.size(0), dtype=weight.dtype, device=weight.device)
    z_t = torch.empty_like(z)
    for start in range(0, hidden.size(0), step):
        rows = slice(start, min(start + step, hidden.size(0)))
        count = rows.stop - rows.start
        torch.mm(hidden[rows], weight.t(), out=z[:count])
        torch.mm(teacher[rows], teacher_weight.t(), out=z_t[:count])
        torch.mm(z[:count], weight, out=d_hidden[rows])
        torch.mm(z[:count].t(), hidden[rows], out=d_weight)


def ours(gate: str, implementation: str, temperature: float = TAU) -> Callable[[Problem], None]:
    def run(p: Problem) -> None:
        gated_distillation(
            p.hidden, p.weight, p.teacher_hidden, p.teacher_weight, p.target,
            padding_idx=PADDING, gate=gate, teacher_temperature=temperature, lengths=p.lengths,
            implementation=implementation,
        ).loss.backward()  # fmt: skip

    return run


def eager_peer(gate: str) -> Callable[[Problem], None]:
    """KD as public fairseq code does it: log_softmax of both, gather, kl_div, a mask; autograd over full logits."""

    def run(p: Problem) -> None:
        lprobs = F.log_softmax(F.linear(p.hidden, p.weight).float(), dim=-1)
        with torch.no_grad():
            teacher = F.log_softmax(F.linear(p.teacher_hidden, p.teacher_weight).float() / TAU, dim=-1)
        gold, gold_t = (x.gather(-1, p.target[..., None]).squeeze(-1) for x in (lprobs, teacher))
        margin = (gold - gold_t).detach()
        if gate == "sentence":
            margin = margin.sum(1, keepdim=True).expand_as(margin)
        kl = F.kl_div(lprobs, teacher, log_target=True, reduction="none").sum(-1)
        torch.where(margin > 0, kl, -gold).sum().backward()

    return run


def torch_linear_cross_entropy(p: Problem) -> None:
    F.linear_cross_entropy(
        p.hidden.flatten(0, 1), p.weight, p.target.flatten(), reduction="sum", ignore_index=PADDING
    ).backward()


def liger_kl(p: Problem) -> None:
    """liger-kernel's chunked distillation loss, KL(teacher || student) alone, at temperature 1."""
    loss = LIGER(p.hidden, p)
    loss.backward()


def liger_contestant():
    """A function (hidden, problem) -> loss sum on liger-kernel's chunked base class, or None where it is missing."""
    try:
        from liger_kernel.chunked_loss.fused_linear_distillation import LigerFusedLinearDistillationBase
    except ImportError:
        return None

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

    def run(hidden, p):
        chunk = chunked.chunk_tokens(hidden.device, p.weight.size(0))
        return KL.apply(
            hidden.flatten(0, 1), p.weight, p.teacher_hidden.flatten(0, 1), p.teacher_weight, p.target.flatten(), chunk
        )

    return run


LIGER = liger_contestant()


def contestants(device: str) -> dict[str, Callable[[Problem], None]]:
    best = "triton" if device == "cuda" else "chunked"
    found = {"floor": floor}
    for gate in ("token", "sentence"):
        found[f"{best} {gate}"] = ours(gate, best)
        if best != "chunked":
            found[f"chunked {gate}"] = ours(gate, "chunked")
        found[f"eager peer {gate}"] = eager_peer(gate)
    found[f"{best} always, tau 1"] = ours("always", best, 1.0)
    if LIGER is not None:
        found["liger KL, tau 1"] = liger_kl
    found[f"{best} none (CE)"] = ours("none", best)
    if hasattr(F, "linear_cross_entropy"):
        found["torch linear_cross_entropy (CE)"] = torch_linear_cross_entropy
    return found


def seconds(run: Callable[[Problem], None], problem: Problem) -> float:
    problem.clear()
    synchronize(problem.device)
    start = time.perf_counter()
    run(problem)
    synchronize(problem.device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[Problem], None], problem: Problem) -> int | None:
    """Peak device memory over the inputs; None on the CPU, where it takes a fresh process."""
    if problem.device != "cuda":
        return None
    problem.clear()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(problem)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(problem: Problem, repeats: int, only: str) -> list[dict]:
    runs = {name: run for name, run in contestants(problem.device).items() if only in name or name == "floor"}
    for name, run in list(runs.items()):  # compilation, caches, the allocator
        try:
            for _ in range(3):
                seconds(run, problem)
        except (RuntimeError, TypeError, NotImplementedError, ValueError) as error:
            print(f"    {name}: cannot run here: {str(error).splitlines()[0]}", file=sys.stderr)
            del runs[name]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(seconds(run, problem))
    rows = []
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["floor"], strict=True)]
        rows.append(
            {
                "name": name,
                "median_ms": 1e3 * statistics.median(values),
                "over_floor": statistics.median(ratios),
                "peak_mib": None if (peak := peak_bytes(runs[name], problem)) is None else peak / 2**20,
            }
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--tokens", nargs="+", type=int, default=[4096])
    parser.add_argument("--dim", nargs="+", type=int, default=[512])
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[10000, 32000])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default="", help="only contestants whose name holds this")
    parser.add_argument("--csv", type=Path, help="append the measurements there")
    args = parser.parse_args()
    if args.repeats < 7:
        parser.error("--repeats must be at least 7: a median of fewer says little")
    device = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} x{torch.get_num_threads()}"
    )
    for dtype, tokens, dim, vocabulary in itertools.product(args.dtype, args.tokens, args.dim, args.vocabulary):
        print(f"{device}, torch {torch.__version__}, {dtype}, N={tokens} d={dim} V={vocabulary}, chunks of "
              f"{chunked.chunk_tokens(torch.device(args.device), vocabulary)}")  # fmt: skip
        rows = measure(Problem(tokens, dim, vocabulary, DTYPES[dtype], args.device), args.repeats, args.only)
        for row in rows:
            peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:9.0f} MiB"
            print(f"  {row['name']:34} {row['median_ms']:9.3f} ms {row['over_floor']:7.3f} x floor {peak}")
        if args.csv:
            write(args.csv, rows, device=device, torch=torch.__version__, dtype=dtype, tokens=tokens, dim=dim,
                  vocabulary=vocabulary, repeats=args.repeats)  # fmt: skip
    return 0


def write(file: Path, rows: list[dict], **common) -> None:
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=[*common, *rows[0]])
        if new:
            writer.writeheader()
        writer.writerows({**common, **row} for row in rows)


if __name__ == "__main__":
    sys.exit(main())
