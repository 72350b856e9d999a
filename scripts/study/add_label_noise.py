"""Add label noise to a corpus: shuffle a share of the training targets, so that they belong to other sources, or
replace them by their sources (--kind copy).

    python scripts/study/add_label_noise.py TEXT NOISY --noise-share 0.3 --clean 400
    bash scripts/prepare_data.sh NOISY data-bin/noisy

TEXT holds train.LANG of two languages, and may hold other files, such as those of get_data.sh. NOISY becomes a copy of
TEXT with a noisy train.TARGET, and with noisy.txt: the numbers of the changed lines, from 0 on, one per line, for
`hgkd weights --compare`. (They are the numbers of the sentences in the binarised data as well, because
fairseq-preprocess keeps all lines in order.) With --clean, the last pairs are moved from the training set to valid1, a
clean held-out set for `--held-out valid1`.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))  # use this checkout even if it is not installed

from hgkd_fairseq import files
from hgkd_fairseq.errors import in_one_line


def shuffled(lines: list[str], share: float, seed: int) -> tuple[list[str], list[int]]:
    """Permute a random selection of round(share * number) lines, so that each of them moves to another place.

    Returns: all lines, and the numbers of the moved ones, in ascending order. If fewer than two lines are selected, no
        line is moved.
    """
    rng = random.Random(seed)
    chosen = rng.sample(range(len(lines)), round(share * len(lines)))
    if len(chosen) < 2:
        return list(lines), []
    noisy = list(lines)
    for here, there in zip(chosen, [*chosen[1:], chosen[0]], strict=True):  # a single cycle in random order
        noisy[here] = lines[there]
    return noisy, sorted(chosen)


def copied(lines: list[str], sources: list[str], share: float, seed: int) -> tuple[list[str], list[int]]:
    """Replace a random selection of round(share * number) lines by their sources.

    Returns: all lines, and the numbers of the replaced ones, in ascending order.
    """
    chosen = sorted(random.Random(seed).sample(range(len(lines)), round(share * len(lines))))
    noisy = list(lines)
    for here in chosen:
        noisy[here] = sources[here]
    return noisy, chosen


def write(file: Path, lines: list[str]) -> None:
    files.write_text(file, "".join(f"{line}\n" for line in lines))


def share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share; it must be between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, metavar="TEXT", help="folder of plain text")
    parser.add_argument("noisy", type=Path, metavar="NOISY", help="folder to make")
    parser.add_argument("--noise-share", type=share, default=0.3, metavar="R", help="of the targets (default: 0.3)")
    kinds = "shuffle them among each other, or copy their sources (default: shuffle)"
    parser.add_argument("--kind", choices=("shuffle", "copy"), default="shuffle", help=kinds)
    parser.add_argument("--clean", type=int, default=0, metavar="N", help="the last N pairs become valid1 (default: 0)")
    parser.add_argument("--target", default="en", metavar="LANG", help="language that is changed (default: en)")
    parser.add_argument("--seed", type=int, default=1, help="which ones, and where to (default: 1)")
    args = parser.parse_args(argv)
    file = args.text / f"train.{args.target}"
    if not file.is_file():
        parser.error(f"{file} does not exist; give a folder with train.{args.target}, or another --target")
    if args.noisy.exists():
        parser.error(f"{args.noisy} exists; give the name of a new folder")
    if args.noisy.resolve().is_relative_to(args.text.resolve()):
        parser.error(f"{args.noisy} lies in {args.text}, which is copied; name another folder")
    try:
        return make(args, parser, file)
    except Exception as error:
        parser.error(str(in_one_line(error)))


def make(args: argparse.Namespace, parser: argparse.ArgumentParser, file: Path) -> int:
    sides = {side: list(files.read_lines(side)) for side in sorted(args.text.glob("train.*"))}
    lines = sides[file]
    for side, others in sides.items():
        if len(others) != len(lines):
            parser.error(f"{file} has {len(lines)} lines and {side} {len(others)}: give a pair on each line")
    if not 0 <= args.clean < len(lines):
        parser.error(f"--clean {args.clean}: {file} has {len(lines)} lines; some must stay to be trained on")
    trained = len(lines) - args.clean
    if args.kind == "copy":
        if len(sides) != 2:
            parser.error(f"--kind copy: {args.text} has train. of {len(sides)} languages; it needs two")
        (source,) = (others for side, others in sides.items() if side != file)
        noisy, numbers = copied(lines[:trained], source, args.noise_share, args.seed)
    else:
        noisy, numbers = shuffled(lines[:trained], args.noise_share, args.seed)
    with files.writing_folder(args.noisy) as folder:
        shutil.copytree(args.text, folder, dirs_exist_ok=True)
        for side, pairs in sides.items():
            if args.clean:
                write(folder / f"valid1{side.suffix}", pairs[trained:])
                write(folder / side.name, pairs[:trained])
        write(folder / file.name, noisy)
        write(folder / "noisy.txt", [str(number) for number in numbers])
    what = "are copies of their sources" if args.kind == "copy" else "belong to other sources"
    print(f"{args.noisy}: {len(numbers)} of {trained} targets {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
