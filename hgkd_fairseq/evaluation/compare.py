"""Comparison of translation models: fairseq checkpoints and CTranslate2 folders translate the same subset in the same
batches with the same search, and are compared by quality, calibration of their own scores, size and speed."""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from fairseq import utils
from fairseq.dataclass.configs import GenerationConfig
from sacrebleu.metrics import BLEU

from hgkd_fairseq.arguments import TOKENIZERS
from hgkd_fairseq.calibration.scores import Score, Settings
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import forced, generated, inference, segments
from hgkd_fairseq.evaluation.inference import Translation


@dataclass(frozen=True)
class Search:
    """Options of the beam search, with fairseq-generate's names and defaults.

    Raises:
        UserError: the maximum length allows no translation.
    """

    beam: int = 5
    lenpen: float = 1.0
    max_len_a: float = 0.0
    max_len_b: int = 200

    def __post_init__(self):
        if self.max_len_a + self.max_len_b < 1:
            given = f"--max-len-a {self.max_len_a:g} and --max-len-b {self.max_len_b}"
            raise UserError(f"{given} leave no room for a translation; raise one")


class Sources(NamedTuple):
    """A batch of S sentences of the subset."""

    sample: dict  # the batch in fairseq's format
    sources: list[list[str]]  # S lists of subword pieces, without EOS
    references: list[list[str]]  # likewise
    limit: int  # maximum number of pieces of a translation, without EOS


class Hypothesis(NamedTuple):
    tokens: list[str]
    logprobs: list[float] | None  # natural logarithms, one per token and one for EOS; None: not computed yet


