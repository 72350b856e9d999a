"""The command ``hgkd``: what is around training. ``hgkd COMMAND --help`` explains each."""

from __future__ import annotations

import argparse
import contextlib
import fnmatch
import logging
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import hgkd_fairseq
from hgkd_fairseq import files
from hgkd_fairseq.errors import UserError, guarded, printable

MOST_RESAMPLED = 20_000_000  # bins x replicates: 1.5 GB of sums


def user_dir(_args) -> int:
    print(Path(hgkd_fairseq.__file__).parent)
    return 0


def doctor(_args) -> int:
    from hgkd_fairseq.doctor import report

    return report()


def gates(args) -> int:
    from hgkd_fairseq.gates import listing
    from hgkd_fairseq.sentence_weights import gate  # noqa: F401  registers its own

    print(listing.markdown() if args.markdown else listing.text())
    return 0


def methods(args) -> int:
    from hgkd_fairseq import methods

    print("\n".join(methods.options(args.name, args.teacher)) if args.name else methods.text())
    return 0


def weights(args) -> int:
    from hgkd_fairseq.sentence_weights.table import report

    report(args.checkpoint, args.output, args.compare, args.plot)
    return 0


def settings_of(args):
    from hgkd_fairseq.calibration.scores import Settings

    if args.bins * args.replicates > MOST_RESAMPLED:
        raise UserError(f"--bins {args.bins} x --replicates {args.replicates} are too many; lower one of them")
    return Settings(args.bins, args.min_count, args.replicates, args.seed)


def show(results, args) -> int:
    results.about["command"] = args.command
    if args.json:
        results.write(args.json)
    print(results)
    return 0


def calibration_forced(args) -> int:
    from hgkd_fairseq.evaluation import forced, temperature

    degree = temperature.read(args.temperature)
    results = forced.evaluate(
        args.data, args.path, args.gen_subset, args.max_tokens, args.cpu, settings_of(args), degree, args.tokens
    )
    return show(results, args)


def calibration_inference(args) -> int:
    from hgkd_fairseq.evaluation.inference import Options, evaluate

    options = Options(args.labels, args.words)
    return show(evaluate(args.file, args.reference, options, settings_of(args), args.tokens), args)


def calibration_temperature(args) -> int:
    from hgkd_fairseq.evaluation.temperature import fit

    found = fit(args.data, args.path, args.gen_subset, args.max_tokens, args.cpu, settings_of(args))
    if args.json:
        scores = {"raw": found.raw.to_json(), "scaled": found.scaled.to_json()}
        files.write_json(args.json, {"temperature": found.temperature, "command": args.command, **scores})
    for results in (found.raw, found.scaled):
        print(*(results[key] for key in ("nll", "ece", "ece_without_eos")), sep="\n")
    print(f"temperature = {found.temperature:.4f}")
    return 0


def calibration_diagram(args) -> int:
    from hgkd_fairseq.report.diagram import draw

    draw(args.files, args.output, args.label, "eos:no" if args.without_eos else "eos:yes")
    return 0


def report(args) -> int:
    from hgkd_fairseq.report import page, runs, tables

    page.check(len(args.runs))
    found = tables.measure(runs.read_all([Path(run) for run in args.runs], args.reference))
    files.write_text(args.output, page.html(found))
    print(found.markdown())
    return 0


def search_of(args):
    from hgkd_fairseq.evaluation.compare import Search

    if args.max_len_a + args.max_len_b < 1:
        raise UserError(
            f"--max-len-a {args.max_len_a:g} and --max-len-b {args.max_len_b} leave no room for a translation; "
            "raise one"
        )
    return Search(args.beam, args.lenpen, args.max_len_a, args.max_len_b)


def export(args) -> int:
    from hgkd_fairseq import export as exporting
    from hgkd_fairseq.evaluation.generated import read_references

    if args.ctranslate2:
        exporting.check_conversion(args.path, args.ctranslate2, args.data)
        if args.reference:
            read_references(args.reference)  # for what it refuses: before the work, not after it
    elif args.quantization:
        raise UserError("--quantization is of the CTranslate2 model: add --ctranslate2 DIR")
    exporting.export(args.path, args.output, args.ema)
    print(f"{args.output}: for any fairseq, without --user-dir")
    if not args.ctranslate2:
        return 0
    exporting.to_ctranslate2(args.output, args.ctranslate2, args.data, args.quantization)
    print(f"{args.ctranslate2}: for CTranslate2")
    if args.no_comparison:
        return 0
    return print_comparison(args.data or exporting.data_of(args.path), [args.output, args.ctranslate2], args)


