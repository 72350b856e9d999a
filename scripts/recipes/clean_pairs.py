"""Drop the pairs of a tokenised corpus that are empty, too long or too uneven: clean_pairs.py IN_A IN_B OUT_A OUT_B.

The rules are those of Moses' clean-corpus-n.perl, which fairseq's data preparation uses. Kept are pairs whose sides
both have at least 1 and at most ``--max`` tokens, of which neither has more than ``--ratio`` times the tokens of the
other, and whose tokens all have at most 1,000 characters. Runs of white space become one space.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # use this checkout even if it is not installed

from hgkd_fairseq.errors import UserError, guarded
from hgkd_fairseq.files import read_lines, same_file, writing

LONGEST_WORD = 1000  # characters


def keeps(one: list[str], other: list[str], longest: int, ratio: float) -> bool:
    """Return whether to keep a pair, given as two lists of tokens. `longest` is in tokens."""
    short, long = sorted((len(one), len(other)))
    return short >= 1 and long <= min(longest, ratio * short) and max(map(len, one + other)) <= LONGEST_WORD


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs=4, type=Path, metavar="FILE")
    parser.add_argument("--max", type=int, required=True, help="longest side, in tokens")
    parser.add_argument("--ratio", type=float, default=float("inf"), help="longer side over the shorter one")
    args = parser.parse_args()
    return guarded("clean_pairs.py", lambda: clean(*args.files, args.max, args.ratio))


def clean(one: Path, other: Path, out_one: Path, out_other: Path, longest: int, ratio: float) -> int:
    for out, others in ((out_one, (one, other, out_other)), (out_other, (one, other))):
        if any(same_file(out, path) for path in others):
            raise UserError(f"{out} is named twice, and would be written over; name another file to write")

    seen = kept = 0
    with writing(out_one) as first, writing(out_other) as second:
        for lines in itertools.zip_longest(read_lines(one), read_lines(other)):
            if None in lines:
                raise UserError(f"{one} and {other} differ in their number of lines: no pairs")
            seen += 1
            ours, theirs = (line.split() for line in lines)
            if keeps(ours, theirs, longest, ratio):
                kept += 1
                first.write(" ".join(ours) + "\n")
                second.write(" ".join(theirs) + "\n")
    print(f"clean_pairs.py: {kept} of {seen} pairs kept", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
