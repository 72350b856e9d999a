"""The command ``hgkd``: what is around training. ``hgkd COMMAND --help`` explains each."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

import hgkd_fairseq
from hgkd_fairseq.errors import UserError


def user_dir(_args) -> int:
    print(Path(hgkd_fairseq.__file__).parent)
    return 0


def doctor(_args) -> int:
    from hgkd_fairseq.doctor import report

    return report()


def gates(_args) -> int:
    from hgkd_fairseq.gates import GATES, parameters

    for name, gate in GATES.items():
        defaults = ", ".join(f"{key}={value}" for key, value in parameters(name).items() if value is not None)
        print(name, f"    {gate.equation}", f"    {gate.source}", *([f"    {defaults}"] if defaults else []), sep="\n")
    return 0


def calibration_forced(args) -> int:
    from hgkd_fairseq.calibration.forced import evaluate

    scores = evaluate(args.data, args.path, args.gen_subset, args.max_tokens, args.bins, args.cpu)
    print(f"{scores.signature()} = {100 * scores.ece:.2f} %")
    print(f"{scores.signature(eos=False)} = {100 * scores.ece_without_eos:.2f} %")
    print(f"{scores.signature('MCE')} = {100 * scores.mce:.2f} %")
    print(f"NLL = {scores.nll:.3f} bits a token, accuracy = {100 * scores.accuracy:.2f} %, {scores.tokens} tokens")
    if args.json:
        Path(args.json).write_text(json.dumps(scores.to_json(), indent=1) + "\n")
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="hgkd", description="Hard-gate knowledge distillation for fairseq")
    top.add_argument("--version", action="version", version=hgkd_fairseq.__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("user-dir", help="print the folder to give to fairseq's --user-dir")
    command.set_defaults(run=user_dir)

    command = commands.add_parser("doctor", help="check this installation; exit status 1 where something is wrong")
    command.set_defaults(run=doctor)

    command = commands.add_parser("gates", help="list the answers to when to distil, the values of --gate")
    command.set_defaults(run=gates)

    calibration = commands.add_parser("calibration", help="measure the calibration of translation models")
    kinds = calibration.add_subparsers(required=True, metavar="KIND")
    forced = kinds.add_parser("forced", help="teacher-forced: the model is given the reference's prefix")
    forced.add_argument("data", metavar="DATA", help="folder that fairseq-preprocess wrote")
    forced.add_argument("--path", required=True, metavar="CKPT[:CKPT]", help="fairseq checkpoint, or an ensemble")
    forced.add_argument("--gen-subset", default="test", metavar="SPLIT", help="subset to score (default: test)")
    forced.add_argument("--bins", type=int, default=20, help="equal-width bins of confidence (default: 20)")
    forced.add_argument("--max-tokens", type=int, default=4000, metavar="N", help="tokens a batch (default: 4000)")
    forced.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")
    forced.add_argument("--json", metavar="FILE", help="write the scores there as well")
    forced.set_defaults(run=calibration_forced)
    return top


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    logging.getLogger().setLevel(logging.WARNING)  # fairseq, once imported, logs every step of loading
    logging.getLogger("filelock").setLevel(logging.WARNING)
    try:
        return args.run(args)
    except UserError as error:
        print(f"hgkd: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