def compare(args) -> int:
    return print_comparison(args.data, args.models, args)


def print_comparison(data: str, models: list[str], args) -> int:
    from hgkd_fairseq.evaluation.compare import compare

    found = compare(
        data, models, args.gen_subset, search_of(args), args.max_tokens, args.repeats, args.cpu, args.reference
    )
    print(found)
    return 0


def number(low: float, high: float = 2**53, kind: type = int) -> Callable[[str], float]:
    """An argument's type: a number from `low` to `high`, a whole one unless `kind` is float."""

    def convert(text: str) -> float:
        what = "number" if kind is float else "whole number"
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{printable(text[:40])} is no {what}") from None
        if not low <= value <= high:  # NaN is not
            limits = f"above {low - 1}" if (low, kind) == (1, int) and value < low else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{printable(text[:40])} is no {what} {limits}")
        return value

    return convert


class Output(str):
    """The name of a file that a command writes; it can be written: told before the work, not after it."""

    def __new__(cls, text: str):
        try:
            files.check_output(text)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return super().__new__(cls, text)


class NewOutput(Output):
    """The name of a file or folder that is not there yet."""

    def __new__(cls, text: str):
        if os.path.lexists(text):
            raise argparse.ArgumentTypeError(f"{text} exists; name another file or folder, or remove it")
        return super().__new__(cls, text)


class Input(str):
    """The name of what a command reads: a file, several with ':' between them, or a folder."""

    content: tuple[str, ...] = ("*",)  # what is read of a folder

    def __new__(cls, text: str):
        if not text:
            raise argparse.ArgumentTypeError("the name is empty; give one")
        return super().__new__(cls, text)

    def is_read(self, output: str) -> bool:
        """Whether an output would write over it, or over what is read in it."""
        if not os.path.isfile(output):
            return False
        for part in {str(self), *self.split(":")}:
            if os.path.isdir(part):
                inside = Path(output).resolve().is_relative_to(Path(part).resolve())
                if inside and any(fnmatch.fnmatch(os.path.basename(output), pattern) for pattern in self.content):
                    return True
            elif files.same_file(output, part):
                return True
        return False


class Data(Input):
    content = ("*.bin", "*.idx", "dict.*.txt")


class RunFolder(Input):
    content = ("*.pt", "*.log", "*.txt", "*.json")


def refuse_overwriting(args) -> None:
    """An output that is an input, or another output."""
    named = [one for value in vars(args).values() for one in (value if isinstance(value, list) else [value])]
    outputs = [one for one in named if isinstance(one, Output)]
    for place, output in enumerate(outputs):
        if any(isinstance(one, Input) and one.is_read(output) for one in named):
            raise UserError(f"{output} is read by this command and would be written over; name another file to write")
        special = os.path.exists(output) and not os.path.isfile(output)
        if not special and any(files.same_file(output, other) for other in outputs[:place]):
            raise UserError(f"{output} is named for two outputs; name another file for one of them")


def add_scoring(command, tokens: bool = True) -> None:
    """Options of every kind of calibration that computes scores."""
    command.add_argument("--bins", type=number(1, 10_000), default=20, help="bins of confidence (default: 20)")
    command.add_argument(
        "--min-count", type=number(1), default=1, metavar="N", help="tokens a bin needs to count in MCE (default: 1)"
    )
    command.add_argument(
        "--replicates", type=number(0, 1_000_000), default=1000, metavar="N",
        help="resamples of the sentences for 95%% intervals (default: 1000; 0: no intervals)",
    )  # fmt: skip
    command.add_argument("--seed", type=number(0), default=1, help="of the resamples (default: 1)")
    command.add_argument("--json", type=Output, metavar="FILE", help="write the scores there as well")
    if tokens:
        command.add_argument(
            "--tokens", type=Output, metavar="FILE", help="write a row for each token: .tsv or .parquet"
        )


