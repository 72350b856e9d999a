#!/usr/bin/env python3
"""What the loss head should cost on a GPU, on paper: flops, bytes moved, what binds, which chunk size; needs no GPU.

    python scripts/benchmarks/roofline.py                       A100, H100 and H200 at four shapes, every chunk size
    python scripts/benchmarks/roofline.py --phases              and each phase at the best and the default chunk size

For N tokens, hidden size d (student and teacher), vocabulary V and chunks of C tokens, in logits of b = 2 bytes, each
chunk takes five phases, as hgkd_fairseq.loss.chunked runs them with the Triton rows:

    student    z_s = h_s W_s^T      2 C V d flops   reads h, W; writes C V b of logits
    teacher    z_t = h_t W_t^T      2 C V d flops   reads h, W; writes C V b
    rows       z_s, z_t -> dz       no product      pass 1 reads 2 C V b, pass 2 reads 2 C V b and writes C V b
    d_hidden   dz W_s               2 C V d flops   reads C V b, W; writes C d b
    d_weight   dW += dz^T h_s       2 C V d flops   reads C V b, h; dW is fp32, V d 4 bytes: a product writes it to a
                                                    temporary, which is read and added to the total: 4 V d 4 bytes;
                                                    "fused", one product that accumulates, moves 2 V d 4: what torch
                                                    has from 2.8 on

A phase takes the longest of: its flops at the peak, divided by how well its tiles fill the chip; its HBM bytes; its L2
bytes. What touches a chunk's logits is L2 traffic where both blocks of logits, 2 C V b, fit in L2, and HBM traffic
otherwise, except that pass 2 reads again what pass 1 of the same row has just read: L2 traffic as long as the rows in
flight fit. Weights, hidden states and dW are HBM traffic. The host needs HOST_SECONDS a chunk to launch them.

Peaks are peaks: real products reach 60 to 80 % of them. The model ranks chunk sizes and names what binds; it is no
promise of a time. Not modelled: tiles that read operands from L2 again, and products that find a weight still in L2.
"""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

HALF, FULL = 2, 4  # bytes of a bf16 and of an fp32 number
CHUNKS = tuple(2**i for i in range(6, 15))
TILES = ((128, 256), (128, 128), (64, 128))  # rows and columns of a product that one multiprocessor makes at a time
MOST_SPLITS = 16  # parts into which a product may cut its inner dimension where tiles are few
ROWS_A_PROCESSOR = 2  # of the row kernel in flight on a multiprocessor: loss/triton/rows.launch_shape at V >= 16384
# About 15 torch operations and a Triton launch from Python. An assumption, to be replaced by a measurement.
HOST_SECONDS = 100e-6


@dataclass(frozen=True)
class Chip:
    name: str
    flops: float  # a second, dense bf16
    hbm: float  # bytes a second
    l2_bytes: float
    l2: float  # bytes a second
    processors: int


# Data sheets: nvidia.com/en-us/data-center/a100 (312 TFLOP/s, 80 GB SXM 2,039 GB/s), /h100 (SXM: 1,979 TFLOP/s with
# sparsity, half of it dense; 3.35 TB/s) and /h200 (the same processors, 4.8 TB/s). L2 sizes and processors: NVIDIA A100
# and H100 architecture white papers. L2 bandwidth: 5,120 bytes a clock (A100 white paper) at 1,410 and 1,755 MHz, as
# tabulated in doi:10.1016/j.ultsonch.2023.106546, table 3 (7,219 and 8,986 GB/s); no figure of NVIDIA's own is known
# for the H100.
CHIPS = (
    Chip("A100", 312e12, 2.039e12, 40e6, 7.219e12, 108),
    Chip("H100", 989e12, 3.35e12, 50e6, 8.986e12, 132),
    Chip("H200", 989e12, 4.8e12, 50e6, 8.986e12, 132),
)


def chip_of(device: str) -> Chip | None:
    """The chip of that device name ("NVIDIA H100 80GB HBM3"), if it is one of them."""
    return next((chip for chip in CHIPS if chip.name in device), None)


class Shape(NamedTuple):
    name: str
    tokens: int
    dim: int
    vocabulary: int


# Tokens a batch on one GPU: fairseq's recipes give IWSLT14 --max-tokens 4096 and the WMT ones 3584 to 8192.
SHAPES = (
    Shape("IWSLT14", 4096, 512, 10_000),
    Shape("WMT base", 8192, 512, 32_000),
    Shape("WMT base, V=37k", 8192, 512, 37_000),
    Shape("WMT big", 8192, 1024, 32_000),
)


