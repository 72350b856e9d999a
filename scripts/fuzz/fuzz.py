#!/usr/bin/env python3
"""Fuzz every reader of untrusted files with damaged, unusual and hostile inputs.

    python scripts/fuzz/fuzz.py [READER...] [--inputs N] [--seed S] [--record FILE]

For each input a reader must return the content or raise one UserError, within 2 s of CPU time. For each reader one line
reports how many inputs were read and refused, which other errors occurred (with tracebacks on standard error), and the
slowest input. The exit status is 1 if there were other errors or an input took longer. Inputs are generated in parts of
5,000 with a seed for each part. With --record, parts whose results are in FILE are not run again, so that the same
command resumes after an interruption.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # use this checkout, even if another version is installed

import checkpoints
import folders
import pickles
import small
import structured
import text

from hgkd_fairseq.arguments import number

READERS = {
    "checkpoint": (checkpoints.cases, checkpoints.read),
    "checkpoint-model": (checkpoints.transformers, checkpoints.build),
    "literal": (checkpoints.literals, checkpoints.read_literal),
    "train-log": (text.train_logs, text.read_train_log),
    "generated": (text.outputs, text.read_output),
    "dictionary": (text.dictionaries, text.read_dictionary),
    **structured.READERS,
    **folders.READERS,
    **small.READERS,
    **pickles.READERS,
}


PART = 5000  # inputs


def run(name: str, inputs: int, seed: int, record: Path | None) -> tuple[str, bool]:
    """Fuzz a reader; return the line to print and whether all inputs were handled as required."""
    counts: Counter = Counter()
    slowest = 0.0
    known = [json.loads(line) for line in record.read_text().splitlines()] if record and record.exists() else []
    for place, first in enumerate(range(0, inputs, PART)):
        part = [name, min(PART, inputs - first), 1000 * seed + place]
        found = next((one[1:] for one in known if one[0] == part), None)
        if found is None:
            with contextlib.redirect_stdout(io.StringIO()):  # some readers print
                found = checkpoints.fuzz(part[1], part[2], *READERS[name])
            if record:
                with record.open("a") as lines:
                    lines.write(json.dumps([part, *found]) + "\n")
        counts.update(found[0])
        slowest = max(slowest, found[1])
    well = counts.keys() <= {"read", "refused"} and slowest <= checkpoints.SLOWEST_S
    outcomes = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.most_common())
    return (
        f"{'ok   ' if well else 'FAULT'} {name}: {sum(counts.values()):,} inputs, {outcomes}; slowest {slowest:.2f} s",
        well,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--inputs", type=number(1), default=20_000, metavar="N", help="of each (default: 20,000)")
    parser.add_argument("--seed", type=number(0), default=1, metavar="S", help="(default: 1)")
    parser.add_argument("--record", type=Path, metavar="FILE", help="what is done, to go on from")
    args = parser.parse_args()
    unknown = [name for name in args.readers if name not in READERS]
    if unknown:
        parser.error(f"no reader {unknown[0]}; there are {', '.join(READERS)}")
    logging.getLogger().setLevel(logging.WARNING)  # importing fairseq enables the messages of all libraries
    all_well = True
    for name in args.readers or READERS:
        line, well = run(name, args.inputs, args.seed, args.record)
        print(line, flush=True)
        all_well &= well
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