def add_model(command, subset: str) -> None:
    """Options of the kinds of calibration that run a model."""
    command.add_argument("data", type=Data, metavar="DATA", help="folder that fairseq-preprocess wrote")
    command.add_argument(
        "--path", type=Input, required=True, metavar="CKPT[:CKPT]", help="fairseq checkpoint, or an ensemble"
    )
    command.add_argument("--gen-subset", default=subset, metavar="SPLIT", help=f"subset to use (default: {subset})")
    command.add_argument(
        "--max-tokens", type=number(1, 2**31 - 1), default=4000, metavar="N", help="tokens a batch (default: 4000)"
    )
    command.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


def add_comparison(command) -> None:
    """Options of translating a subset with several models."""
    command.add_argument("--gen-subset", default="test", metavar="SPLIT", help="subset to translate (default: test)")
    command.add_argument(
        "--reference", type=Input, metavar="FILE", help="text, one reference a line, for BLEU (default: the data's)"
    )
    command.add_argument("--beam", type=number(1, 1000), default=5, metavar="N", help="width of the beam (default: 5)")
    command.add_argument(
        "--lenpen", type=number(-10, 10, float), default=1.0, metavar="P", help="length penalty (default: 1)"
    )
    command.add_argument(
        "--max-len-a", type=number(0, 1000, float), default=0.0, metavar="A",
        help="translations have at most A x + B pieces, x those of the longest source in the batch (default: 0)",
    )  # fmt: skip
    command.add_argument(
        "--max-len-b", type=number(0, 1_000_000), default=200, metavar="B", help="see --max-len-a (default: 200)"
    )
    command.add_argument(
        "--max-tokens", type=number(1, 2**31 - 1), default=4000, metavar="N", help="pieces a batch (default: 4000)"
    )
    command.add_argument("--repeats", type=number(1, 10_000), default=5, metavar="N", help="timed passes (default: 5)")
    command.add_argument("--cpu", action="store_true", help="stay on the CPU where there is a GPU")


