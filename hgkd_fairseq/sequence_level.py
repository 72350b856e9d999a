"""Commands of sequence-level distillation: `hgkd translate` and `hgkd distil-data`."""

from __future__ import annotations

import argparse

from hgkd_fairseq.arguments import Data, Input, NewOutput, add, add_data, add_running, add_search, number, part
from hgkd_fairseq.errors import UserError, flag

# The same as filters.SWITCHES, whose import would load fairseq.
REASONS = ("empty", "limit", "long", "ratio", "copy", "loop", "unknown", "score", "backward")


def add_translate(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq import export
        from hgkd_fairseq.evaluation.translate import translate

        if args.engine == "ctranslate2":
            export.import_converters()  # fails before the teacher is loaded if it is not installed
        print(
            translate(
                args.data, args.teacher_path, args.output, args.subset, decoding_of(args), export.converted,
                args.shard_size, args.shard,
            )
        )  # fmt: skip

    option = add(commands, "translate", run, "a teacher's translations of training sentences, in shards; resumable")
    add_data(option)
    teacher = "fairseq checkpoint, or an ensemble"
    option("--teacher-path", type=Input, required=True, metavar="CKPT[:CKPT]", help=teacher)
    folder = "folder to write, or to go on with; several processes may fill it together"
    option("--output", required=True, metavar="DISTIL", help=folder)
    option("--subset", default="train", metavar="SPLIT", help="of the data (default: train)")
    option("--engine", choices=["fairseq", "ctranslate2"], default="fairseq", help="default: fairseq")
    of_weights = "of the weights, with --engine ctranslate2 (default: as they are)"
    option("--quantization", choices=["int8", "int8_float16", "float16"], help=of_weights)
    option("--nbest", type=number(1, 1000), default=1, metavar="N", help="translations a sentence (default: 1)")
    add_search(option, beam=None)
    option("--sampling", action="store_true", help="draw --nbest translations instead of searching with --beam")
    option("--sampling-topk", type=number(1), default=0, metavar="K", help="from the K most probable pieces")
    option("--sampling-topp", type=number(0, 1, float), default=0.0, metavar="P", help="from as few as have P together")
    option("--seed", type=number(0, 2**31), metavar="N", help="of --sampling (default: 1)")
    option("--dtype", choices=["fp32", "fp16", "bf16"], help="default: fp16 on a GPU, fp32 on the CPU")
    option("--shard-size", type=number(1), default=20_000, metavar="N", help="sentences a shard (default: 20000)")
    which = "make the shards I, I + N, ... only, of I from 1 to N (default: the next free one each time)"
    option("--shard", type=part, metavar="I/N", help=which)
    most = "pieces a batch, of sources (default: 4000)"
    option("--max-tokens", type=number(1, 2**31 - 1), default=4000, metavar="N", help=most)
    add_running(option)


def decoding_of(args):
    import torch

    from hgkd_fairseq.evaluation.translate import Decoding

    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    half = device == "cuda" and args.engine == "fairseq"
    if args.seed is not None and not args.sampling:
        raise UserError("--seed is of --sampling; add it, or drop --seed")
    given = {field: getattr(args, field) for field in Decoding.__dataclass_fields__ if hasattr(args, field)}
    given["seed"] = Decoding.seed if args.seed is None else args.seed
    beam = args.nbest if args.sampling else args.beam or Decoding.beam
    how = Decoding(**given | {"beam": beam, "device": device, "dtype": args.dtype or ("fp16" if half else "fp32")})
    if args.sampling and args.beam is not None:
        raise UserError(f"--beam {args.beam} is of a search, and --sampling draws --nbest translations; drop it")
    return how


# Filters by the reason of --keep that switches each off: the option that tunes it, and the field of `Filters`.
TUNED = {
    "ratio": ("length_ratio", "ratio"),
    "long": ("max_pieces", "most"),
    "loop": ("max_repeats", "repeats"),
    "score": ("worst_score", "worst_score"),
    "backward": ("worst_backward", "worst_backward"),
}


def add_distil_data(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.data.filters import Filters
        from hgkd_fairseq.evaluation.distil_data import Choice, distil

        if args.worst_backward is not None and not args.backward_path:
            raise UserError("--worst-backward is of the model of --backward-path; give it, or drop --worst-backward")
        if args.backward_path and "backward" in (args.keep or ()):
            raise UserError("--backward-path is of what --keep backward does not drop for; drop one of them")
        tuned = {}
        for reason, (option, name) in TUNED.items():
            value = getattr(args, option)
            if value is not None and reason in (args.keep or ()):
                raise UserError(f"{flag(option)} is of what --keep {reason} does not drop for; drop one of them")
            if value is not None:
                tuned[name] = value
        filters = Filters(off=frozenset(args.keep or ()), **tuned)
        choice = Choice(args.select, filters, args.mix_original, args.backward_path, args.max_tokens, args.cpu)
        print(distil(args.folder, args.data, args.output, choice), end="")

    option = add(commands, "distil-data", run, "binarised training data of a teacher's translations")
    option("folder", type=Input, metavar="DISTIL", help="folder that hgkd translate filled")
    option("data", type=Data, metavar="DATA", help="the data that it translated")
    option("--output", type=NewOutput, required=True, metavar="DATABIN", help="folder to make")
    which = (
        "of several translations of a sentence: the best one; the one nearest to the reference by sentence BLEU or "
        "chrF; that of the highest score in FILE, a line for each translation (default: best)"
    )
    option("--select", type=selection, default="best", metavar="best|bleu|chrf|scores:FILE", help=which)
    share = "add the references of this share of the sentences (default: 0; 1: of all)"
    option("--mix-original", type=number(0, 1, float), default=0.0, metavar="SHARE", help=share)
    option(
        "--keep", action="append", choices=REASONS, metavar="REASON", help=f"do not drop for it: {', '.join(REASONS)}"
    )
    ratio = "pieces of a translation over those of its source (default: 0.5,2)"
    option("--length-ratio", type=limits, metavar="LOW,HIGH", help=ratio)
    option("--max-pieces", type=number(1), metavar="N", help="of a sentence (default: 150)")
    runs = "drop what has a run of pieces so often in a row (default: 4)"
    option("--max-repeats", type=number(2), metavar="N", help=runs)
    worst = "drop so many of the worst by the teacher's score (default: 0)"
    option("--worst-score", type=number(0, 1, float), metavar="SHARE", help=worst)
    other = "model of the other direction, in the same dictionaries; drops the worst by its cross-entropy"
    option("--backward-path", type=Input, metavar="CKPT[:CKPT]", help=other)
    worst = "so many of them (default: 0.05)"
    option("--worst-backward", type=number(0, 1, float), metavar="SHARE", help=worst)
    most = "pieces a batch of the backward model (default: 4000)"
    option("--max-tokens", type=number(1, 2**31 - 1), default=4000, metavar="N", help=most)
    add_running(option)


def selection(text: str) -> str:
    if text not in ("best", "bleu", "chrf") and not (text.startswith("scores:") and len(text) > len("scores:")):
        raise argparse.ArgumentTypeError("give best, bleu, chrf or scores:FILE")
    return text


def limits(text: str) -> tuple[float, float]:
    low, _, high = text.partition(",")
    found = tuple(number(0, 10_000, float)(one) for one in (low, high))
    if found[0] > found[1]:
        raise argparse.ArgumentTypeError(f"{text}: LOW is more than HIGH")
    return found[0], found[1]


COMMANDS = (add_translate, add_distil_data)
