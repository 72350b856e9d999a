#!/usr/bin/env python3
"""How much of the gradient at the logits fp16 flushes to zero, with and without a factor on it.

    python scripts/benchmarks/flushed.py --vocabulary 10000 32000 --markdown flushed.md

Gradients made in the forward pass know nothing of the loss scale that an fp16 optimizer multiplies in later, and a
mean over N tokens divides them by N. The logits are peaked as a trained student's: normal noise, and for each token a
lead of the gold one, its mean such that the gold token has a probability of 0.4 on average. Gate "token".

    dz flushed     of the entries of dz (N, V) that fp64 gives and that are not 0, those that are 0 in fp16
    of |dz|        the share of sum |dz| that they hold
    error of dH    of dH = dz W with dz rounded to fp16, against fp64, Frobenius norm; the products are exact
    dH flushed     of the entries of that dH, still multiplied by the factor, those that are 0 in fp16
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import markdown
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from hgkd_fairseq.loss.chunked import FP16_SCALE  # noqa: E402

GOLD_PROBABILITY = 0.4
NOISE, SPREAD = 2.0, 4.0  # standard deviations of a logit, and of the gold token's lead
TEACHER_TEMPERATURE = 1.5
HEADER = ("factor on dz", "dz flushed", "of \\|dz\\|", "error of dH", "dH flushed")


class Loss(NamedTuple):
    """Shares, 0 to 1."""

    entries: float
    mass: float
    hidden_error: float
    hidden_entries: float


def peaked_logits(tokens: int, vocabulary: int, target: Tensor, generator: torch.Generator) -> Tensor:
    """(N, V) fp64 logits under which the gold token's mean probability is GOLD_PROBABILITY."""
    noise = NOISE * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    lead = SPREAD * torch.randn(tokens, generator=generator, dtype=torch.float64)
    rows = torch.arange(tokens)
    others = noise.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    low, high = -50.0, 50.0
    for _ in range(60):  # the probability grows with the mean lead
        middle = (low + high) / 2
        mean = torch.sigmoid(noise[rows, target] + lead + middle - others).mean()
        low, high = (middle, high) if mean < GOLD_PROBABILITY else (low, middle)
    noise[rows, target] += lead + low
    return noise


def exact_gradient(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """(N, V) dz of hard-gate distillation in fp64: p - q where the student leads the teacher, else p - onehot."""
    p, q = torch.softmax(student, 1), torch.softmax(teacher / TEACHER_TEMPERATURE, 1)
    gold = target[:, None]
    to_teacher = p.gather(1, gold) > q.gather(1, gold)
    return p - torch.where(to_teacher, q, torch.zeros_like(q).scatter_(1, gold, 1.0))


def flushed(dz: Tensor, weight: Tensor, factor: float) -> Loss:
    """What is lost of `dz` (N, V) and of dz @ `weight` (V, d) where fp16 holds dz times `factor`."""
    rounded = (dz * factor).half()
    lost = (rounded == 0) & (dz != 0)
    d_hidden, exact = rounded.double() @ weight, dz @ weight
    return Loss(
        entries=(lost.sum() / (dz != 0).sum()).item(),
        mass=(dz[lost].abs().sum() / dz.abs().sum()).item(),
        hidden_error=((d_hidden / factor - exact).norm() / exact.norm()).item(),
        hidden_entries=((d_hidden.half() == 0) & (exact != 0)).double().mean().item(),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512, help="tokens that are looked at")
    parser.add_argument("--batch", type=int, default=4096, help="N of the mean")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--vocabulary", nargs="+", type=int, default=[10000, 32000])
    parser.add_argument("--markdown", type=Path, help="append the tables there")
    args = parser.parse_args()
    factors = {f"{FP16_SCALE:g} (ours)": FP16_SCALE, "1": 1.0, f"1 / {args.batch} (a mean)": 1 / args.batch}
    for vocabulary in args.vocabulary:
        generator = torch.Generator().manual_seed(0)
        target = torch.randint(vocabulary, (args.tokens,), generator=generator)
        student, teacher = (peaked_logits(args.tokens, vocabulary, target, generator) for _ in range(2))
        weight = torch.randn(vocabulary, args.dim, generator=generator, dtype=torch.float64) * args.dim**-0.5
        dz = exact_gradient(student, teacher, target)
        rows = [
            [name, *(f"{100 * share:.3g} %" for share in flushed(dz, weight, factor))]
            for name, factor in factors.items()
        ]
        table = f"V={vocabulary}, {args.tokens} tokens:\n\n" + markdown(HEADER, rows)
        print(table)
        if args.markdown:
            with args.markdown.open("a") as out:
                out.write(table + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
