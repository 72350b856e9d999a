"""Scores of trained runs (`hgkd score`), in the files that `hgkd report` reads. Existing results are reused.

For each checkpoint: translations of the test set with BLEU and chrF, forced and inference calibration, a temperature
fitted on the validation set (the control of claims about calibration) and the scores at this temperature. Optionally,
translations with the length penalty that is best on the validation set (the control of claims about BLEU).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import itertools
import math
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from fairseq import options
from fairseq_cli import generate
from sacrebleu.metrics import BLEU, CHRF

import hgkd_fairseq
from hgkd_fairseq import files
from hgkd_fairseq.arguments import TOKENIZERS
from hgkd_fairseq.calibration.scores import Results, Score
from hgkd_fairseq.errors import UserError, flag, foreseen, in_one_line
from hgkd_fairseq.evaluation import forced, generated, inference, languages, logs, results, temperature
from hgkd_fairseq.evaluation.steps import RECORD, Steps
from hgkd_fairseq.plugin import binarised, checkpoints

CHECKPOINTS = {"best": "checkpoint_best.pt", "last": "checkpoint_last.pt"}
BEST_BLEU = "best-bleu"  # among these two and the epochs' checkpoints
CANDIDATES = 10  # maximum number of the epochs' checkpoints, evenly spaced
EPOCH = re.compile(r"checkpoint(\d{1,9})\.pt")
LENGTH_PENALTIES = (0.5, 1.0, 1.5, 2.0, 3.0)
PACKAGES = ("torch", "ve-fairseq", "sacrebleu")
CPU_TOKENS, GPU_TOKENS = 4000, 12_000  # --max-tokens of fairseq-generate
GENERATED, LOG = "generate-test.txt", "generate.log"
SHOWN = ("nll", "ece", "ece_without_eos")
TAKEN = ("scaled", "lenpen", BEST_BLEU)  # folders that do not hold the scores of a checkpoint of that name
# Options of fairseq-generate that are set here: they determine the model, the data and the format of the output.
DECIDED = (
    *("path", "user_dir", "gen_subset", "results_path", "required_batch_size_multiple", "temperature", "nbest"),
    *("quiet", "score_reference", "sacrebleu", "scoring", "post_process", "bpe", "tokenizer"),
    *("task", "source_lang", "target_lang", "dataset_impl", "num_shards", "shard_id"),
    *("truncate_source", "skip_invalid_size_inputs_valid_test", "prefix_size", "constraints"),
)


@dataclass(frozen=True)
class ScoreOptions:
    """Options of the scoring."""

    generate: str = "--beam 5"  # options of fairseq-generate
    reference: str | None = None  # text file with one reference per line; None: those in the data, pieces joined
    tokenize: str = TOKENIZERS[0]  # sacreBLEU tokenizer for BLEU; "none" if texts are already tokenised
    own_lenpen: bool = False  # also translate with the length penalty that is best on the validation set
    cpu: bool = False  # use the CPU even if a GPU is available
    pairs: tuple[str, ...] = ()  # language pairs to score, of models of several
    command: str = ""  # command line, for the report


def score_all(data: str, runs: Sequence[str], names: Sequence[str], how: ScoreOptions) -> None:
    """Score checkpoints of runs, and print the main scores.

    Args:
        data: folder that fairseq-preprocess wrote, with the subsets valid and test.
        runs: folders that fairseq-train saved to.
        names: checkpoints to score in each: "best", "last", a file, or "best-bleu", the checkpoint with the highest
            BLEU on the validation set, translated greedily, among up to 10 of the epochs' checkpoints, the best one and
            the last one. The scores of "best" are written to the run's folder, those of checkpoint_NAME.pt to its
            subfolder NAME, those of "best-bleu" to best-bleu; all of them in a subfolder SRC-TGT if there are pairs.
        how: options of the scoring.

    Raises:
        UserError: a file or option is missing or cannot be used; checked before any model is run where possible.
    """
    if how.reference and len(how.pairs) > 1:
        raise UserError("--reference is the text of one language pair: give one --lang-pair")
    check_generation(how.generate, data)
    references = generated.read_references(how.reference) if how.reference else None
    asked = itertools.product(map(Path, runs), names, how.pairs or [None])
    found = [Scoring(data, run, name, how, pair) for run, name, pair in asked]
    found[0].check_references(references)  # all share a test set: there is one pair at most
    folders: dict[Path, Scoring] = {}
    for one in found:
        before = folders.setdefault(one.folder.resolve(), one)
        if before.path.resolve() != one.path.resolve():
            raise UserError(f"the scores of {before.path} and {one.path} would be written to {one.folder}; rename one")
    for number, one in enumerate(found):
        others = [other for other in found[:number] if (other.run, other.pair) == (one.run, one.pair)]
        print(*one.score(references, others), sep="\n", flush=True)


def check_generation(how: str, data: str) -> None:
    """Check that fairseq-generate accepts the options in `how`, and that none of them is in DECIDED.

    Raises:
        UserError: an option is not accepted, or is in DECIDED.
    """
    given, plain = (vars(generation(text, data, "--path", "PATH")) for text in (how, ""))
    if given["beam"] < 1:
        raise UserError(f"--generate '{how}': --beam {given['beam']} finds nothing; give 1 (greedy) or more")
    for name in DECIDED:
        if given.get(name) != plain.get(name):
            raise UserError(f"--generate '{how}' sets {flag(name)}, which hgkd score decides itself; drop it")


def generation(how: str, *words: str) -> argparse.Namespace:
    """Parse arguments of fairseq-generate: `words`, followed by the options in `how`.

    Raises:
        UserError: fairseq-generate does not accept them.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return options.parse_args_and_arch(options.get_generation_parser(), [*words, *shlex.split(how)])
    except (SystemExit, ValueError) as error:
        why = told.getvalue().strip().rpartition("error: ")[2] or error
        raise UserError(f"--generate '{how}' is not for fairseq-generate: {why}") from None