class Phase(NamedTuple):
    """One phase of one chunk."""

    name: str
    flops: float
    hbm: float  # bytes
    l2: float  # bytes
    fill: float  # share of the chip that the product's tiles keep busy

    def limits(self, chip: Chip) -> dict[str, float]:
        """Seconds that each resource asks for."""
        return {
            "compute": self.flops / (chip.flops * self.fill),
            "HBM": self.hbm / chip.hbm,
            "L2": self.l2 / chip.l2,
        }

    def seconds(self, chip: Chip) -> float:
        return max(self.limits(chip).values())

    def binds(self, chip: Chip) -> str:
        limits = self.limits(chip)
        return max(limits, key=limits.__getitem__)


class Product(NamedTuple):
    fill: float  # share of the chip that is busy
    partial: float  # L2 bytes of partial sums, where the inner dimension is split


def product(rows: int, columns: int, inner: int, chip: Chip) -> Product:
    """The best of TILES and of the splits of `inner`. Ragged tiles and a last wave that does not fill the chip count
    as idle; each split writes and reads fp32 partial sums."""

    def seconds(option: Product) -> float:
        return 2 * rows * columns * inner / (chip.flops * option.fill) + option.partial / chip.l2

    options = []
    for height, width in TILES:
        tiles = math.ceil(rows / height) * math.ceil(columns / width)
        useful = rows * columns / (tiles * height * width)
        for splits in (2**i for i in range(MOST_SPLITS.bit_length())):
            waves = math.ceil(tiles * splits / chip.processors)
            fill = useful * tiles * splits / (waves * chip.processors)
            partial = 0 if splits == 1 else 2 * splits * rows * columns * FULL
            options.append(Product(fill, partial))
    return min(options, key=seconds)


def phases(shape: Shape, chunk: int, chip: Chip, *, fused: bool = False) -> list[Phase]:
    """The phases of one chunk of `chunk` tokens."""
    _, _, d, V = shape
    logits, weight, hidden = chunk * V * HALF, V * d * HALF, chunk * d * HALF
    resident = 2 * logits <= chip.l2_bytes
    reread = resident or ROWS_A_PROCESSOR * chip.processors * 2 * V * HALF <= chip.l2_bytes
    flops = 2 * chunk * V * d

    def phase(name: str, on_logits: float, hbm: float, shape: tuple[int, int, int] | None, again: float = 0) -> Phase:
        """`on_logits`: bytes that meet a block of logits; `again`: those read for a second time; `hbm`: all others."""
        made = product(*shape, chip) if shape else Product(1.0, 0)
        far = (0 if resident else on_logits) + (0 if reread else again)
        near = on_logits + again - far + made.partial
        return Phase(name, flops if shape else 0, far + hbm, near, made.fill)

    return [
        phase("student", logits, hidden + weight, (chunk, V, d)),
        phase("teacher", logits, hidden + weight, (chunk, V, d)),
        phase("rows", 3 * logits, 0, None, again=2 * logits),
        phase("d_hidden", logits, hidden + weight, (chunk, d, V)),
        phase("d_weight", logits, hidden + (2 if fused else 4) * V * d * FULL, (V, d, chunk)),
    ]


class Prediction(NamedTuple):
    chunk: int
    flops: float
    hbm: float  # bytes
    l2: float  # bytes
    device: float  # seconds
    host: float  # seconds

    @property
    def seconds(self) -> float:
        return max(self.device, self.host)


def predict(shape: Shape, chunk: int, chip: Chip, *, fused: bool = False) -> Prediction:
    """The whole head. A last chunk that is not full counts as a share of one."""
    count = shape.tokens / min(chunk, shape.tokens)
    parts = phases(shape, min(chunk, shape.tokens), chip, fused=fused)
    return Prediction(
        chunk,
        flops=count * sum(p.flops for p in parts),
        hbm=count * sum(p.hbm for p in parts),
        l2=count * sum(p.l2 for p in parts),
        device=count * sum(p.seconds(chip) for p in parts),
        host=math.ceil(count) * HOST_SECONDS,
    )


def best_chunk(shape: Shape, chip: Chip, *, fused: bool = False) -> int:
    """The smallest chunk size within 2 % of the shortest time: chunks cost memory."""
    found = [predict(shape, chunk, chip, fused=fused) for chunk in CHUNKS if chunk <= shape.tokens]
    shortest = min(p.seconds for p in found)
    return next(p.chunk for p in found if p.seconds <= 1.02 * shortest)


def minimum(shape: Shape) -> tuple[float, float]:
    """(flops, bytes): four products; each input read once and each gradient written once, in bf16."""
    _, N, d, V = shape
    return 8 * N * V * d, HALF * (2 * N * d + 2 * V * d + N * d + V * d)


