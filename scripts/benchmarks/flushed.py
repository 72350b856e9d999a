#!/usr/bin/env python3
"""Measure how much of the gradient of the logits is flushed to zero in fp16, with and without a scaling factor.

    python scripts/benchmarks/flushed.py --vocabulary 10000 32000 --markdown flushed.md

Gradients that are computed in the forward pass do not contain the loss scale of an fp16 optimizer, which is applied
later, and a mean over N tokens divides them by N. The logits are as peaked as those of a trained student: normal noise
plus, for each token, a normally distributed lead of the gold token, whose mean is set so that the mean probability of
the gold tokens is 0.4. The gate is "token". All columns are percentages:

    dz flushed     share of the nonzero fp64 entries of dz (N, V) that are 0 in fp16
    of |dz|        share of sum |dz| that these entries hold
    error of dH    relative error (Frobenius norm) of dH = dz W with dz rounded to fp16 and the product in fp64
    dH flushed     share of the entries of that dH, including the factor, that are 0 in fp16 and not 0 in fp64
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
NOISE, SPREAD = 2.0, 4.0  # standard deviations of a logit and of the gold token's lead
TEACHER_TEMPERATURE = 1.5
HEADER = ("factor on dz", "dz flushed", "of \\|dz\\|", "error of dH", "dH flushed")


class Loss(NamedTuple):
    """Precision that is lost in fp16, as shares from 0 to 1; see the columns in the module's docstring."""

    entries: float  # dz flushed
    mass: float  # of |dz|
    hidden_error: float  # error of dH
    hidden_entries: float  # dH flushed


def peaked_logits(tokens: int, vocabulary: int, target: Tensor, generator: torch.Generator) -> Tensor:
    """Return (N, V) fp64 logits under which the mean probability of the gold tokens is GOLD_PROBABILITY."""
    noise = NOISE * torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    lead = SPREAD * torch.randn(tokens, generator=generator, dtype=torch.float64)
    rows = torch.arange(tokens)
    others = noise.scatter(1, target[:, None], -torch.inf).logsumexp(1)
    low, high = -50.0, 50.0
    for _ in range(60):  # bisection: the probability increases with the mean lead
        middle = (low + high) / 2
        mean = torch.sigmoid(noise[rows, target] + lead + middle - others).mean()
        low, high = (middle, high) if mean < GOLD_PROBABILITY else (low, middle)
    noise[rows, target] += lead + low
    return noise


def exact_gradient(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Return the (N, V) fp64 gradient of the summed loss of the gate "token" (HKD-T, arXiv:2210.12427) at the logits.

    A row is p - q if the student gives the gold token more probability than the tempered teacher does, else p - onehot.
    """
    p, q = torch.softmax(student, 1), torch.softmax(teacher / TEACHER_TEMPERATURE, 1)
    gold = target[:, None]
    to_teacher = p.gather(1, gold) > q.gather(1, gold)
    return p - torch.where(to_teacher, q, torch.zeros_like(q).scatter_(1, gold, 1.0))


def flushed(dz: Tensor, weight: Tensor, factor: float) -> Loss:
    """Return what `dz` (N, V) and dz @ `weight` (V, d) lose if dz times `factor` is stored in fp16."""
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
