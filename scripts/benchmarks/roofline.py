#!/usr/bin/env python3
"""Roofline model of the loss head on a GPU: flops, memory traffic, bottleneck and best chunk size; needs no GPU.

    python scripts/benchmarks/roofline.py                       A100, H100 and H200 at four shapes, every chunk size
    python scripts/benchmarks/roofline.py --phases              and each phase at the best and the default chunk size

For N tokens, hidden size d (student and teacher), vocabulary V, chunks of C tokens and logits of b = 2 bytes, each
chunk has five phases, as in hgkd_fairseq.loss.chunked with the Triton kernels:

    student    z_s = h_s W_s^T      2 C V d flops   reads h, W; writes C V b of logits
    teacher    z_t = h_t W_t^T      2 C V d flops   reads h, W; writes C V b
    rows       z_s, z_t -> dz       no product      pass 1 reads 2 C V b, pass 2 reads 2 C V b and writes C V b
    d_hidden   dz W_s               2 C V d flops   reads C V b, W; writes C d b
    d_weight   dW += dz^T h_s       2 C V d flops   reads C V b, h; dW is fp32 and has 4 V d bytes: the product writes a
                                                    temporary, which is read and added to the total, 16 V d bytes;
                                                    "fused": the product accumulates in place, 8 V d bytes (torch 2.8
                                                    and later)

The time of a phase is the maximum of three times: its flops at peak throughput, divided by the share of the chip that
its tiles fill; its HBM traffic; and its L2 traffic. Accesses to a chunk's logits are L2 traffic if both blocks of
logits, 2 C V b bytes, fit in L2, and HBM traffic otherwise. An exception is the second read of the logits in pass 2,
which is L2 traffic as long as the rows in flight fit in L2. Weights, hidden states and dW are HBM traffic. The host
needs HOST_SECONDS to launch a chunk.

Peak numbers are data-sheet values, of which real products reach 60 to 80 %. The model is meant to rank chunk sizes and
to find the bottleneck, not to predict times. It ignores that tiles read operands from L2 repeatedly, and that a weight
may still be in L2 from the previous product.
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

HALF, FULL = 2, 4  # bytes per bf16 and per fp32 number
CHUNKS = tuple(2**i for i in range(6, 15))  # tokens
TILES = ((128, 256), (128, 128), (64, 128))  # rows and columns of the output that a multiprocessor computes at a time
MOST_SPLITS = 16  # maximum number of parts of a product's inner dimension (split-K), for products with few tiles
ROWS_A_PROCESSOR = 2  # rows in flight on a multiprocessor: loss/triton/rows.launch_shape at V >= 16384
# An assumption, not a measurement: about 15 torch operations and a Triton launch from Python.
HOST_SECONDS = 100e-6


@dataclass(frozen=True)
class Chip:
    name: str
    flops: float  # flop/s, dense bf16
    hbm: float  # bytes/s
    l2_bytes: float  # size of the L2 cache
    l2: float  # bytes/s
    processors: int  # number of streaming multiprocessors


# Data sheets: nvidia.com/en-us/data-center/a100 (312 TFLOP/s, 80 GB SXM 2,039 GB/s), /h100 (SXM: 1,979 TFLOP/s with
# sparsity, half of it dense; 3.35 TB/s) and /h200 (the same processors, 4.8 TB/s). L2 sizes and number of processors:
# NVIDIA A100 and H100 architecture white papers. L2 bandwidth: 5,120 bytes per clock (A100 white paper) at 1,410 and
# 1,755 MHz, as tabulated in doi:10.1016/j.ultsonch.2023.106546, table 3 (7,219 and 8,986 GB/s); NVIDIA publishes no
# value for the H100.
CHIPS = (
    Chip("A100", 312e12, 2.039e12, 40e6, 7.219e12, 108),
    Chip("H100", 989e12, 3.35e12, 50e6, 8.986e12, 132),
    Chip("H200", 989e12, 4.8e12, 50e6, 8.986e12, 132),
)


def chip_of(device: str) -> Chip | None:
    """Return the entry of CHIPS for a device name such as "NVIDIA H100 80GB HBM3", or None if there is none."""
    return next((chip for chip in CHIPS if chip.name in device), None)


class Shape(NamedTuple):
    name: str
    tokens: int
    dim: int
    vocabulary: int


# Tokens per batch on one GPU: fairseq's recipes use --max-tokens 4096 for IWSLT14 and 3584 to 8192 for WMT.
SHAPES = (
    Shape("IWSLT14", 4096, 512, 10_000),
    Shape("WMT base", 8192, 512, 32_000),
    Shape("WMT base, V=37k", 8192, 512, 37_000),
    Shape("WMT big", 8192, 1024, 32_000),
)


class Phase(NamedTuple):
    """Work of one phase of one chunk."""

    name: str
    flops: float
    hbm: float  # bytes
    l2: float  # bytes
    fill: float  # share of the chip that the product's tiles keep busy

    def limits(self, chip: Chip) -> dict[str, float]:
        """Return the seconds that the phase would take if only "compute", only "HBM" or only "L2" limited it."""
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
    partial: float  # L2 traffic of partial sums in bytes, if the inner dimension is split


def product(rows: int, columns: int, inner: int, chip: Chip) -> Product:
    """Return the fastest combination of a tile size and a number of splits for a (rows, inner) @ (inner, columns)
    product.

    The parts of tiles outside the output and of the last wave without tiles count as idle. Each split writes and reads
    fp32 partial sums.
    """

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
    """Return the five phases of a chunk.

    Args:
        shape: size of the loss head.
        chunk: tokens in the chunk.
        chip: GPU.
        fused: whether the product of d_weight accumulates in place.
    """
    _, _, d, V = shape
    logits, weight, hidden = chunk * V * HALF, V * d * HALF, chunk * d * HALF
    resident = 2 * logits <= chip.l2_bytes
    reread = resident or ROWS_A_PROCESSOR * chip.processors * 2 * V * HALF <= chip.l2_bytes
    flops = 2 * chunk * V * d

    def phase(name: str, on_logits: float, hbm: float, shape: tuple[int, int, int] | None, again: float = 0) -> Phase:
        """Return a phase.

        Args:
            name: name of the phase.
            on_logits: bytes of logits that are read for the first time or written.
            hbm: bytes of all other operands and results.
            shape: (rows, columns, inner) of the product; None if the phase has no product.
            again: bytes of logits that are read for a second time.
        """
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
    """Return the predicted cost of the whole loss head; arguments as in :func:`phases`.

    On the device, a partial last chunk costs its share of a full one. `chunk` is limited to the tokens of the shape.
    """
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
    """Return the smallest chunk size within 2 % of the shortest predicted time; larger chunks need more memory."""
    found = [predict(shape, chunk, chip, fused=fused) for chunk in CHUNKS if chunk <= shape.tokens]
    shortest = min(p.seconds for p in found)
    return next(p.chunk for p in found if p.seconds <= 1.02 * shortest)


def minimum(shape: Shape) -> tuple[float, float]:
    """Return the minimum (flops, bytes) of the loss head: four products; inputs read and gradients written once, in
    bf16."""
    _, N, d, V = shape
    return 8 * N * V * d, HALF * (2 * N * d + 2 * V * d + N * d + V * d)


# Passes of eager distillation over its N x V matrices: log_softmax of both heads in fp32, kl_div, autograd. The minimum
# that each operation moves per matrix entry, as (2-byte numbers, 4-byte numbers).
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
    """Return the HBM traffic of eager distillation in bytes: EAGER_PASSES, and the minimum for everything else."""
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
    for chunk in sorted({c for c in CHUNKS if c <= N} | {min(default, N)}):
        p, fused = predict(shape, chunk, chip), predict(shape, chunk, chip, fused=True)
        mark = "".join(
            text
            for on, text in (
                (chunk == chosen, " best"),
                (chunk == chosen_fused, " best-fused"),
                (chunk == min(default, N), " default"),
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
