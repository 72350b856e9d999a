"""What the benchmarks share: where they run, interleaved timing, fresh processes, CSV rows and markdown tables."""

from __future__ import annotations

import csv
import functools
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Implementations of the loss worth measuring on a device; the first is "ours".
RUNGS = {"cpu": ("native", "chunked"), "cuda": ("triton", "chunked")}
LEAST_REPEATS = 7  # a median of fewer says little


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def environment(device: str) -> dict[str, str | int]:
    """The columns that say where a number comes from."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "cpu": cpu_model(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": version("triton"),
        "liger": version("liger-kernel"),
    }


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(run: Callable[[], None], device: str) -> float:
    """Wall-clock time of the host until the device has done everything."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


FLUSH_BYTES = 2**28  # more than any L2


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


BUSY_CYCLES = 20_000_000  # some 10 ms of a GPU: longer than the host takes to queue one pass of a loss


def device_seconds(run: Callable[[], None], device: str, queued: bool = False) -> float:
    """As `seconds`; on a GPU what its own clock says, between two events, after its L2 was filled with other things.

    `queued`: the device is kept busy until the host has queued all of it, so that nothing waits for the host.
    """
    if device != "cuda":
        return seconds(run, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    if queued:
        torch.cuda._sleep(BUSY_CYCLES)
    _flush_buffer().zero_()  # the host queues the first launches meanwhile
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def interleaved(
    runs: dict[str, Callable[[], None]],
    repeats: int,
    device: str,
    before: Callable[[], None] = lambda: None,
    clock: Callable[[Callable[[], None], str], float] = seconds,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds of each run in each round; all take turns, so that what disturbs a round disturbs all of it. Their order
    is another one in each round: what one leaves behind, in caches and in memory given back, falls on no other always.

    Called once a round, it needs another `seed` each time. `before` is called before each run and not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    shuffle = random.Random(seed).shuffle
    for _ in range(repeats):
        shuffle(order)
        for name in order:
            before()
            times[name].append(clock(runs[name], device))
    return times


def median_ratio(values: Sequence[float], base: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """Of few values: the one at that share of their order."""
    return sorted(values)[round(share * (len(values) - 1))]


def in_fresh_process(function: Callable, *arguments, environment: dict[str, str]):
    """The result of a module-level function in a new interpreter that starts with these variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def append_csv(file: Path, rows: list[dict]) -> None:
    """Append rows of equal keys; the first ones of a file write the header."""
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(header) - 1)}", *lines[1:]]) + "\n"
