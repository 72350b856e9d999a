#!/usr/bin/env python3
"""Every reader of files that others may have written, on damaged, odd and hostile inputs of it.

    python scripts/fuzz/fuzz.py [READER...] [--inputs N] [--seed S]

Each input must be answered with its content or one UserError, within 2 s of the CPU. A line for each reader says how
many were read and refused, which other errors came out (their tracebacks are on standard error), and the slowest; exit
status 1 where there are any, or one took longer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout that this script lies in, installed or not

import checkpoints
import folders
import structured
import text

from hgkd_fairseq.arguments import number

READERS = {
    "checkpoint": (checkpoints.cases, checkpoints.read),
    "literal": (checkpoints.literals, checkpoints.read_literal),
    "train-log": (text.train_logs, text.read_train_log),
    "generated": (text.outputs, text.read_output),
    "dictionary": (text.dictionaries, text.read_dictionary),
    **structured.READERS,
    **folders.READERS,
}


def run(name: str, inputs: int, seed: int) -> tuple[str, bool]:
    """What is said of a reader, and whether all is well."""
    with contextlib.redirect_stdout(io.StringIO()):  # of the readers that print
        counts, slowest = checkpoints.fuzz(inputs, seed, *READERS[name])
    well = counts.keys() <= {"read", "refused"} and slowest <= checkpoints.SLOWEST_S
    found = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    return (
        f"{'ok   ' if well else 'FAULT'} {name}: {sum(counts.values())} inputs, {found}; slowest {slowest:.2f} s",
        well,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)} (default: all)")
    parser.add_argument("--inputs", type=number(1), default=20_000, metavar="N", help="of each (default: 20,000)")
    parser.add_argument("--seed", type=number(0), default=1, metavar="S", help="(default: 1)")
    args = parser.parse_args()
    unknown = [name for name in args.readers if name not in READERS]
    if unknown:
        parser.error(f"no reader {unknown[0]}; there are {', '.join(READERS)}")
    logging.getLogger().setLevel(logging.WARNING)  # fairseq, once imported, logs what every library has to say
    all_well = True
    for name in args.readers or READERS:
        line, well = run(name, args.inputs, args.seed)
        print(line, flush=True)
        all_well &= well
    return 0 if all_well else 1


if __name__ == "__main__":
    sys.exit(main())