# Passes of eager distillation over its N x V matrices: log_softmax of both heads in fp32, kl_div, autograd. The least
# that each operation moves, as (numbers of 2 bytes, numbers of 4 bytes).
EAGER_PASSES = {
    "two products write logits": (2, 0),
    "both logits to fp32": (2, 2),
    "teacher's logits by temperature": (0, 2),
    "two log_softmax": (0, 4),
    "kl_div, elementwise, and its sum": (0, 4),
    "backward of kl_div": (0, 2),
    "backward of gather, and adding both gradients": (0, 4),
    "backward of log_softmax": (0, 3),
    "gradient to bf16": (1, 1),
    "two products read it": (2, 0),
}


def eager_bytes(shape: Shape) -> float:
    """HBM bytes of eager distillation: its passes over N x V matrices, and the least for everything else."""
    a_number = sum(halves * HALF + fulls * FULL for halves, fulls in EAGER_PASSES.values())
    return shape.tokens * shape.vocabulary * a_number + minimum(shape)[1]


def report(shape: Shape, chip: Chip, default: int, show_phases: bool) -> str:
    _, N, d, V = shape
    flops, least = minimum(shape)
    floor = max(flops / chip.flops, least / chip.hbm)
    eager = flops / chip.flops + eager_bytes(shape) / chip.hbm
    chosen, chosen_fused = best_chunk(shape, chip), best_chunk(shape, chip, fused=True)
    lines = [
        f"### {chip.name}, {shape.name}: N={N} d={d} V={V}, bf16",
        "",
        f"Least: {flops / 1e9:.0f} GFLOP, {least / 1e6:.0f} MB, {floor * 1e6:.0f} us. "
        f"Eager: {eager_bytes(shape) / 1e6:.0f} MB of HBM, {eager * 1e6:.0f} us ({eager / floor:.1f} x).",
        "",
        "| chunk | logit blocks MB | HBM MB | L2 MB | device us | host us | / least | d_weight fused, us | / least |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for chunk in (c for c in CHUNKS if c <= N):
        p, fused = predict(shape, chunk, chip), predict(shape, chunk, chip, fused=True)
        mark = "".join(
            text
            for on, text in (
                (chunk == chosen, " best"),
                (chunk == chosen_fused, " best-fused"),
                (chunk == default, " default"),
            )
            if on
        )
        lines.append(
            f"| {chunk}{mark} | {2 * chunk * V * HALF / 1e6:.0f} | {p.hbm / 1e6:.0f} | {p.l2 / 1e6:.0f} "
            f"| {p.device * 1e6:.0f} | {p.host * 1e6:.0f} | {p.seconds / floor:.2f} "
            f"| {fused.device * 1e6:.0f} | {fused.seconds / floor:.2f} |"
        )
    lines.append("")
    if show_phases:
        lines += phase_table(shape, chip, sorted({chosen, min(default, N)}))
    return "\n".join(lines)


def phase_table(shape: Shape, chip: Chip, chunks: list[int]) -> list[str]:
    lines = [
        "| chunk | phase | GFLOP | chip filled | HBM MB | L2 MB | us | binds |",
        "|---:|---|---:|---:|---:|---:|---:|---|",
    ]
    for chunk in chunks:
        count = shape.tokens / chunk
        lines += [
            f"| {chunk} | {p.name} | {count * p.flops / 1e9:.0f} | {p.fill:.0%} | {count * p.hbm / 1e6:.0f} "
            f"| {count * p.l2 / 1e6:.0f} | {count * p.seconds(chip) * 1e6:.0f} | {p.binds(chip)} |"
            for p in phases(shape, chunk, chip)
        ]
    return [*lines, ""]


def main() -> int:
    import torch

    from hgkd_fairseq.loss.chunked import chunk_tokens

    def default(shape: Shape) -> int:
        return chunk_tokens(torch.device("cuda"), torch.bfloat16, shape.vocabulary)

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", action="store_true", help="also each phase, at the best and the default chunk size")
    args = parser.parse_args()
    for chip in CHIPS:
        for shape in SHAPES:
            print(report(shape, chip, default(shape), args.phases))
    print("Smallest chunk size within 2 % of the best predicted time:\n")
    print("| | default | " + " | ".join(f"{chip.name} | {chip.name}, d_weight fused" for chip in CHIPS) + " |")
    print("|---|---:|" + "---:|" * 2 * len(CHIPS))
    for shape in SHAPES:
        best = (str(best_chunk(shape, chip, fused=fused)) for chip in CHIPS for fused in (False, True))
        print(f"| {shape.name} | {default(shape)} | {' | '.join(best)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
