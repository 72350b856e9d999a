"""Commands that write files, and the files of earlier runs that they replace, for full_disk.py."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import kinds
import toys
from kinds import hgkd

Run = Callable[[], int]


@dataclass
class Writer:
    """A command that writes files, and the files that exist before it runs.

    Attributes:
        name: name on the command line of full_disk.py.
        before: function that creates the files of an earlier run in a folder.
        run: function that returns the command, which works in the current folder.
        falls_back: whether the command succeeds with a warning if it cannot write its files.
    """

    name: str
    before: Callable[[Path], None]
    run: Callable[[], Run]
    falls_back: bool = False


def run_to_its_end(run: Run, place: Path, log: Path, watch: Callable[[], int] = lambda: 0) -> tuple[int, str, int]:
    """Run a command in a new process until it ends.

    Args:
        run: command, as of :func:`toys.begin`.
        place: folder that it runs in.
        log: file for its output; a previous one is removed.
        watch: function that is called about every 0.5 ms while the command runs.

    Returns:
        Exit status, output, and the maximum value of `watch`.
    """
    log.unlink(missing_ok=True)
    number, most = toys.begin(run, place, log), 0
    while (status := toys.ended(number)) is None:
        most = max(most, watch())
        time.sleep(0.0005)
    return status, log.read_text(errors="replace"), most


def after(*commands: Callable[[], Run], begin: Callable[[Path], None] = lambda place: None) -> Callable[[Path], None]:
    """Return a function that calls `begin` on a folder and then runs commands there, one after another.

    That function raises AssertionError if a command fails.
    """

    def make(place: Path) -> None:
        begin(place)
        for command in commands:
            status, said, _ = run_to_its_end(command(), place, place.parent / "before.log")
            assert status == 0, said

    return make


def with_run(place: Path) -> None:
    shutil.copytree(kinds.trained(), place / "run")


def without_shards(name: str, *commands: Callable[[], Run]) -> Callable[[Path], None]:
    """Return a function that runs commands in a folder and then removes two of the shards that they made in `name`."""

    def make(place: Path) -> None:
        after(*commands)(place)
        for number in (3, 5):
            shutil.rmtree(place / name / f"shard-{number:05d}")
            (place / name / f"shard-{number:05d}.json").unlink()

    return make


def with_translations(place: Path) -> None:
    shutil.copytree(kinds.translated(), place / "set")


def old_kernel(place: Path) -> None:
    (place / "hgkd_fairseq").mkdir(mode=0o700)
    (place / "hgkd_fairseq" / "rows-0-0.so").write_bytes(b"of another processor")


def kernel() -> int:
    from hgkd_fairseq.loss import native

    os.environ["XDG_CACHE_HOME"] = os.getcwd()
    return 0 if native.rows.usable("cpu") is None else 1


def study(place: Path) -> None:
    """Write a study with two finished cells, with made-up scores."""
    references = [f"the cat number {i} sat on the mat" for i in range(12)]
    (place / "study" / "text").mkdir(parents=True)
    (place / "study" / "text" / "test.en").write_text("".join(f"{line}\n" for line in references))
    for seed in (1, 2):
        cell = place / "study" / "same" / "base" / f"seed-{seed}"
        cell.mkdir(parents=True)
        about = {"setting": "same", "method": "base", "title": "Base", "teacher": None, "seed": seed}
        signature = f"setting:same|seed:{seed}|updates:40|precision:fp32"
        (cell / "cell.json").write_text(json.dumps({**about, "temperature": None, "signature": signature}))
        curve = [{"updates": at, "valid_nll": 4.0, "valid_ece": 0.1, "teacher_share": 0.0} for at in (20, 40)]
        names = ("bleu", "chrf", "nll", "ece", "inference_ece", "temperature", "scaled_ece", "scaled_nll", "minutes")
        names = (*names, "valid_nll_best", "valid_nll_last", "brevity_penalty", "lenpen", "lenpen_bleu")
        scores = dict.fromkeys((*names, "lenpen_brevity_penalty"), 1.0) | {"teacher_share": 0.0, "curve": curve}
        signatures = {key: key for key in ("bleu", "chrf", "ece", "inference_ece")}
        scores |= {"best_updates": 20, "last_updates": 40, "parameters": 1234, "signatures": signatures}
        (cell / "scores.json").write_text(json.dumps(scores))
        for name in ("translations.txt", "translations-lenpen.txt"):
            (cell / name).write_text("".join(f"{line}\n" for line in references))


def table() -> int:
    program = toys.ROOT / "scripts" / "study" / "table.py"
    sys.argv = [str(program), "study", "--output", "tables"]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
    return 0


FORCED = ("calibration", "forced", "DATA", "--path", "run/checkpoint_best.pt", "--cpu", "--json", "forced.json")
FORCED = (*FORCED, "--tokens", "tokens.tsv")
SCORE = hgkd(*kinds.SCORE[:-2], "--generate=--beam 2")
INSTANCE = kinds.distilling(
    "--gate", "instance", *kinds.NEEDED["instance"], "--max-update", "12", "--save-interval-updates", "0"
)
WEIGHTS = ("weights", "run/checkpoint_last.pt", "--output", "weights.tsv", "--plot", "weights.svg")
REPORT = hgkd("report", "run", "--output", "report.html")
DIAGRAM = hgkd("calibration", "diagram", "forced.json", "--output", "diagram.png")
WRITERS = {
    writer.name: writer
    for writer in [
        Writer("checkpoint", after(kinds.distilling("--max-update", "4")), kinds.distilling("--max-update", "14")),
        Writer("json-and-table", after(hgkd(*FORCED), begin=with_run), hgkd(*FORCED, "--bins", "7")),
        Writer("score", after(SCORE, begin=with_run), hgkd(*kinds.SCORE[:-2], "--generate=--beam 3")),
        Writer("report", after(SCORE, REPORT, begin=with_run), REPORT),
        Writer("diagram", after(hgkd(*FORCED), DIAGRAM, begin=with_run), DIAGRAM),
        Writer("weights", after(INSTANCE, hgkd(*WEIGHTS)), hgkd(*WEIGHTS)),
        Writer("translations", without_shards("set", kinds.TRANSLATE), kinds.TRANSLATE),
        Writer("distilled-data", after(begin=with_translations), hgkd("distil-data", "set", "DATA", "--output", "bin")),
        Writer("store", without_shards("store", hgkd(*kinds.STORE)), hgkd(*kinds.STORE)),
        Writer("export", after(begin=with_run), hgkd("export", "run/checkpoint_best.pt", "out.pt")),
        Writer("study-tables", after(lambda: table, begin=study), lambda: table),
        Writer("kernel-cache", after(begin=old_kernel), lambda: kernel, falls_back=True),
    ]
}
