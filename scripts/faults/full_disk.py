#!/usr/bin/env python3
"""Check that commands keep the files of an earlier run and print one error message if the disk becomes full.

    python scripts/faults/full_disk.py [WRITER...]

Each command first runs with enough free space, on a small disk in memory; then again, over the files of an earlier run,
with 0, 30, 60 and 90 % of the space that it needed. It must end with a nonzero exit status and one error message that
names a file on that disk; each earlier file must be unchanged, or complete and new; no temporary files may be left; and
with enough free space the same command must then produce the same files as at first. Prints one line per writer. The
exit status is 1 if a check fails, and 2 if the disk cannot be created, which requires Linux and either root or user
namespaces (`unshare`).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import kills
import kinds
import torch
import toys
from writers import WRITERS, Writer, run_to_its_end

SHARES = (0.0, 0.3, 0.6, 0.9)
SIZE_MB = 48
PAGE = 4096  # bytes
BALLAST = "ballast"
UNSHARE = ("unshare", "--map-root-user", "--mount")
FULL = r"(?:No space left on device|about .* do not fit)"
MESSAGE = re.compile(rf"^\S+: error: (?:--output )?(\S+?)(?: cannot be (?:written|made))?: {FULL}", re.MULTILINE)


class Disk:
    """A tmpfs of SIZE_MB that is mounted on a new folder.

    Raises:
        OSError: `mount` is not installed, or the folder exists.
        subprocess.CalledProcessError: the file system cannot be mounted.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir()
        options = f"size={SIZE_MB}m,mode=0755"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "hgkd-faults", folder], check=True, capture_output=True)

    def free(self) -> int:
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, room: int) -> None:
        with (self.folder / BALLAST).open("wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(self.free() - room, 1))

    def begin(self, content: Path) -> Path:
        """Remove everything from the disk, copy the folder `content` to it, and return the copy."""
        for part in self.folder.iterdir():
            shutil.rmtree(part) if part.is_dir() else part.unlink()
        return Path(shutil.copytree(content, self.folder / "place"))

    def remove(self) -> None:
        subprocess.run(["umount", "-l", self.folder], check=True)


def faults(writer: Writer, status: int, said: str, disk: Disk, earlier: Path, whole: Path) -> list[str]:
    """Return what is wrong after a run on a disk with too little free space.

    Args:
        writer: command that was run.
        status: its exit status.
        said: its output.
        disk: disk that it ran on.
        earlier: folder with the files before the run.
        whole: folder with the files of a run with enough free space.
    """
    place, wrong = disk.folder / "place", []
    if writer.falls_back:
        if status or "No space left on device" not in said:
            wrong.append(f"status {status}, it said {said[-200:]!r}")
    elif status == 0:  # it needed less space this time
        wrong += [f"status 0, and {one}" for one in kills.compare(whole, place)[0]]
    else:
        messages = [line for line in said.splitlines() if re.match(r"\S+: error: ", line)]
        found = MESSAGE.search(said)
        if len(messages) != 1 or not found:
            wrong.append(f"messages {messages or said[-300:]}")
        elif not (place / found[1]).absolute().is_relative_to(disk.folder):
            wrong.append(f"it names {found[1]}")
    if "Traceback" in said:
        wrong.append("it shows call stacks")
    for file in earlier.rglob("*"):
        name = file.relative_to(earlier)
        if file.is_dir() or file.suffix in kills.LOGS:
            continue
        there = place / name
        if not there.is_file():
            wrong.append(f"{name} is gone")
        elif there.read_bytes() not in (file.read_bytes(), new := content(whole / name)) and not loads(there):
            wrong.append(
                f"{name} is cut ({there.stat().st_size} bytes, {file.stat().st_size} before, {len(new)} whole)"
            )
    left = [name for name in kills.names(place) if kills.unfinished(name)]
    return wrong + ([f"left: {', '.join(left)}"] if left else [])


def new_files(earlier: Path, whole: Path) -> list[Path]:
    """Return the files in `whole` that a run has created or changed."""
    found = [file for file in whole.rglob("*") if file.is_file()]
    return [file for file in found if content(earlier / file.relative_to(whole)) != file.read_bytes()]


def pages(file: Path) -> int:
    """Return the bytes that a file occupies on the disk, in whole pages."""
    return -(-file.stat().st_size // PAGE) * PAGE


def content(file: Path) -> bytes:
    return file.read_bytes() if file.is_file() else b""


def loads(file: Path) -> bool:
    """Return whether a file is a complete checkpoint or JSON file, such as an intermediate state of a run."""
    with contextlib.suppress(Exception):
        if file.suffix == ".pt":
            return bool(torch.load(file, map_location="cpu", weights_only=False))
        return file.suffix == ".json" and json.loads(file.read_bytes()) is not None
    return False


def check(writer: Writer, disk: Disk, folder: Path) -> tuple[str, bool]:
    """Check a writer; return the line to print and whether it passed."""
    start, log = time.monotonic(), folder / "command.log"
    earlier = folder / "earlier"
    earlier.mkdir()
    writer.before(earlier)
    run = writer.run()
    place = disk.begin(earlier)
    free = disk.free()
    status, said, most = run_to_its_end(run, place, log, lambda: free - disk.free())
    if status:
        return f"FAULT {writer.name}: with room enough status {status}: {said[-300:]}", False
    whole = Path(shutil.copytree(place, folder / "whole"))
    took = max(most, sum(pages(one) for one in new_files(earlier, whole)))
    wrong: list[str] = []
    ends = 0
    for share in SHARES:
        place = disk.begin(earlier)
        disk.fill(int(share * took))
        status, said, _ = run_to_its_end(run, place, log)
        ends += status != 0
        wrong += [f"{share:.0%} of the room: {one}" for one in faults(writer, status, said, disk, earlier, whole)]
    (disk.folder / BALLAST).unlink()
    if status or writer.falls_back:
        status, said, _ = run_to_its_end(run, place, log)
        wrong += [f"with room again: status {status}: {said[-200:]}"] if status else []
    wrong += [f"with room again: {one}" for one in kills.compare(whole, place)[0]]
    times = len(SHARES) if writer.falls_back else ends
    wrong += [] if times > 1 else [f"it was short of room {times} times, which tests little"]
    verdict = "FAULT" if wrong else "ok   "
    ending = "works without what it would have kept" if writer.falls_back else "status 1 and one message"
    told = f"{took / 1024:.0f} KiB, {times} times less: {'; '.join(wrong[:4]) or f'old files stay, {ending}'}"
    return f"{verdict} {writer.name}: {told}; {time.monotonic() - start:.0f} s", not wrong


def can_unshare() -> bool:
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode == 0
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("writers", nargs="*", metavar="WRITER", help=f"of {', '.join(WRITERS)} (default: all)")
    args = parser.parse_args()
    unknown = [name for name in args.writers if name not in WRITERS]
    if unknown:
        parser.error(f"no writer {unknown[0]}; there are {', '.join(WRITERS)}")
    shared = Path(tempfile.mkdtemp(prefix="full-disk-"))
    try:
        disk = Disk(shared / "disk")
    except (OSError, subprocess.CalledProcessError) as error:
        shutil.rmtree(shared)
        if "HGKD_UNSHARED" not in os.environ and can_unshare():
            os.environ["HGKD_UNSHARED"] = "1"
            os.execvp(UNSHARE[0], [*UNSHARE, sys.executable, *sys.argv])
        why = getattr(error, "stderr", b"") or str(error).encode()
        print(
            f"full_disk.py: no disk can be made: {why.decode(errors='replace').strip()}; run it as root",
            file=sys.stderr,
        )
        return 2
    toys.begin_program()
    os.environ["XDG_CACHE_HOME"] = str(shared / "cache")  # not the user's cache
    all_well = True
    try:
        for name in args.writers or WRITERS:
            folder = shared / name
            folder.mkdir()
            line, well = check(WRITERS[name], disk, folder)
            print(line, flush=True)
            all_well &= well
            shutil.rmtree(folder)
    finally:
        disk.remove()
        kinds.remove()
        shutil.rmtree(shared, ignore_errors=True)
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
