#!/usr/bin/env python3
"""kill -9 at random moments, and the same command again: what comes out is that of a run that nobody has killed.

    python scripts/faults/kills.py [KIND...] [--kills N] [--seed S]

Of each kind a run is left alone; then the same is killed, with all that it has started, and begun again in the same
folder until it ends, and anew in another folder until it was killed so often. Every second moment is drawn evenly from
the time that an unbroken run takes, the others are those of a file's writing. Then all files are compared: of
checkpoints model, optimizer, learned parameters, memory and position in the data, of the others each byte. A line a
kind; exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kinds
import torch
import toys

from hgkd_fairseq.arguments import number
from hgkd_fairseq.evaluation.steps import RECORD

TIMES = {"previous_training_time", "metrics", "minutes"}  # of a run, in its checkpoints and scores
LOGS = {".log", ".lock"}  # what they hold is told by whoever ran
WRITTEN = (".tmp", ".partial")  # what is being written is named so, or as the next
TEMPORARY = (".hgkd-", "tmp")


def unfinished(file: str) -> bool:
    return file.startswith(TEMPORARY) or any(mark in file for mark in WRITTEN)


def names(folder: Path) -> Iterator[str]:
    for _, folders, files in os.walk(folder):
        yield from folders
        yield from files


def being_written(folder: Path) -> set[tuple[str, int]]:
    """Names of what is unfinished in a folder, and when it was changed: one that was killed may have left the name."""
    found = set()
    for place, folders, files in os.walk(folder):
        for name in filter(unfinished, (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):
                found.add((name, os.stat(os.path.join(place, name)).st_mtime_ns))
    return found


class Moments:
    """When a run is killed."""

    def __init__(self, seed: int, seconds: float):
        self.rng, self.seconds, self.drawn = random.Random(seed), seconds, 0

    def wait(self, process: kinds.Process, folder: Path) -> None:
        """Until the next one, or until the process has ended."""
        before = being_written(folder)
        self.drawn += 1
        deadline = time.monotonic() + self.rng.uniform(0, self.seconds)
        delay = self.rng.uniform(0, 0.004)
        while process.status() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if self.drawn % 2:
            return
        deadline = time.monotonic() + self.seconds
        while process.status() is None and time.monotonic() < deadline:
            if being_written(folder) - before:
                time.sleep(delay)
                return
            time.sleep(0.0005)


def content(file: Path) -> Any:
    """What must be equal in it."""
    if file.suffix == ".pt":
        state = torch.load(file, map_location="cpu", weights_only=False)  # of a training that this script ran
        history = state.get("optimizer_history", [])[-1:]  # each start adds to it
        return {**state, "optimizer_history": history}
    if file.name == RECORD:
        return sorted(json.loads(file.read_bytes()))  # the rest is hashes of what is compared here anyway
    if file.suffix == ".json":
        return json.loads(file.read_bytes())
    return file.read_bytes()


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Where two contents differ first; None: nowhere."""
    if isinstance(one, dict) and isinstance(other, dict):
        if one.keys() != other.keys():
            return f"{where}: {sorted(map(str, one.keys() ^ other.keys()))[0]} is on one side only"
        parts = ((key, one[key], other[key]) for key in one if key not in TIMES)
        return next(filter(None, (difference(a, b, f"{where}.{key}") for key, a, b in parts)), None)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)) and len(one) == len(other):
        parts = ((key, a, b) for key, (a, b) in enumerate(zip(one, other, strict=True)))
        return next(filter(None, (difference(a, b, f"{where}[{key}]") for key, a, b in parts)), None)
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        same = one.dtype == other.dtype and one.shape == other.shape
        return None if same and torch.equal(bits(one), bits(other)) else f"{where} has other numbers"
    return None if one == other else f"{where} is {str(one)[:60]!r} and {str(other)[:60]!r}"


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """So that nan is equal to nan."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def compare(unbroken: Path, killed: Path) -> tuple[list[str], int]:
    """What differs, and how many files and folders of killed processes are left."""
    found: dict[Path, dict[str, Path]] = {}
    left = 0
    for folder in (unbroken, killed):
        found[folder] = {}
        for file in sorted(folder.rglob("*")):
            name = str(file.relative_to(folder))
            if any(unfinished(part) for part in Path(name).parts):
                left += unfinished(file.name)
            elif file.is_file() and file.suffix not in LOGS and not name.endswith("lock"):
                found[folder][name] = file
    one, other = found.values()
    wrong = [f"{name} is of one run only" for name in sorted(one.keys() ^ other.keys())]
    for name in sorted(one.keys() & other.keys()):
        if one[name].read_bytes() != other[name].read_bytes():
            told = difference(content(one[name]), content(other[name]), name)
            wrong += [told] if told else []
    return wrong, left


def run(kind: kinds.Kind, kills: int, seed: int, folder: Path) -> tuple[str, bool]:
    """What is said of a kind, and whether all is well."""
    begin = time.monotonic()
    kind.prepare()
    unbroken = folder / "unbroken"
    kind.make(unbroken)
    started = time.monotonic()
    process = kind.start(unbroken)
    if process.wait():
        return f"FAULT {kind.name}: the unbroken run ended with status {process.status()}: {process.end()}", False
    alone = time.monotonic() - started
    moments = Moments(seed, alone)
    killed, writing, runs, left, wrong = 0, 0, 0, 0, []
    while killed < kills and not wrong:
        place = folder / f"killed-{runs}"
        kind.make(place)
        runs += 1
        for starts in itertools.count(1):
            before, began = being_written(place), time.monotonic()
            process = kind.start(place)
            if killed < kills:
                moments.wait(process, place)
            else:
                process.wait()
            if process.status() is None:
                process.kill()
                killed += 1
                writing += bool(being_written(place) - before)
                continue
            if starts == 1 and killed < kills:  # it was faster than the moments were drawn for
                moments.seconds = min(moments.seconds, time.monotonic() - began)
            if process.status():
                wrong = [f"status {process.status()}: {process.end()}"]
            break
        if not wrong:
            wrong, more = compare(unbroken, place)
            left += more
        if not wrong:
            shutil.rmtree(place)
    told = f"{killed} kills, {writing} of them while a file was written, in {runs} runs"
    more = f", {left} temporary files left" if left else ""
    verdict = "all equal" if not wrong else f"DIFFERENT: {'; '.join(wrong[:3])}"
    seconds = f"{time.monotonic() - begin:.0f} s, {alone:.1f} s unbroken"
    return f"{'FAULT' if wrong else 'ok   '} {kind.name}: {told}: {verdict}{more}; {seconds}", not wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(kinds.KINDS)} (default: all)")
    parser.add_argument("--kills", type=number(1), default=20, metavar="N", help="of each (default: 20)")
    parser.add_argument("--seed", type=number(0), default=1, metavar="S", help="(default: 1)")
    parser.add_argument("--keep", action="store_true", help="leave the folder of what differs where it is")
    args = parser.parse_args()
    unknown = [name for name in args.kinds if name not in kinds.KINDS]
    if unknown:
        parser.error(f"no kind {unknown[0]}; there are {', '.join(kinds.KINDS)}")
    toys.begin_program()
    all_well = True
    shared = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")  # not the user's
    try:
        for name in args.kinds or kinds.KINDS:
            folder = shared / name
            folder.mkdir()
            line, well = run(kinds.KINDS[name], args.kills, args.seed, folder)
            print(line, flush=True)
            all_well &= well
            if well or not args.keep:
                shutil.rmtree(folder)
    finally:
        kinds.remove()
        if args.keep and not all_well:
            print(f"kept: {shared}", file=sys.stderr)
        else:
            shutil.rmtree(shared)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