def same_weights(one: Path, other: Path) -> bool:
    """Return whether two checkpoints of a run have the same weights."""
    mine, its = (checkpoints.read(path).model for path in (one, other))

    def equal(name: str) -> bool:
        return mine[name].dtype == its[name].dtype and torch.equal(mine[name], its[name])

    return mine.keys() == its.keys() and all(map(equal, mine))


class Scoring:
    """Scoring of one checkpoint of a run.

    Args:
        data: folder that fairseq-preprocess wrote.
        run: folder that fairseq-train saved to.
        name: checkpoint; see :func:`score_all`.
        how: options of the scoring.
        pair: language pair, of a model of several.

    Raises:
        UserError: the checkpoint cannot be read or was not trained on a language pair of `how`, or its scores would
            overwrite others.
    """

    def __init__(self, data: str, run: Path, name: str, how: ScoreOptions, pair: str | None = None):
        self.data, self.run, self.how, self.pair = data, run, how, pair
        place = run / pair if pair else run
        corpus = Path(binarised.first_shard(data))
        subsets = [file for split in ("dict", "valid", "test") for file in sorted(corpus.glob(f"{split}.*"))]
        self.known = (hgkd_fairseq.__version__, *subsets, *filter(None, [pair]))
        log = run / "train.log"
        self.curve = logs.read(log).epochs if log.exists() else []
        self.candidates = self.all_candidates() if name == BEST_BLEU else []
        if self.candidates:
            self.path, self.folder = self.candidates[0], place / name
        elif name == "best":
            self.path, self.folder = run / CHECKPOINTS[name], place
        else:
            self.path = run / CHECKPOINTS.get(name, name)
            named = self.path.stem.removeprefix("checkpoint").lstrip("_.")
            self.folder = (place if pair else self.path.parent) / named
            if self.folder.name in TAKEN or self.folder.resolve() == place.resolve():
                raise UserError(
                    f"--checkpoint {name}: its scores would be written over others in {self.folder}; rename it to "
                    "checkpoint_NAME.pt, with another NAME"
                )
        if not self.path.is_file():
            raise UserError(
                f"{self.path} does not exist; --checkpoint is best, {BEST_BLEU}, last or a file in the run's folder"
            )
        self.ask(checkpoints.read(self.path, model=False))

    def ask(self, checkpoint: checkpoints.Checkpoint) -> None:
        """Determine the arguments that fairseq-generate needs for the checkpoint's task, and the labelling of its
        output. All language pairs of `how` are checked, so that an unknown one is reported before any is scored."""
        for pair in self.how.pairs:
            languages.check_pair(checkpoint.path, checkpoint.options("task"), pair)
        self.task = languages.generation(checkpoint, self.pair)
        token = languages.unprinted_token(checkpoint.options("task"))
        self.labelling = inference.Labelling(language_token=token, tokenize=self.how.tokenize)

    def check_references(self, references: list[str] | None) -> None:
        """Check that there are as many references as sentences in the test set.

        Raises:
            UserError: the numbers differ.
        """
        if references is None:
            return
        model = checkpoints.read(self.path, model=False)
        task = languages.make_task(binarised.first_shard(self.data), str(self.path), model, self.pair)
        sentences = len(binarised.subset(task, "test"))
        if len(references) != sentences:
            raise UserError(
                f"{self.how.reference} has {len(references)} lines and the test set in {self.data} {sentences} "
                "sentences; name the text that the data was made from with --reference"
            )

    def all_candidates(self) -> list[Path]:
        """Return the candidates of :meth:`best_by_bleu`.

        Raises:
            UserError: the run has no checkpoints.
        """
        epochs = {int(found[1]): file for file in self.run.glob("*.pt") if (found := EPOCH.fullmatch(file.name))}
        numbers = sorted(epochs)
        step = max(len(numbers) / CANDIDATES, 1)  # backwards from the last one
        candidates = [epochs[numbers[-1 - int(i * step)]] for i in range(min(CANDIDATES, len(numbers)))]
        candidates += [file for name in CHECKPOINTS.values() if (file := self.run / name).is_file()]
        if not candidates:
            raise UserError(f"{self.run} holds no checkpoint of fairseq-train")
        return candidates

    def best_by_bleu(self) -> Path:
        """Return the candidate with the highest BLEU on the validation set, translated greedily."""

        def choose(output: Path) -> None:
            found = {}
            for path in self.candidates:
                self.path = path
                found[self.path.name] = self.valid_bleu("--beam", "1")
            files.write_json(output, {"best": max(found, key=lambda name: found[name]), "bleu": found})

        how = (self.how.generate, self.how.cpu, self.how.tokenize)
        table = files.read_json(self.once("candidates.json", choose, *how, *self.candidates), {"best": str})
        return self.run / Path(table["best"]).name

    def valid_bleu(self, *more: str) -> float:
        """Compute BLEU on the validation set, against the references in the data.

        Args:
            more: further options of fairseq-generate.
        """
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder, "generate-valid.txt")
            self.translate(output, *more)
            found, gold = generated.read_texts(output)
        return self.bleu().corpus_score(found, [gold or []]).score

    def translated(self, name: str, *more: str) -> Path:
        """Return the output of fairseq-generate, in pieces; its log with the settings is generate.log in its folder."""
        return self.once(name, lambda file: self.translate(file, *more), self.how.generate, self.how.cpu, more)

    def translate(self, file: Path, *more: str) -> None:
        """Run fairseq-generate; its output and its log replace existing ones once both are complete."""
        partial = file.with_name(f"{file.stem}.partial")  # a fixed name, so that nothing is left of killed processes
        words, own = self.task
        args = generation(
            f"{self.how.generate} {shlex.join(more)}",
            *words,
            *(self.data, "--path", str(self.path), "--user-dir", str(Path(hgkd_fairseq.__file__).parent)),
            *("--gen-subset", file.stem.removeprefix("generate-"), "--results-path", str(partial)),
            *("--required-batch-size-multiple", "1", "--max-tokens", str(self.batch_tokens()), "--no-progress-bar"),
            *("--num-workers", "0"),  # torch may wait 5 s for a worker to end, as long as a translation takes
            *(["--cpu"] if self.how.cpu else []),
        )
        for option, value in own.items():
            setattr(args, option, value)
        try:
            partial.mkdir(exist_ok=True)
            with logs.logged(partial / LOG), contextlib.redirect_stdout(sys.stderr):
                self.generate(args)
            for name in (LOG, file.name):
                (partial / name).replace(file.with_name(name))
        except OSError as error:
            if error.filename is None or Path(error.filename).is_relative_to(partial):
                raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def generate(self, args: argparse.Namespace) -> None:
        try:
            generate.main(args)
        except Exception as error:
            if foreseen(error):
                raise
            how = f"fairseq-generate, with --generate '{self.how.generate}'"
            raise UserError(f"{self.path}: {how}: {in_one_line(error)}") from error

    def batch_tokens(self) -> int:
        """Return the maximum number of tokens in a batch: more on a GPU, where the time of a search step is that of its
        kernel launches and hardly depends on the batch size."""
        return CPU_TOKENS if self.how.cpu or not torch.cuda.is_available() else GPU_TOKENS

    def measured(self, name: str, evaluate: Callable[[], Results], *inputs: Any) -> dict[str, Any]:
        return results.read(self.once(name, lambda file: results.write(evaluate(), file, self.how.command), *inputs))

    def forced(self, name: str, degree: float = 1.0) -> dict[str, Any]:
        model = (self.data, str(self.path))
        how: dict[str, Any] = {"cpu": self.how.cpu, "temperature": degree, "pair": self.pair}
        return self.measured(name, lambda: forced.evaluate(*model, **how), degree)

    def inference(self, name: str, translations: Path) -> dict[str, Any]:
        """Return the inference scores; empty for a model with mBART's task if a translation continues after EOS."""
        another = [] if self.how.tokenize == TOKENIZERS[0] else [self.how.tokenize]
        try:
            return self.measured(
                name, lambda: inference.evaluate(str(translations), options=self.labelling), translations, *another
            )
        except inference.Uneven as error:
            if self.labelling.language_token != "last":
                raise
            print(f"hgkd: {self.folder}: scored without the ECE of its translations: {error}", file=sys.stderr)
            (self.folder / name).unlink(missing_ok=True)  # may be the result of another checkpoint
            return {}

    def temperature(self) -> float | None:
        """Return the temperature fitted on the validation set; None if the NLL has no minimum."""

        def make(file: Path) -> None:
            found = temperature.fit(self.data, str(self.path), cpu=self.how.cpu, pair=self.pair)
            results.write(found, file, self.how.command)

        try:
            return temperature.read_file(self.once("temperature.json", make))["temperature"]
        except temperature.NoMinimum as error:
            print(f"hgkd: {self.folder}: scored without a temperature: {error}", file=sys.stderr)
            made = ("temperature.json", "scaled.json", f"scaled/{GENERATED}", "inference_scaled.json")
            for name in made:  # may be those of another checkpoint
                (self.folder / name).unlink(missing_ok=True)
            return None

    def score(self, references: list[str] | None, others: Sequence[Scoring] = ()) -> list[str]:
        """Compute all scores, write scores.json, and return the lines to print.

        Args:
            references: lines of the references' text; None: those in the data.
            others: checkpoints of the same run and pair that are scored already. The files of one with the same weights
                are copied.
        """
        before = {path: files.identity(path) for path in self.candidates or [self.path]}
        if self.candidates:
            self.once = Steps(self.folder, *self.known).once
            self.path = self.best_by_bleu()
        self.steps = Steps(self.folder, *self.known, self.path)
        self.once = self.steps.once
        for other in others:
            if other.folder != self.folder and other.up_to_date() and same_weights(self.path, other.path):
                print(f"hgkd: {self.path}: has the weights of {other.path}, whose scores are copied", file=sys.stderr)
                self.once = functools.partial(self.copied, other.folder)
                break
        found = {"": self.forced("forced.json")}
        found["inference_"] = self.inference("inference.json", self.translated(GENERATED))
        degree = self.temperature()
        if degree is not None:
            found["scaled_"] = self.forced("scaled.json", degree)
            translations = self.translated(f"scaled/{GENERATED}", "--temperature", str(degree))
            found["scaled_inference_"] = self.inference("inference_scaled.json", translations)
        quality, signatures = self.quality(references)
        signed = {f"{key}ece": found[key]["signature"] for key in ("", "inference_") if found[key]}
        scores = {
            **quality,
            "temperature": degree,
            **{kind + key: each[key] for kind, each in found.items() for key in ("ece", "nll") if key in each},
            **self.training(),
            "parameters": found[""]["parameters"],
            "signatures": {**signatures, **signed},
            "versions": {"hgkd_fairseq": hgkd_fairseq.__version__, **{one: metadata.version(one) for one in PACKAGES}},
            "threads": torch.get_num_threads(),
        }
        for path, known in before.items():
            now = files.identity(path)
            if now != known and (path == self.path or now is not None):  # another candidate may be gone
                (self.folder / RECORD).unlink(missing_ok=True)  # it has files of the one under the hash of the other
                raise UserError(
                    f"{path} was replaced or removed while it was scored; score it when its training has ended"
                )
        files.write_json(self.folder / "scores.json", scores)
        labels = (("bleu", "BLEU"), ("chrf", "chrF2"))
        lines = [f"{label}|{signatures[key]} = {quality[key]:.2f}" for key, label in labels]
        if self.how.own_lenpen:
            lines.append(f"BLEU|lenpen:{quality['lenpen']:g}|{signatures['bleu']} = {quality['lenpen_bleu']:.2f}")
        for kind, each in found.items():
            rows = [row for row in each.get("scores", ()) if row["key"] in SHOWN and row["value"] is not None]
            lines += [f"At temperature {degree:.4f}:"] if kind == "scaled_" else []
            lines += [str(Score(**row)) for row in rows]
        return [str(self.folder), *lines]

    def up_to_date(self) -> bool:
        """Return whether the checkpoint's file is still the one that was scored; a training may have replaced it."""
        return self.path.is_file() and self.steps.inputs[-1] == files.sha256(self.path)

    def copied(self, folder: Path, name: str, make: Callable[[Path], object], *inputs: Any) -> Path:
        """Do the step of a file as `Steps.once` does, but copy the file from `folder` if it is there."""
        source = folder / name
        log = source.with_name(LOG)
        names = (name, str(log.relative_to(folder))) if source.name == GENERATED else (name,)

        def copy(_: Path) -> None:
            for one in names:
                files.copy(folder / one, self.folder / one)

        there = all((folder / one).is_file() for one in names)
        return self.steps.once(name, copy if there else make, *inputs)

    def quality(self, references: list[str] | None) -> tuple[dict[str, float], dict[str, str]]:
        """Return the scores of the translations as text, and their signatures."""
        texts, references = self.texts(GENERATED, "translations.txt", references)
        bleu, chrf = self.bleu(), CHRF()
        scored = bleu.corpus_score(texts, [references])
        found = {"bleu": scored.score, "brevity_penalty": scored.bp}
        found["chrf"] = chrf.corpus_score(texts, [references]).score
        if self.how.own_lenpen:
            chosen = self.once("lenpen.json", self.choose_lenpen, self.how.generate, self.how.cpu, self.how.tokenize)
            penalty = files.read_json(chosen, {"lenpen": float})["lenpen"]
            name = f"lenpen/{GENERATED}"
            self.translated(name, "--lenpen", str(penalty))
            scored = bleu.corpus_score(self.texts(name, "translations-lenpen.txt", references)[0], [references])
            found |= {"lenpen": penalty, "lenpen_bleu": scored.score, "lenpen_brevity_penalty": scored.bp}
        return found, {"bleu": str(bleu.get_signature()), "chrf": str(chrf.get_signature())}

    def bleu(self) -> BLEU:
        return BLEU(tokenize=self.how.tokenize, force=True)  # force: no warning about tokenised texts

    def texts(self, name: str, output: str, references: list[str] | None) -> tuple[list[str], list[str]]:
        """Return translations and references as text; the translations are also written to `output`.

        Raises:
            UserError: the numbers of translations and references differ.
        """
        found, own = generated.read_texts(self.folder / name)
        references = (own or []) if references is None else references
        if len(found) != len(references):
            counts = f"{len(found)} translations for {len(references)} references"
            raise UserError(f"{self.folder}: {counts}; name the text that the data was made from with --reference")
        files.write_text(self.folder / output, "".join(f"{line}\n" for line in found))
        return found, references

    def choose_lenpen(self, file: Path) -> None:
        """Write the length penalty with the highest BLEU on the validation set, against the references in the data. It
        is the control of claims about BLEU, as the fitted temperature is for those about ECE."""
        valid = {penalty: self.valid_bleu("--lenpen", str(penalty)) for penalty in LENGTH_PENALTIES}
        files.write_json(file, {"lenpen": max(valid, key=lambda penalty: valid[penalty]), "bleu": valid})

    def training(self) -> dict[str, Any]:
        """Return values about the training, from the run's log and its last checkpoint."""
        # Of equal ones the last, which is fairseq's checkpoint_best.pt.
        lowest = min(reversed(self.curve), key=lambda point: point.get("valid_nll", math.inf), default={})
        latest = self.curve[-1] if self.curve else {}
        shares = [point["teacher_share"] for point in self.curve if "teacher_share" in point]
        last = self.run / CHECKPOINTS["last"]
        seconds = checkpoints.read(last if last.exists() else self.path, model=False).seconds
        return {
            "valid_nll_best": lowest.get("valid_nll"),
            "valid_nll_last": latest.get("valid_nll"),
            "best_updates": lowest.get("updates"),
            "last_updates": latest.get("updates"),
            "teacher_share": shares[-1] if shares else None,  # None: not logged, as by fairseq's cross_entropy
            "minutes": None if seconds is None else seconds / 60,
            "curve": self.curve,
        }