class Parser(argparse.ArgumentParser):
    """Of the command and of its subcommands, which argparse makes of the same class."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.add_argument(
            "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
        )


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="hgkd", description="Hard-gate knowledge distillation for fairseq")
    top.add_argument("--version", action="version", version=hgkd_fairseq.__version__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("user-dir", help="print the folder to give to fairseq's --user-dir")
    command.set_defaults(run=user_dir)

    command = commands.add_parser("doctor", help="check this installation; exit status 1 where something is wrong")
    command.set_defaults(run=doctor)

    command = commands.add_parser("gates", help="list the answers to when to distil, the values of --gate")
    command.add_argument("--markdown", action="store_true", help="as a table, with their options")
    command.set_defaults(run=gates)

    command = commands.add_parser("methods", help="the options of fairseq-train that make each method, or those of one")
    command.add_argument("name", nargs="?", metavar="NAME", help="print this one's options, one a line")
    command.add_argument(
        "--teacher", default="TEACHER", metavar="CKPT", help="the teacher's checkpoint in them (default: TEACHER)"
    )
    command.set_defaults(run=methods)

    command = commands.add_parser("weights", help="the weights of training sentences that --gate instance has learned")
    command.add_argument("checkpoint", type=Input, metavar="CKPT", help="of fairseq-train")
    command.add_argument(
        "--output", type=Output, metavar="FILE",
        help="write a tab-separated row for each sentence: its number in the training data, from 0 on, and its weights",
    )  # fmt: skip
    command.add_argument(
        "--compare",
        type=Input,
        metavar="FILE",
        help="numbers of sentences, one a line: medians of those and of the others",
    )
    command.add_argument("--plot", type=Output, metavar="FILE", help="histograms, .png or .svg; with matplotlib")
    command.set_defaults(run=weights)

    calibration = commands.add_parser("calibration", help="measure the calibration of translation models")
    kinds = calibration.add_subparsers(required=True, metavar="KIND")
    forced = kinds.add_parser("forced", help="teacher-forced: the model is given the reference's prefix")
    add_model(forced, "test")
    add_scoring(forced)
    forced.add_argument(
        "--temperature",
        type=Input,
        default="1",
        metavar="T",
        help="divide the logits by it: a number, or temperature's --json file",
    )
    forced.set_defaults(run=calibration_forced)

    inference = kinds.add_parser("inference", help="of the model's own translations, as fairseq-generate wrote them")
    inference.add_argument(
        "file", type=Input, metavar="FILE", help="output of fairseq-generate, run without --remove-bpe and --bpe"
    )
    inference.add_argument(
        "--reference",
        type=Input,
        metavar="FILE",
        help="references in pieces, one a line, instead of those in the output",
    )
    inference.add_argument(
        "--labels", choices=["wang2020", "ter"], default="wang2020",
        help="which tokens are right: those that TER aligns with the reference, less those right after a deletion as "
        "Wang et al. 2020 have it; ter: all of them (default: wang2020)",
    )  # fmt: skip
    inference.add_argument("--words", action="store_true", help="score words, with the product of their pieces'")
    add_scoring(inference)
    inference.set_defaults(run=calibration_inference)

    temperature = kinds.add_parser("temperature", help="fit a temperature by NLL, the control of calibration claims")
    add_model(temperature, "valid")
    add_scoring(temperature, tokens=False)
    temperature.set_defaults(run=calibration_temperature)

    diagram = kinds.add_parser("diagram", help="reliability diagram and confidence histogram of one or more models")
    diagram.add_argument("files", nargs="+", type=Input, metavar="JSON", help="files of forced's or inference's --json")
    diagram.add_argument("--output", required=True, type=Output, metavar="FILE", help=".png or .svg")
    diagram.add_argument("--label", action="append", metavar="NAME", help="of each file in turn (default: file names)")
    diagram.add_argument("--without-eos", action="store_true", help="leave the end of sentence out")
    diagram.set_defaults(run=calibration_diagram)

    command = commands.add_parser(
        "report", help="finished runs side by side: tables in markdown, and an HTML page with diagrams and curves"
    )
    command.add_argument(
        "runs", nargs="+", type=RunFolder, metavar="RUN",
        help="folder of a run; the others are compared with the first",
    )  # fmt: skip
    command.add_argument(
        "--output", type=Output, default="report.html", metavar="FILE", help="the page (default: report.html)"
    )
    command.add_argument(
        "--reference", type=Input, metavar="FILE",
        help="references as text, one a line, instead of those in the translations, which lack unknown characters",
    )  # fmt: skip
    command.set_defaults(run=report)

    command = commands.add_parser("export", help="write a checkpoint for fairseq without this plugin, or CTranslate2")
    command.add_argument("path", type=Input, metavar="CKPT[:CKPT]", help="fairseq checkpoint, or several to average")
    command.add_argument("output", type=NewOutput, metavar="OUT", help="the checkpoint to write")
    command.add_argument("--ema", action="store_true", help="take the moving average of --store-ema")
    command.add_argument(
        "--ctranslate2",
        type=NewOutput,
        metavar="DIR",
        help="convert it to that folder too, translate with both and compare",
    )
    command.add_argument(
        "--quantization", choices=["int8", "int8_float16", "float16"],
        help="of the CTranslate2 model's weights (default: as they are)",
    )  # fmt: skip
    command.add_argument(
        "--data",
        type=Data,
        metavar="DATA",
        help="folder that fairseq-preprocess wrote (default: what the model was trained on)",
    )
    command.add_argument("--no-comparison", action="store_true", help="convert only")
    add_comparison(command)
    command.set_defaults(run=export)

    command = commands.add_parser("compare", help="translate with several models: BLEU, calibration, size, speed")
    command.add_argument("data", type=Data, metavar="DATA", help="folder that fairseq-preprocess wrote")
    command.add_argument(
        "models", nargs="+", type=Input, metavar="MODEL", help="fairseq checkpoint or ensemble, CTranslate2 folder"
    )
    add_comparison(command)
    command.set_defaults(run=compare)
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
    return args.run(args)


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    with contextlib.suppress(ValueError):  # in a thread
        signal.signal(signal.SIGTERM, stopped)
    return guarded("hgkd: error", lambda: run(argv), "--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
