"""Files of scores in the format of `hgkd calibration --json`: writing, reading, and their schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError


class Scores(Protocol):
    """Measurements that can be written: :class:`hgkd_fairseq.calibration.scores.Results`, or a fitted temperature."""

    def to_json(self) -> dict[str, Any]: ...


NUMBER = (files.Within(-1e12, 1e12, float), None)  # None: NaN, as without tokens
SHARE = files.Within(0, 1 + 1e-9, float)
SUM = files.Within(0, 1e15, float)
BARS = {"count": [SUM], "confidence": [SUM], "correct": [SUM], "low?": [SHARE], "high?": [SHARE]}
WHAT = "file of `hgkd calibration forced --json` or `hgkd calibration inference --json`"
# The part of `Results.to_json` that a reliability diagram needs.
DRAWN = {
    "mode": str,
    "bins": files.Within(1, 1_000_000),
    "ece": (SHARE, None),
    "ece_without_eos": (SHARE, None),
    "histograms": {"eos:yes": BARS, "eos:no": BARS},
}
# The part that a report needs.
RESULTS = {
    **DRAWN,
    "tokens": files.Within(0),
    "sentences": files.Within(0),
    "replicates": files.Within(0),
    "seed": files.Within(0),
    "signature": str,
    "scores": [{"key": str, "signature": str, "value": NUMBER, "low": NUMBER, "high": NUMBER, "unit": str}],
    "resampled_ece?": {"eos:yes": [(SHARE, None)], "eos:no": [(SHARE, None)]},
    "command?": str,
    "subset?": str,
    "temperature?": files.Within(1e-6, 1e6, float),
    "parameters?": files.Within(0),
}


def write(found: Scores, file: str | Path, command: str) -> None:
    """Write measurements to a JSON file.

    Args:
        found: the measurements.
        file: file to write.
        command: command line that made them, for the report.

    Raises:
        UserError: the file cannot be written, or a number is infinite.
    """
    files.write_json(file, {"command": command, **found.to_json()})


def read(file: str | Path) -> dict[str, Any]:
    """Read a file of :class:`hgkd_fairseq.calibration.scores.Results` that :func:`write` wrote.

    Raises:
        UserError: the file cannot be read, or a value in it is missing or invalid.
    """
    found = files.read_json(file, RESULTS, WHAT)
    check_bars(file, found)
    of_forced = {"nll"} if found["mode"] == "forced" else set()
    missing = {"ece", "ece_without_eos", *of_forced} - {row["key"] for row in found["scores"]}
    if of_forced:
        missing |= {"temperature", "parameters"} - found.keys()
    if missing:
        raise UserError(f"{file} is no {WHAT}: it has no {sorted(missing)[0]}")
    if any(len(row) not in (0, found["replicates"]) for row in found.get("resampled_ece", {}).values()):
        raise UserError(f"{file} is no {WHAT}: resampled_ece has not a number for each of the replicates")
    return found


def check_bars(file: str | Path, found: dict[str, Any]) -> None:
    """Check that each list of the histograms has one number per bin.

    Raises:
        UserError: a list has another length.
    """
    if any(len(row) != found["bins"] for table in found["histograms"].values() for row in table.values()):
        raise UserError(f"{file} is no {WHAT}: a list of histograms has not {found['bins']} numbers, one for each bin")