class Model(Protocol):
    """Interface of the models that :func:`compare` measures."""

    megabytes: float

    def translate(self, batch: Sources) -> list[Hypothesis]:
        """Return the best translation of each sentence; only this method is timed."""

    def scored(self, batch: Sources, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        """Return the hypotheses with the log-probabilities of their tokens under this model."""


class FairseqModel:
    """A fairseq checkpoint or ensemble, run as fairseq-generate runs it."""

    def __init__(self, path: str, data: str, search: Search, cpu: bool):
        self.models, self.task, self.device = forced.load(data, path, cpu)
        self.megabytes = sum(os.path.getsize(file) for file in utils.split_paths(path)) / 1e6
        for model in self.models:  # as in fairseq-generate: attention weights are not returned
            model.make_generation_fast_(beamable_mm_beam_size=search.beam, need_attn=False)
        cfg = GenerationConfig(
            beam=search.beam, lenpen=search.lenpen, max_len_a=search.max_len_a, max_len_b=search.max_len_b
        )
        self.generator = self.task.build_generator(self.models, cfg)

    def translate(self, batch: Sources) -> list[Hypothesis]:
        sample = utils.move_to_cuda(batch.sample) if self.device.type == "cuda" else batch.sample
        dictionary = self.task.target_dictionary
        found = []
        for best, *_ in self.task.inference_step(self.generator, self.models, sample):
            tokens = [dictionary[index] for index in best["tokens"].tolist()[:-1]]
            found.append(Hypothesis(tokens, best["positional_scores"].tolist()))
        return found

    def scored(self, batch: Sources, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        return hypotheses  # fairseq's search has already computed them


class CTranslate2Model:
    """A CTranslate2 model, in a folder that one of its converters wrote.

    Raises:
        UserError: CTranslate2 is not installed, or the folder holds none of its models.
    """

    def __init__(self, path: str, search: Search, cpu: bool):
        try:
            import ctranslate2
        except ImportError:
            raise UserError(f"{path} needs CTranslate2: pip install 'hgkd-fairseq[export]'") from None
        self.search = search
        self.megabytes = sum(file.stat().st_size for file in Path(path).iterdir()) / 1e6
        device = "cuda" if torch.cuda.is_available() and not cpu else "cpu"
        try:
            self.translator = ctranslate2.Translator(path, device=device, intra_threads=torch.get_num_threads())
        except RuntimeError as error:
            raise UserError(f"{path} is no model of CTranslate2 ({error}); name a folder that it wrote") from error

    def translate(self, batch: Sources) -> list[Hypothesis]:
        found = self.translator.translate_batch(
            batch.sources,
            beam_size=self.search.beam,
            length_penalty=self.search.lenpen,
            max_decoding_length=batch.limit,
            max_input_length=0,
        )
        return [Hypothesis(result.hypotheses[0], None) for result in found]

    def scored(self, batch: Sources, hypotheses: list[Hypothesis]) -> list[Hypothesis]:
        found = self.translator.score_batch(batch.sources, [one.tokens for one in hypotheses], max_input_length=0)
        return [Hypothesis(one.tokens, result.log_probs) for one, result in zip(hypotheses, found, strict=True)]


@dataclass(frozen=True)
class Row:
    """The measurements of one model."""

    name: str
    bleu: float
    ece: Score  # inference ECE, on the model's own translations and scores
    megabytes: float  # size of the model's files
    speed: float  # sentences per second, from the median time of a pass
    same: int  # number of translations equal to the first model's
    quality: dict[str, segments.Tested] = field(default_factory=dict)  # scores by other metrics, by metric name


@dataclass(frozen=True)
class Comparison:
    """The measurements of several models, one row per model, and a description of how they were made."""

    rows: list[Row]
    sentences: int
    about: str

    def __str__(self) -> str:
        """Return a Markdown table, followed by the description."""
        first = self.rows[0]
        columns = ["BLEU", *first.quality, "ECE, %", "MB", "sentences/s", "speed-up", "same as the first"]
        lines = [f"| model | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
        for row in self.rows:
            ece = f"{100 * row.ece.value:.2f} [{100 * row.ece.low:.2f}, {100 * row.ece.high:.2f}]"  # type: ignore
            lines.append(
                f"| {row.name} | {row.bleu:.2f} |{''.join(map(quality_cell, row.quality.values()))} {ece} | "
                f"{row.megabytes:.2f} | {row.speed:.1f} "
                f"| {row.speed / first.speed:.2f} | {row.same:,} of {self.sentences:,} |"
            )
        return "\n".join([*lines, "", self.about])


def compare(
    data: str,
    paths: Sequence[str],
    subset: str = "test",
    search: Search | None = None,
    max_tokens: int = 4000,
    repeats: int = 5,
    cpu: bool = False,
    reference_file: str | None = None,
    segment_scores: Sequence[segments.Named] = (),
    tokenize: str = TOKENIZERS[0],
) -> Comparison:
    """Translate a subset with each model, and measure quality, calibration, size and speed.

    The models take turns, batch by batch, in one process with the same number of threads. The first pass is a warm-up
    and gives the translations; `repeats` further passes are timed. Loading a model is not timed, nor is the computation
    of log-probabilities that only the scores need.

    Args:
        data: folder that fairseq-preprocess wrote.
        paths: fairseq checkpoints (joined by ':' for an ensemble) and CTranslate2 folders, all with the same
            dictionaries; at least one is a fairseq checkpoint.
        subset: name of the subset to translate.
        search: options of the beam search; None: the defaults.
        max_tokens: maximum number of tokens in a batch, counted with padding on the longer side.
        repeats: number of timed passes, at least 1.
        cpu: use the CPU even if a GPU is available.
        reference_file: text file with one reference per line, for BLEU; None: the subset's references, with their
            pieces joined.
        segment_scores: files of sentence scores by other metrics; of each metric one for each of `paths`, in their
            order.
        tokenize: sacreBLEU tokenizer, for BLEU.

    Returns:
        The measurements, one row for each of `paths`.

    Raises:
        UserError: a model cannot be loaded, no fairseq checkpoint is among them, the subset is missing, or references
            or scores do not match it. All of this is checked before anything is translated.
    """
    search = search or Search()
    named = segments.by_metric(segment_scores, paths)
    if all(os.path.isdir(path) for path in paths):
        raise UserError(
            "name at least one fairseq checkpoint beside the CTranslate2 folders: it knows the dictionaries"
        )
    references = generated.read_references(reference_file) if reference_file else None
    models: list[Model] = [
        CTranslate2Model(path, search, cpu) if os.path.isdir(path) else FairseqModel(path, data, search, cpu)
        for path in paths
    ]
    ours = next(model for model in models if isinstance(model, FairseqModel))
    samples = [
        make_batch(ours, sample, search) for sample in forced.batches(ours.task, ours.models, subset, max_tokens)
    ]
    sentences = sum(len(batch.sources) for batch in samples)
    if references is not None and len(references) != sentences:
        raise UserError(
            f"{reference_file} has {len(references)} lines and subset {subset} {sentences} sentences; name the "
            "references of this subset"
        )
    subset_name = f"subset {subset}"
    quality = {
        metric: segments.paired_bootstrap([segments.read(file, sentences, subset_name) for file in each])
        for metric, each in named.items()
    }
    found, seconds = translate_all(models, samples, repeats)

    if references is None:
        references = generated.joined([row.reference for row in found[0]])
    bleu = BLEU(tokenize=tokenize, force=True)  # force: no warning about texts that are already tokenised
    rows = []
    for place, (path, model) in enumerate(zip(paths, models, strict=True)):
        translations, times = found[place], seconds[place]
        texts = generated.joined([row.tokens for row in translations])
        rows.append(
            Row(
                name=path,
                bleu=bleu.corpus_score(texts, [references]).score,
                ece=inference.score(translations, path, settings=Settings())["ece"],
                megabytes=model.megabytes,
                speed=sentences / statistics.median(times),
                same=sum(one.tokens == other.tokens for one, other in zip(translations, found[0], strict=True)),
                quality={metric: each[place] for metric, each in quality.items()},
            )
        )
    about = (
        f"BLEU `{bleu.get_signature()}`; ECE `{rows[0].ece.signature}`; speed: median of {repeats} passes over "
        f"{sentences:,} sentences in batches of up to {max_tokens:,} pieces, beam {search.beam}, "
        f"threads: {torch.get_num_threads()}, {ours.device.type}."
    )
    if quality:
        about += f" {', '.join(quality)} `{segments.signature()}`, p of the difference from the first model."
        about += f" {segments.ONE_TAIL}."
    return Comparison(rows, sentences, about)


def quality_cell(found: segments.Tested) -> str:
    p = "" if found.p is None else f", p = {found.p:.3f}"
    return f" {found.mean:.4f} ± {found.interval:.4f}{p} |"


def make_batch(model: FairseqModel, sample: dict, search: Search) -> Sources:
    dictionary = model.task.source_dictionary
    source = [
        [dictionary[index] for index in row if index not in (dictionary.pad(), dictionary.eos())]
        for row in sample["net_input"]["src_tokens"].tolist()
    ]
    target = [generated.reference(model.task.target_dictionary, row) for row in sample["target"].tolist()]
    length = sample["net_input"]["src_tokens"].size(1)
    # fairseq-generate's limit, which depends on the padded source length of the batch
    limit = min(int(search.max_len_a * length + search.max_len_b), model.generator.max_len - 1)
    return Sources(sample, source, target, limit)


@torch.no_grad()
def translate_all(
    models: Sequence[Model], batches: Sequence[Sources], repeats: int
) -> tuple[list[list[Translation]], list[list[float]]]:
    """Run the warm-up pass and the timed passes.

    Returns:
        For each model its translations, in the order of the subset, and the seconds of each timed pass.
    """
    found: list[list[Translation]] = [[] for _ in models]
    seconds = [[0.0] * repeats for _ in models]
    for turn in range(repeats + 1):
        for batch in batches:
            for place, model in enumerate(models):
                start = time.perf_counter()
                hypotheses = model.translate(batch)
                if turn:
                    seconds[place][turn - 1] += time.perf_counter() - start
                    continue
                scored = model.scored(batch, hypotheses)
                for index, one, reference in zip(batch.sample["id"].tolist(), scored, batch.references, strict=True):
                    bits = [min(logprob / math.log(2), 0.0) for logprob in one.logprobs or ()]
                    found[place].append(Translation(index, one.tokens, bits, reference))
    return [sorted(rows, key=lambda row: row.sentence) for rows in found], seconds
