#!/usr/bin/env python3
"""Check that commands killed with SIGKILL at random times and restarted give the same files as an uninterrupted run.

    python scripts/faults/kills.py [KIND...] [--kills N] [--seed S]

For each kind, one run is not interrupted. Then the same command, with all its child processes, is repeatedly killed and
restarted in the same folder until it ends; this is repeated in new folders until N kills have been made. The times of
the kills alternate between uniformly random ones within the duration of an uninterrupted run, and ones while a file is
being written. After each run all files except logs and locks are compared: checkpoints by their content (model,
optimizer, learned parameters, memory, position in the data), JSON files by their values, all others byte by byte.
Durations and metrics are ignored. Prints one line per kind. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import re
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

TIMES = {"previous_training_time", "metrics", "minutes"}  # keys in checkpoints and scores that depend on durations
# Files of scripts/steps.sh that contain hashes of checkpoints, which contain durations.
HASHES = {"recorded", "settings"}
LOGS = {".log", ".lock"}  # suffixes of files whose content differs between runs
WRITTEN = (".tmp", ".partial")  # parts of the names of unfinished files and folders
TEMPORARY = (".hgkd-", "tmp")  # prefixes of their names


def unfinished(file: str) -> bool:
    return file.startswith(TEMPORARY) or any(mark in file for mark in WRITTEN)


def names(folder: Path) -> Iterator[str]:
    for _, folders, files in os.walk(folder):
        yield from folders
        yield from files


def being_written(folder: Path) -> set[tuple[str, int]]:
    """Return the names and modification times (ns) of unfinished files and folders.

    The times distinguish a new one from one of the same name that a killed process has left.
    """
    found = set()
    for place, folders, files in os.walk(folder):
        for name in filter(unfinished, (*folders, *files)):
            with contextlib.suppress(FileNotFoundError):
                found.add((name, os.stat(os.path.join(place, name)).st_mtime_ns))
    return found


class Moments:
    """Random times at which to kill a run.

    Args:
        seed: seed of the random generator.
        seconds: duration of an uninterrupted run.
    """

    def __init__(self, seed: int, seconds: float):
        self.rng, self.seconds, self.drawn = random.Random(seed), seconds, 0

    def wait(self, process: kinds.Process, folder: Path) -> None:
        """Wait until the next time to kill the process, or until it has ended.

        Every second time is up to 4 ms after an unfinished file or folder appears or changes.
        """
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
    """Return the part of a file's content that must be equal in both runs."""
    if file.suffix == ".pt":
        state = torch.load(file, map_location="cpu", weights_only=False)  # this script has written it
        history = state.get("optimizer_history", [])[-1:]  # each restart adds an entry
        return {**state, "optimizer_history": history}
    if file.name == RECORD:
        return sorted(json.loads(file.read_bytes()))  # the values are hashes of files that are compared anyway
    if file.suffix == ".json":
        return json.loads(file.read_bytes())
    if file.name in HASHES:
        return sorted(re.sub("[0-9a-f]{64}", "", file.read_text()).splitlines())
    return file.read_bytes()


def difference(one: Any, other: Any, where: str = "") -> str | None:
    """Return a description of the first difference between two nested values, or None; keys in TIMES are ignored."""
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
    """Return the bytes of a tensor, which can be compared although NaN is not equal to itself."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def compare(unbroken: Path, killed: Path) -> tuple[list[str], int]:
    """Compare the files of two folders.

    Returns:
        Descriptions of the differences, and the number of unfinished files and folders that are left in both.
    """
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
    """Check a kind; return the line to print and whether it passed."""
    begin = time.monotonic()
    kind.prepare()
    unbroken, place = folder / "unbroken", folder / "run"  # all run in one place, which files may name
    kind.make(place)
    started = time.monotonic()
    process = kind.start(place)
    if process.wait():
        return f"FAULT {kind.name}: the unbroken run ended with status {process.status()}: {process.end()}", False
    alone = time.monotonic() - started
    place.rename(unbroken)
    moments = Moments(seed, alone * kind.within)
    killed, writing, runs, left, wrong = 0, 0, 0, 0, []
    while killed < kills and not wrong:
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
            if starts == 1 and killed < kills:  # it ended before it was killed: draw the times from a shorter interval
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
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")  # not the user's cache
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
