"""The command ``hgkd``: what is around training. ``hgkd COMMAND --help`` explains each.

Of each command here is its parser, an add_ function, and the call of what does the work. That is imported when it is
called: torch and fairseq take seconds.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
from pathlib import Path

import hgkd_fairseq
from hgkd_fairseq.arguments import Data, Input, NewOutput, Output, Parser, RunFolder, number, refuse_overwriting
from hgkd_fairseq.errors import guarded

TOKENIZERS = ("13a", "none", "intl", "zh", "char")  # some of sacreBLEU's


def add_user_dir(commands) -> None:
    command = commands.add_parser("user-dir", help="print the folder to give to fairseq's --user-dir")
    command.set_defaults(run=lambda args: print(Path(hgkd_fairseq.__file__).parent))


def add_doctor(commands) -> None:
    def run(args) -> int:
        from hgkd_fairseq.doctor import report

        return report()

    command = commands.add_parser("doctor", help="check this installation; exit status 1 where something is wrong")
    command.set_defaults(run=run)


def add_gates(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.gates import listing
        from hgkd_fairseq.sentence_weights import gate  # noqa: F401  registers its own

        print(listing.markdown() if args.markdown else listing.text())

    command = commands.add_parser("gates", help="list the answers to when to distil, the values of --gate")
    command.add_argument("--markdown", action="store_true", help="as a table, with their options")
    command.set_defaults(run=run)


def add_methods(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq import methods

        print("\n".join(methods.options(args.name, args.teacher)) if args.name else methods.text())

    command = commands.add_parser("methods", help="the options of fairseq-train that make each method, or those of one")
    option = command.add_argument
    option("name", nargs="?", metavar="NAME", help="print this one's options, one a line")
    option("--teacher", default="TEACHER", metavar="CKPT", help="the teacher's checkpoint in them (default: TEACHER)")
    command.set_defaults(run=run)


def add_weights(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.sentence_weights.table import report

        report(args.checkpoint, args.output, args.compare, args.plot)

    command = commands.add_parser("weights", help="the weights of training sentences that --gate instance has learned")
    option = command.add_argument
    option("checkpoint", type=Input, metavar="CKPT", help="of fairseq-train")
    table = "write a tab-separated row for each sentence: its number in the training data, from 0 on, and its weights"
    option("--output", type=Output, metavar="FILE", help=table)
    numbers = "numbers of sentences, one a line: medians of those and of the others"
    option("--compare", type=Input, metavar="FILE", help=numbers)
    option("--plot", type=Output, metavar="FILE", help="histograms, .png or .svg; with matplotlib")
    command.set_defaults(run=run)


def add_calibration(commands) -> None:
    command = commands.add_parser("calibration", help="measure the calibration of translation models")
    kinds = command.add_subparsers(required=True, metavar="KIND")
    for add in (add_forced, add_inference, add_temperature, add_diagram):
        add(kinds)


def add_forced(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation import forced, temperature

        degree = temperature.read(args.temperature)
        show(forced.evaluate(**model_of(args), temperature=degree, tokens_file=args.tokens), args)

    command = kinds.add_parser("forced", help="teacher-forced: the model is given the reference's prefix")
    add_model(command, "test")
    add_scoring(command)
    divisor = "divide the logits by it: a number, or temperature's --json file"
    command.add_argument("--temperature", type=Input, default="1", metavar="T", help=divisor)
    command.set_defaults(run=run)


def add_inference(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.inference import Labelling, evaluate

        options = Labelling(args.labels, args.words)
        show(evaluate(args.file, args.reference, options, settings_of(args), args.tokens), args)

    command = kinds.add_parser("inference", help="of the model's own translations, as fairseq-generate wrote them")
    option = command.add_argument
    output = "output of fairseq-generate, run without --remove-bpe and --bpe"
    option("file", type=Input, metavar="FILE", help=output)
    pieces = "references in pieces, one a line, instead of those in the output"
    option("--reference", type=Input, metavar="FILE", help=pieces)
    right = (
        "which tokens are right: those that TER aligns with the reference, less those right after a deletion as "
        "Wang et al. 2020 have it; ter: all of them (default: wang2020)"
    )
    option("--labels", choices=["wang2020", "ter"], default="wang2020", help=right)
    option("--words", action="store_true", help="score words, with the product of their pieces'")
    add_scoring(command)
    command.set_defaults(run=run)


def add_temperature(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.temperature import fit

        show(fit(**model_of(args)), args)

    command = kinds.add_parser("temperature", help="fit a temperature by NLL, the control of calibration claims")
    add_model(command, "valid")
    add_scoring(command, tokens=False)
    command.set_defaults(run=run)


def add_diagram(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.report.diagram import draw

        draw(args.files, args.output, args.label, "eos:no" if args.without_eos else "eos:yes")

    about = "reliability diagram and confidence histogram of one or more models"
    command = kinds.add_parser("diagram", help=about)
    option = command.add_argument
    option("files", nargs="+", type=Input, metavar="JSON", help="files of forced's or inference's --json")
    option("--output", required=True, type=Output, metavar="FILE", help=".png or .svg")
    option("--label", action="append", metavar="NAME", help="of each file in turn (default: file names)")
    option("--without-eos", action="store_true", help="leave the end of sentence out")
    command.set_defaults(run=run)


def add_model(command, subset: str) -> None:
    """Options of the kinds of calibration that run a model; :func:`model_of` makes arguments of them."""
    option = command.add_argument
    add_data(command)
    option("--path", type=Input, required=True, metavar="CKPT[:CKPT]", help="fairseq checkpoint, or an ensemble")
    add_batches(command, subset)


def model_of(args) -> dict:
    names = ("data", "path", "max_tokens", "cpu")
    return {name: getattr(args, name) for name in names} | {"subset": args.gen_subset, "settings": settings_of(args)}


def add_data(command) -> None:
    command.add_argument("data", type=Data, metavar="DATA", help="folder that fairseq-preprocess wrote")


def add_batches(command, subset: str) -> None:
    option = command.add_argument
    option("--gen-subset", default=subset, metavar="SPLIT", help=f"subset to use (default: {subset})")
    most = number(1, 2**31 - 1)
    option("--max-tokens", type=most, default=4000, metavar="N", help="tokens a batch (default: 4000)")
    add_cpu(command)


def add_cpu(command) -> None:
    command.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def add_scoring(command, tokens: bool = True) -> None:
    """Options of every kind of calibration that computes scores."""
    option = command.add_argument
    option("--bins", type=number(1, 10_000), default=20, help="bins of confidence (default: 20)")
    least = "tokens a bin needs to count in MCE (default: 1)"
    option("--min-count", type=number(1), default=1, metavar="N", help=least)
    resamples = "resamples of the sentences for 95%% intervals (default: 1000; 0: no intervals)"
    option("--replicates", type=number(0, 1_000_000), default=1000, metavar="N", help=resamples)
    option("--seed", type=number(0), default=1, help="of the resamples (default: 1)")
    option("--json", type=Output, metavar="FILE", help="write the scores there as well")
    if tokens:
        option("--tokens", type=Output, metavar="FILE", help="write a row for each token: .tsv or .parquet")


def settings_of(args):
    from hgkd_fairseq.calibration.scores import Settings

    return Settings(args.bins, args.min_count, args.replicates, args.seed)


def show(found, args) -> None:
    from hgkd_fairseq.evaluation import results

    if args.json:
        results.write(found, args.json, args.command)
    print(found)


def add_score(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.score import ScoreOptions, score_all

        how = ScoreOptions(args.generate, args.reference, args.tokenize, args.own_lenpen, args.cpu, args.command)
        score_all(args.data, args.runs, args.checkpoint or ["best"], how)

    command = commands.add_parser("score", help="all that is measured of trained runs, in the files that report reads")
    option = command.add_argument
    add_data(command)
    option("runs", nargs="+", type=RunFolder, metavar="RUN", help="folder that fairseq-train saved to")
    which = (
        "best, last or a file in RUN; may be given again (default: best, whose scores are in RUN; those of "
        "checkpoint_NAME.pt in RUN/NAME)"
    )
    option("--checkpoint", action="append", type=Input, metavar="NAME", help=which)
    search = "of fairseq-generate, in one word (default: --beam 5)"
    option("--generate", default="--beam 5", metavar="OPTIONS", help=search)
    text = "text, one reference a line (default: the data's, in words)"
    option("--reference", type=Input, metavar="FILE", help=text)
    by = "by sacreBLEU, for BLEU; none where texts are tokens already (default: 13a)"
    option("--tokenize", choices=TOKENIZERS, default="13a", help=by)
    own = "also BLEU at the length penalty with the best one on the validation set: 6 more translations"
    option("--own-lenpen", action="store_true", help=own)
    add_cpu(command)
    command.set_defaults(run=run)


def add_report(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.report.page import report

        print(report(args.runs, args.output, args.reference))

    about = "finished runs side by side: tables in markdown, and an HTML page with diagrams and curves"
    command = commands.add_parser("report", help=about)
    option = command.add_argument
    runs = "folder of a run; the others are compared with the first"
    option("runs", nargs="+", type=RunFolder, metavar="RUN", help=runs)
    option("--output", type=Output, default="report.html", metavar="FILE", help="the page (default: report.html)")
    text = "references as text, one a line, instead of those in the translations, which lack unknown characters"
    option("--reference", type=Input, metavar="FILE", help=text)
    command.set_defaults(run=run)


def add_export(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.export import export_all

        comparison = None if args.no_comparison else comparison_of(args)
        export_all(args.path, args.output, args.ema, args.ctranslate2, args.quantization, args.data, comparison)

    about = "write a checkpoint for fairseq without this plugin, or CTranslate2"
    command = commands.add_parser("export", help=about)
    option = command.add_argument
    option("path", type=Input, metavar="CKPT[:CKPT]", help="fairseq checkpoint, or several to average")
    option("output", type=NewOutput, metavar="OUT", help="the checkpoint to write")
    option("--ema", action="store_true", help="take the moving average of --store-ema")
    folder = "convert it to that folder too, translate with both and compare"
    option("--ctranslate2", type=NewOutput, metavar="DIR", help=folder)
    weights = "of the CTranslate2 model's weights (default: as they are)"
    option("--quantization", choices=["int8", "int8_float16", "float16"], help=weights)
    data = "folder that fairseq-preprocess wrote (default: what the model was trained on)"
    option("--data", type=Data, metavar="DATA", help=data)
    option("--no-comparison", action="store_true", help="convert only")
    add_comparison(command)
    command.set_defaults(run=run)


def add_compare(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.compare import compare

        print(compare(args.data, args.models, **comparison_of(args)))

    command = commands.add_parser("compare", help="translate with several models: BLEU, calibration, size, speed")
    add_data(command)
    models = "fairseq checkpoint or ensemble, CTranslate2 folder"
    command.add_argument("models", nargs="+", type=Input, metavar="MODEL", help=models)
    add_comparison(command)
    command.set_defaults(run=run)


def add_comparison(command) -> None:
    """Options of translating a subset with several models; :func:`comparison_of` makes arguments of them."""
    option = command.add_argument
    text = "text, one reference a line, for BLEU (default: the data's)"
    option("--reference", type=Input, metavar="FILE", help=text)
    option("--beam", type=number(1, 1000), default=5, metavar="N", help="width of the beam (default: 5)")
    option("--lenpen", type=number(-10, 10, float), default=1.0, metavar="P", help="length penalty (default: 1)")
    longest = "translations have at most A x + B pieces, x those of the longest source in the batch (default: 0)"
    option("--max-len-a", type=number(0, 1000, float), default=0.0, metavar="A", help=longest)
    option("--max-len-b", type=number(0, 10**6), default=200, metavar="B", help="see --max-len-a (default: 200)")
    option("--repeats", type=number(1, 10_000), default=5, metavar="N", help="timed passes (default: 5)")
    add_batches(command, "test")


def comparison_of(args) -> dict:
    from hgkd_fairseq.evaluation.compare import Search

    search = Search(args.beam, args.lenpen, args.max_len_a, args.max_len_b)
    names = {"max_tokens": "max_tokens", "repeats": "repeats", "cpu": "cpu", "reference_file": "reference"}
    return {name: getattr(args, own) for name, own in names.items()} | {"subset": args.gen_subset, "search": search}


def parser() -> Parser:
    top = Parser(prog="hgkd", description="Hard-gate knowledge distillation for fairseq")
    top.add_argument("--version", action="version", version=hgkd_fairseq.__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for add in (add_user_dir, add_doctor, add_gates, add_methods, add_weights, add_calibration, add_score, add_report,
                add_export, add_compare):  # fmt: skip
        add(commands)
    return top


def stopped(number: int, _frame) -> None:
    """So that `kill` leaves no temporary files."""
    sys.exit(128 + number)


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    vars(args).pop("debug", None)
    args.command = shlex.join(["hgkd", *(word for word in argv if word != "--debug")])
    logging.getLogger().setLevel(logging.WARNING)  # fairseq, once imported, logs every step of loading
    logging.getLogger("filelock").setLevel(logging.WARNING)
    refuse_overwriting(args)
    return args.run(args) or 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(ValueError):  # in a thread
        signal.signal(signal.SIGTERM, stopped)
    return guarded("hgkd: error", lambda: run(argv), "--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
