"""Utilities shared by the benchmarks: description of the environment, interleaved timing, fresh processes, CSV rows and
markdown tables."""

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
# Implementations of the loss to measure on each device type; the first is the default one ("ours").
RUNGS = {"cpu": ("native", "chunked"), "cuda": ("triton", "chunked")}
LEAST_REPEATS = 7  # the median of fewer values is too unreliable


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
    """Return the columns that describe hardware and software, for a measurement on `device` ("cpu" or "cuda")."""
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
    """Return the wall-clock time of `run` in seconds, until the device has finished all of its work."""
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


FLUSH_BYTES = 2**28  # larger than any L2 cache


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


BUSY_CYCLES = 20_000_000  # about 10 ms on a GPU, to exceed the time that the host takes to queue one pass of a loss


def device_seconds(run: Callable[[], None], device: str, queued: bool = False) -> float:
    """Return the time of `run` in seconds; on a GPU, measure it between two CUDA events with a flushed L2 cache.

    Args:
        run: function to measure.
        device: "cpu", which is the same as :func:`seconds`, or "cuda".
        queued: on a GPU, first occupy the device for BUSY_CYCLES, so that the host can queue all work of `run` before
            the first of it is executed and launch latency is not measured.
    """
    if device != "cuda":
        return seconds(run, device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    synchronize(device)
    if queued:
        torch.cuda._sleep(BUSY_CYCLES)
    _flush_buffer().zero_()  # takes long enough for the host to queue the first launches of `run`
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
    """Time several functions in turn and return the seconds of each function in each round.

    Every round calls each function once, so that a disturbance affects all functions of the round. The order is random
    in each round, so that the state that one function leaves behind (caches, freed memory) does not always affect the
    same other function.

    Args:
        runs: functions by name.
        repeats: number of rounds.
        device: "cpu" or "cuda".
        before: function that is called, untimed, before each run.
        clock: function that returns the seconds of one run: :func:`seconds` or :func:`device_seconds`.
        seed: seed of the orders. Callers that make one call per round must pass a different seed each time.
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
    """Return the median over the rounds of value / base, where entry i of both sequences is from round i.

    Raises:
        ValueError: the sequences have different lengths.
    """
    return statistics.median(value / other for value, other in zip(values, base, strict=True))


def quantile(values: Sequence[float], share: float) -> float:
    """Return the `share` quantile (0 to 1) of the values by nearest rank, without interpolation."""
    return sorted(values)[round(share * (len(values) - 1))]


def in_fresh_process(function: Callable, *arguments, environment: dict[str, str]):
    """Run a module-level function in a new interpreter with additional environment variables; return its result."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(function, *arguments).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def append_csv(file: Path, rows: list[dict]) -> None:
    """Append rows to a CSV file; write the header if the file is new.

    All rows must have the same keys. The header of an existing file is not compared with them.
    """
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table whose first column is aligned left and whose other columns are aligned right."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], f"|---|{'---:|' * (len(header) - 1)}", *lines[1:]]) + "\n"
