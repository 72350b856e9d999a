"""The command ``hgkd``, with everything but training. ``hgkd COMMAND --help`` describes each subcommand.

For each subcommand, this module has a function ``add_...`` that adds its parser, with an inner function `run` that
calls the implementation. `run` also imports the implementation, because importing torch and fairseq takes seconds.
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
from pathlib import Path

import hgkd_fairseq
from hgkd_fairseq import sequence_level
from hgkd_fairseq.arguments import (
    Data,
    Input,
    NewOutput,
    Output,
    Parser,
    RunFolder,
    add,
    add_batches,
    add_data,
    add_running,
    add_search,
    add_segment_scores,
    add_tokenize,
    number,
    refuse_overwriting,
)  # fmt: skip
from hgkd_fairseq.errors import UserError, flag, guarded


def add_user_dir(commands) -> None:
    def run(args) -> None:
        print(Path(hgkd_fairseq.__file__).parent)

    add(commands, "user-dir", run, "print the folder to give to fairseq's --user-dir")


def add_doctor(commands) -> None:
    def run(args) -> int:
        from hgkd_fairseq.doctor import report

        return report()

    add(commands, "doctor", run, "check this installation; exit status 1 where something is wrong")


def add_gates(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.gates import listing
        from hgkd_fairseq.sentence_weights import gate  # noqa: F401  registers its own

        print(listing.markdown() if args.markdown else listing.text())

    option = add(commands, "gates", run, "list the answers to when to distil, the values of --gate")
    option("--markdown", action="store_true", help="as a table, with their options")


def add_options(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.criterions import listing

        print(listing.text(), end="")

    add(commands, "options", run, "list the options that criterion and tasks add to fairseq-train")


def add_methods(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq import methods

        if not args.name and (args.teacher or args.data):
            option = "--data" if args.data else "--teacher CKPT"
            raise UserError(f"{option} is of one method; name it: hgkd methods NAME {option}")
        if args.teacher and args.data:
            raise UserError("--teacher is for the options, which --data does not print; drop one of them")
        if args.data:
            print(methods.data(args.name))
        else:
            teacher = args.teacher or methods.TEACHER
            print("\n".join(methods.options(args.name, teacher)) if args.name else methods.text())

    option = add(commands, "methods", run, "the options of fairseq-train that make each method, or those of one")
    option("name", nargs="?", metavar="NAME", help="print this one's options, one a line")
    option("--teacher", metavar="CKPT", help="the teacher's checkpoint in them (default: TEACHER)")
    which = "print which of the teacher's translations NAME is trained on, in place of the references"
    option("--data", action="store_true", help=which)


def add_weights(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.sentence_weights.table import report

        report(args.checkpoint, args.output, args.compare, args.plot)

    option = add(commands, "weights", run, "the weights of training sentences that --gate instance has learned")
    option("checkpoint", type=Input, metavar="CKPT", help="of fairseq-train")
    table = "write a tab-separated row for each sentence: its number in the training data, from 0 on, and its weights"
    option("--output", type=Output, metavar="FILE", help=table)
    numbers = "numbers of sentences, one a line: medians of those and of the others"
    option("--compare", type=Input, metavar="FILE", help=numbers)
    option("--plot", type=Output, metavar="FILE", help="histograms, .png or .svg; with matplotlib")


def add_calibration(commands) -> None:
    command = commands.add_parser("calibration", help="measure the calibration of translation models")
    kinds = command.add_subparsers(required=True, metavar="KIND")
    for make in (add_forced, add_inference, add_temperature, add_diagram):
        make(kinds)


def add_forced(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation import forced, temperature

        degree = temperature.read(args.temperature)
        show(forced.evaluate(**model_of(args), temperature=degree, tokens_file=args.tokens), args)

    option = add(kinds, "forced", run, "teacher-forced: the model is given the reference's prefix")
    add_model(option, "test")
    add_scoring(option)
    divisor = "divide the logits by it: a number, or temperature's --json file"
    option("--temperature", type=Input, default="1", metavar="T", help=divisor)


def add_inference(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.inference import Labelling, evaluate

        options = Labelling(args.labels, args.words, args.language_token, args.tokenize)
        found = evaluate(args.file, args.reference, options, settings_of(args), args.tokens, args.segment_scores)
        show(found, args)

    option = add(kinds, "inference", run, "of the model's own translations, as fairseq-generate wrote them")
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
    token = (
        "which score of a sentence is that of a language token, and is left out: the first, of the task "
        "translation_multi_simple_epoch, or the last, of translation_from_pretrained_bart (default: none)"
    )
    option("--language-token", choices=["first", "last"], help=token)
    add_tokenize(option)
    add_segment_scores(option, "their rank correlation with the log-probability")
    add_scoring(option)


def add_temperature(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.temperature import fit

        show(fit(**model_of(args)), args)

    option = add(kinds, "temperature", run, "fit a temperature by NLL, the control of calibration claims")
    add_model(option, "valid")
    add_scoring(option, tokens=False)


def add_diagram(kinds) -> None:
    def run(args) -> None:
        from hgkd_fairseq.report.diagram import draw

        draw(args.files, args.output, args.label, "eos:no" if args.without_eos else "eos:yes")

    about = "reliability diagram and confidence histogram of one or more models"
    option = add(kinds, "diagram", run, about)
    option("files", nargs="+", type=Input, metavar="JSON", help="files of forced's or inference's --json")
    option("--output", required=True, type=Output, metavar="FILE", help=".png or .svg")
    option("--label", action="append", metavar="NAME", help="of each file in turn (default: file names)")
    option("--without-eos", action="store_true", help="leave the end of sentence out")


def add_model(option, subset: str) -> None:
    """Add the options of calibration commands that run a model; :func:`model_of` converts them to arguments."""
    add_data(option)
    option("--path", type=Input, required=True, metavar="CKPT[:CKPT]", help="fairseq checkpoint, or an ensemble")
    several = "of a model of several language pairs, one of them (default: all together)"
    option("--lang-pair", metavar="SRC-TGT", help=several)
    add_batches(option, subset)


def model_of(args) -> dict:
    names = ("data", "path", "max_tokens", "cpu")
    found = {name: getattr(args, name) for name in names} | {"pair": args.lang_pair}
    return found | {"subset": args.gen_subset, "settings": settings_of(args)}


def add_scoring(option, tokens: bool = True) -> None:
    """Add the options of calibration commands that compute scores, and ``--tokens`` if `tokens` is true."""
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

        pairs = tuple(dict.fromkeys(args.lang_pair or ()))
        how = ScoreOptions(args.generate, args.reference, args.tokenize, args.own_lenpen, args.cpu, pairs, args.command)
        score_all(args.data, args.runs, args.checkpoint or ["best"], how)

    option = add(commands, "score", run, "all that is measured of trained runs, in the files that report reads")
    add_data(option)
    option("runs", nargs="+", type=RunFolder, metavar="RUN", help="folder that fairseq-train saved to")
    which = (
        "best, last, a file in RUN, or best-bleu: of up to 10 epochs' checkpoints that with the highest BLEU on the "
        "validation set; may be given again (default: best, whose scores are in RUN; those of checkpoint_NAME.pt in "
        "RUN/NAME)"
    )
    option("--checkpoint", action="append", type=Input, metavar="NAME", help=which)
    search = "of fairseq-generate's search, in one word (default: --beam 5)"
    option("--generate", default="--beam 5", metavar="OPTIONS", help=search)
    text = "text, one reference a line (default: the data's, in words)"
    option("--reference", type=Input, metavar="FILE", help=text)
    add_tokenize(option)
    own = "also BLEU at the length penalty with the best one on the validation set: 6 more translations"
    option("--own-lenpen", action="store_true", help=own)
    several = "of a model of several language pairs, which; may be given again; all of its files are in RUN/SRC-TGT"
    option("--lang-pair", action="append", metavar="SRC-TGT", help=several)
    add_running(option)


def add_report(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.report.page import report

        print(report(args.runs, args.output, args.reference, args.translations, args.segment_scores))

    about = "finished runs side by side: tables in markdown, and an HTML page with diagrams and curves"
    option = add(commands, "report", run, about)
    runs = "folder of a run; the others are compared with the first"
    option("runs", nargs="+", type=RunFolder, metavar="RUN", help=runs)
    option("--output", type=Output, default="report.html", metavar="FILE", help="the page (default: report.html)")
    text = "references as text, one a line, instead of those in the translations, which lack unknown characters"
    option("--reference", type=Input, metavar="FILE", help=text)
    which = "translations of `hgkd score --checkpoint NAME`, in RUN/NAME, such as best-bleu; all else is RUN's own"
    option("--translations", default="", metavar="NAME", help=which)
    add_segment_scores(option, "give it once for each run, in the order of the runs")


def add_store(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.teacher.storing import StoreOptions, write

        for name, kind in (("draws", "sampled"), ("k", "topk"), ("dtype", "hidden")):
            if getattr(args, name) is not None and args.kind != kind:
                raise UserError(f"--{name} is for --kind {kind}, and this is {args.kind}; drop it")
        subsets = tuple(args.subset.split(","))
        sizes = (args.draws or StoreOptions.draws, args.k or StoreOptions.tokens, args.max_tokens)
        more = (args.cpu, args.teacher_model_overrides, args.folds, args.shard_size)
        dtype = args.dtype or StoreOptions.dtype
        how = StoreOptions(args.kind, subsets, dtype, args.teacher_temperature, *sizes, *more)
        print(write(args.data, args.teacher_path, args.output, how))

    about = "run a teacher once over data and keep what it says, for fairseq-train --teacher-store"
    option = add(commands, "store", run, about)
    option("data", type=Data, metavar="DATA", help="folder that fairseq-preprocess wrote, or several with ':' between")
    ensemble = "fairseq checkpoint, or an ensemble; with --folds one for each fold"
    option("--teacher-path", type=Input, required=True, metavar="CKPT[:CKPT]", help=ensemble)
    moved = "a dict of settings of the teacher's checkpoint, as \"{'data': 'DIR'}\" of dictionaries that have moved"
    option("--teacher-model-overrides", default="{}", metavar="DICT", help=moved)
    folder = "to fill; a command that was killed goes on where it was, and several at once share the work"
    option("--output", required=True, metavar="STORE", help=folder)
    kinds = (
        "hidden: the decoder's states, for all gates and temperatures; sampled: draws, an unbiased estimate; topk: the "
        "most probable tokens and the rest as one, biased; gold: for --gauge-store alone (default: hidden)"
    )
    option("--kind", choices=["hidden", "sampled", "topk", "gold"], default="hidden", help=kinds)
    each = "of N teachers the i-th is asked of the training sentences i, i + N, ... alone, with --kind gold"
    option("--folds", action="store_true", help=each)
    option("--subset", default="train,valid", metavar="SPLITS", help="with ',' between (default: train,valid)")
    option("--dtype", choices=["bf16", "fp16", "fp32"], help="of hidden states (default: bf16)")
    degree = "of what is drawn and compared (default: 1.5)"
    option("--teacher-temperature", type=number(0.01, 1000, float), default=1.5, metavar="T", help=degree)
    option("--draws", type=number(1, 255), metavar="N", help="a token, of sampled (default: 32)")
    option("--k", type=number(1, 10_000), metavar="K", help="tokens kept, of topk (default: 8)")
    option("--max-tokens", type=number(1, 2**31 - 1), default=4000, metavar="N", help="tokens a batch (default: 4000)")
    size = "sentences a shard (default: 4096)"
    option("--shard-size", type=number(1), default=4096, metavar="N", help=size)
    add_running(option)


def add_export(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.export import export_all

        refuse_unused(args)
        comparison = None if args.no_comparison else comparison_of(args)
        export_all(args.path, args.output, args.ema, args.ctranslate2, args.quantization, args.data, comparison)

    about = "write a checkpoint for fairseq without this plugin, or CTranslate2"
    option = add(commands, "export", run, about)
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
    add_comparison(option)


def refuse_unused(args) -> None:
    """Refuse options of `hgkd export` that have no effect. Options with their default values are not detected.

    Raises:
        UserError: an option needs --ctranslate2, or contradicts --no-comparison.
    """
    plain = vars(parser().parse_args(["export", args.path, args.output]))
    options = ("quantization", "data", "no_comparison", *COMPARED)
    given = [name for name in options if getattr(args, name) != plain[name]]
    if given and not args.ctranslate2:
        raise UserError(f"{flag(given[0])} is of the CTranslate2 model, or of its comparison: add --ctranslate2 DIR")
    if args.no_comparison and given[-1] in COMPARED:
        raise UserError(f"{flag(given[-1])} is of the comparison, and --no-comparison leaves it out; drop one of them")


def add_compare(commands) -> None:
    def run(args) -> None:
        from hgkd_fairseq.evaluation.compare import compare

        print(compare(args.data, args.models, segment_scores=args.segment_scores, **comparison_of(args)))

    option = add(commands, "compare", run, "translate with several models: BLEU, calibration, size, speed")
    add_data(option)
    models = "fairseq checkpoint or ensemble, CTranslate2 folder"
    option("models", nargs="+", type=Input, metavar="MODEL", help=models)
    add_comparison(option)
    add_segment_scores(option, "give it once for each model, in the order of the models")


# The options of :func:`add_comparison` except --user-dir, which an export without a comparison may need too.
COMPARED = (
    *("reference", "tokenize", "beam", "lenpen", "max_len_a", "max_len_b"),
    *("repeats", "gen_subset", "max_tokens", "cpu"),
)


def add_comparison(option) -> None:
    """Add the options of translating with several models; :func:`comparison_of` converts them to arguments."""
    text = "text, one reference a line, for BLEU (default: the data's)"
    option("--reference", type=Input, metavar="FILE", help=text)
    add_tokenize(option)
    add_search(option)
    option("--repeats", type=number(1, 10_000), default=5, metavar="N", help="timed passes (default: 5)")
    add_batches(option, "test")


def comparison_of(args) -> dict:
    from hgkd_fairseq.evaluation.compare import Search

    search = Search(args.beam, args.lenpen, args.max_len_a, args.max_len_b)
    found = {name: getattr(args, name) for name in ("max_tokens", "repeats", "cpu", "tokenize")}
    return found | {"subset": args.gen_subset, "search": search, "reference_file": args.reference}


def parser() -> Parser:
    top = Parser(prog="hgkd", description="Hard-gate knowledge distillation for fairseq")
    top.add_argument("--version", action="version", version=hgkd_fairseq.__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for make in (add_user_dir, add_doctor, add_options, add_gates, add_methods, add_weights, add_calibration,
                 add_score, add_report, add_store, *sequence_level.COMMANDS, add_export, add_compare):  # fmt: skip
        make(commands)
    return top


def stopped(number: int, _frame) -> None:
    """Handle SIGTERM by raising SystemExit, so that temporary files are removed."""
    sys.exit(128 + number)


def run(argv: list[str]) -> int:
    args = parser().parse_args(argv)
    vars(args).pop("debug", None)
    args.command = shlex.join(["hgkd", *(word for word in argv if word != "--debug")])
    logging.basicConfig(format="%(message)s")  # without a handler, importing fairseq would enable DEBUG messages
    logging.getLogger().setLevel(logging.WARNING)  # fairseq logs every step of loading at level INFO
    logging.getLogger("filelock").setLevel(logging.WARNING)
    refuse_overwriting(args)
    if getattr(args, "user_dir", None):
        from hgkd_fairseq.plugin import architectures

        architectures.register(args.user_dir)
    return args.run(args) or 0


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(ValueError):  # raised outside of the main thread
        signal.signal(signal.SIGTERM, stopped)
    return guarded("hgkd: error", lambda: run(argv), "--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
