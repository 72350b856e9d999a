"""Drop the pairs of a tokenised corpus that are empty, too long or too uneven: clean_pairs.py IN_A IN_B OUT_A OUT_B.

The rule of Moses' clean-corpus-n.perl, which fairseq's data preparation uses: both sides have at least 1 and at most
``--max`` tokens, neither has more than ``--ratio`` times the tokens of the other, no token has more than 1,000
characters. Runs of white space become one space.
"""

import argparse
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # the checkout that this script lies in, installed or not

from hgkd_fairseq.errors import UserError
from hgkd_fairseq.files import read_lines, writing

LONGEST_WORD = 1000  # characters


def keeps(one: list[str], other: list[str], longest: int, ratio: float) -> bool:
    """Whether the pair stays, of two lists of tokens."""
    short, long = sorted((len(one), len(other)))
    return short >= 1 and long <= min(longest, ratio * short) and max(map(len, one + other)) <= LONGEST_WORD


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs=4, type=Path, metavar="FILE")
    parser.add_argument("--max", type=int, required=True, help="longest side, in tokens")
    parser.add_argument("--ratio", type=float, default=float("inf"), help="longer side over the shorter one")
    args = parser.parse_args()

    seen = kept = 0
    ins = [read_lines(path) for path in args.files[:2]]
    try:
        with writing(args.files[2]) as first, writing(args.files[3]) as second:
            for lines in itertools.zip_longest(*ins):
                if None in lines:
                    raise UserError(f"{args.files[0]} and {args.files[1]} differ in their number of lines: no pairs")
                seen += 1
                one, other = (line.split() for line in lines)
                if keeps(one, other, args.max, args.ratio):
                    kept += 1
                    first.write(" ".join(one) + "\n")
                    second.write(" ".join(other) + "\n")
    except UserError as error:
        sys.exit(f"clean_pairs.py: {error}")
    print(f"clean_pairs.py: {kept} of {seen} pairs kept", file=sys.stderr)


if __name__ == "__main__":
    main()
