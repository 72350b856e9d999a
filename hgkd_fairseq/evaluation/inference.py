"""Inference calibration (Wang et al. 2020, ACL, "On the Inference Calibration of NMT"): of a model's own translations,
as fairseq-generate writes them, whatever search made them."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from sacrebleu.metrics import BLEU, CHRF
from tqdm import tqdm

from hgkd_fairseq.arguments import TOKENIZERS
from hgkd_fairseq.calibration.correlation import spearman, spearman_interval
from hgkd_fairseq.calibration.labels import ter_labels
from hgkd_fairseq.calibration.pieces import join, mark, spans_words, text, words
from hgkd_fairseq.calibration.scores import Predictions, Results, Score, Settings, signature
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import segments
from hgkd_fairseq.evaluation.generated import read_lines, read_references, split
from hgkd_fairseq.evaluation.token_table import TokenTable, opened

EOS = "</s>"
# fairseq writes differences of summed logarithms: a probability of 1 may come out above it by a rounding.
ROUNDING_BITS = 0.01
WITH_PIECES = "run fairseq-generate without --remove-bpe and without --bpe, so that its lines hold pieces"


class Uneven(UserError):
    """More or fewer scores than the tokens need."""


class Translation(NamedTuple):
    """A sentence that fairseq-generate translated."""

    sentence: int  # its place in the subset
    tokens: list[str]
    logprobs: list[float]  # log2, one a token and one for the end of sentence
    reference: list[str]


@dataclass(frozen=True)
class Labelling:
    """How tokens and sentences are labelled.

    Attributes:
        labels: "wang2020" or "ter".
        words: whether whole words are scored instead of pieces.
        language_token: whether the "first" score of each sentence is that of a language token, which is not printed,
            or the "last" one, after that of the end of sentence (or in its place, where the limit of the length cuts a
            translation); None: there is none.
        tokenize: by sacreBLEU, for the BLEU of sentences.
    """

    labels: str = "wang2020"
    words: bool = False
    language_token: str | None = None
    tokenize: str = TOKENIZERS[0]


def read(file: str, reference_file: str | None = None, language_token: str | None = None) -> list[Translation]:
    """The best translation of each sentence with its tokens' log-probabilities, in the order of the subset.

    Args:
        file: what fairseq-generate printed, or its generate-SUBSET.txt of --results-path. Its lines T- (reference), H-
            (hypothesis) and P- (scores of the tokens, log2 with 4 decimals) are read. With --remove-bpe none of them
            holds pieces, with --bpe only H- does: then there are more scores than tokens, or T- does not fit.
        reference_file: references in pieces, one a line, in the order of the subset, instead of the T- lines.
        language_token: see :class:`Labelling`; its score is left out.

    Raises:
        UserError: a file that is missing, holds no translations or scores, or whose lines do not fit together.
    """
    lines = read_lines(file)
    references = dict(enumerate(read_references(reference_file))) if reference_file else lines["T"]
    if reference_file and len(references) != len(lines["H"]):
        raise UserError(f"{reference_file} has {len(references)} lines for {len(lines['H'])} translations in {file}")
    found = [translation(file, lines, references, index, language_token) for index in sorted(lines["H"])]
    if language_token == "last" and all(len(lines["P"][one.sentence].split()) == len(one.logprobs) for one in found):
        raise Uneven(f"{file} holds no scores of language tokens; drop --language-token")
    return found


def translation(
    file: str, lines: dict[str, dict[int, str]], references: dict[int, str], index: int, language_token: str | None
) -> Translation:
    for letter, found in (("P", lines["P"]), ("T", references)):
        if index not in found:
            raise UserError(f"{file} has no line {letter}-{index} for its H-{index}; run fairseq-generate again")
    tokens = split(lines["H"][index])
    reference = split(references[index])
    try:
        logprobs = [float(number) for number in lines["P"][index].split()]
    except ValueError:
        raise UserError(f"{file}: P-{index} holds something that is no number; run fairseq-generate again") from None
    if not all(number <= ROUNDING_BITS for number in logprobs):  # NaN too
        raise UserError(
            f"{file}: P-{index} holds a score that is NaN or above 0, which is no log-probability; where it is NaN the "
            "model's training has diverged: translate with an earlier checkpoint"
        )
    if language_token == "first" and len(logprobs) == len(tokens) + 1:
        raise UserError(f"{file}: P-{index} holds no score of a language token; drop --language-token")
    if language_token == "first":
        del logprobs[:1]
    elif language_token == "last" and len(logprobs) == len(tokens) + 2:
        del logprobs[-1]
    if len(logprobs) != len(tokens) + 1:
        raise Uneven(
            f"{file}: H-{index} has {len(tokens)} tokens and an end of sentence, P-{index} {len(logprobs)} scores; "
            f"{WITH_PIECES}. If they do, one score is of a language token, which is not printed: --language-token; "
            "or the hypothesis goes on after an end of sentence: run it without --diverse-beam-groups"
        )
    return Translation(index, tokens, [min(number, 0.0) for number in logprobs], reference)


def evaluate(
    file: str,
    reference_file: str | None = None,
    options: Labelling | None = None,
    settings: Settings | None = None,
    tokens_file: str | None = None,
    segment_scores: Sequence[segments.Named] = (),
) -> Results:
    """:func:`score` of the translations of :func:`read`, with scores of their sentences by other metrics in files.

    Raises:
        UserError: as of these two, and of :func:`segments.read`.
    """
    named = segments.by_metric(segment_scores, [file])
    with opened(tokens_file) as table:
        rows = read(file, reference_file, options.language_token if options else None)
        quality = {metric: segments.read(one, len(rows), file) for metric, (one,) in named.items()}
        return score(rows, file, options, settings, table, quality)


def score(
    translations: Sequence[Translation],
    name: str,
    options: Labelling | None = None,
    settings: Settings | None = None,
    table: TokenTable | None = None,
    quality: Mapping[str, np.ndarray] | None = None,
) -> Results:
    """Score translations, which `name` says the origin of.

    A token's confidence is its probability; it is right as :func:`ter_labels` says. A word's is the product of its
    pieces'. Sentences are scored too, by ECE: confidence is the probability of the whole (`conf:product`) or its mean
    per token (`conf:geomean`), and right is whether it is the reference (`right:exact`), or how close it comes
    (sacreBLEU's sentence BLEU and chrF over 100). Spearman's correlation says whether the translations that the model
    finds probable, as a whole or per token, are the good ones: by these two, and by `quality`, other metrics' scores of
    the sentences by the metrics' names.

    Raises:
        UserError: the references are not in pieces where the translations are.
    """
    options, settings = options or Labelling(), settings or Settings()
    marked = mark(row.tokens for row in translations)
    if marked and not mark(row.reference for row in translations):
        raise UserError(
            f"{name}: the translations are in pieces ({marked}) and the references are not; {WITH_PIECES}, "
            "or give --reference FILE in pieces"
        )
    if options.words and marked:
        for token in itertools.chain.from_iterable(row.tokens for row in translations):
            if spans_words(token):
                raise UserError(
                    f"{name}: the piece {token} spans words, which have no probability of their own; leave --words out"
                )
    parts = {
        "mode": "inference", "align": options.labels, "eos": "yes", "tok": "word" if options.words else "bpe"
    }  # fmt: skip
    whole = Predictions(settings, "", parts)
    without_eos = Predictions(settings, "_without_eos", {**parts, "eos": "no"})
    tokens = 0
    for row in tqdm(translations, desc="aligning", leave=False, disable=not sys.stderr.isatty()):
        units, reference, bits = row.tokens, row.reference, row.logprobs
        if options.words:
            groups = words(units, marked)
            bits = [sum(bits[index] for index in group) for group in groups] + bits[-1:]
            units, reference = join(units, marked), join(reference, marked)
        labels = torch.tensor(ter_labels(units, reference, deletion_rule=options.labels == "wang2020"))
        confidence = torch.tensor(bits, dtype=torch.float64).exp2()
        sentence = torch.full_like(labels, row.sentence, dtype=torch.long)
        whole.update(sentence, confidence, labels)
        without_eos.update(sentence[:-1], confidence[:-1], labels[:-1])
        tokens += len(labels)
        if table is not None:
            columns = {"token": [*units, EOS], "confidence": confidence.tolist(), "correct": labels.int().tolist()}
            table.write({"sentence": sentence.tolist(), **columns})
    return Results(
        about={"mode": "inference", "path": name, "tokens": tokens, "sentences": len(translations)},
        settings=settings,
        scores=[
            *whole.scores(),
            *without_eos.scores(),
            *sentence_scores(translations, marked, settings, quality or {}, options.tokenize),
        ],
        histograms={"eos:yes": whole.bars(), "eos:no": without_eos.bars()},
        resampled_ece={"eos:yes": whole.resampled_ece(), "eos:no": without_eos.resampled_ece()},
    )


def sentence_scores(
    translations: Sequence[Translation],
    marked: str,
    settings: Settings,
    quality: Mapping[str, np.ndarray],
    tokenize: str,
) -> Iterable[Score]:
    """ECE of whole sentences, two confidences against three ways to be right, and rank correlations of the
    log-probability, summed or its mean per token, with quality."""
    index = torch.tensor([row.sentence for row in translations])
    bits = torch.tensor([sum(row.logprobs) for row in translations], dtype=torch.float64)
    lengths = torch.tensor([len(row.logprobs) for row in translations])
    confidences = {"product": bits.exp2(), "geomean": (bits / lengths).exp2()}
    texts = [(text(row.tokens, marked), text(row.reference, marked)) for row in translations]
    bleu, chrf = BLEU(effective_order=True, tokenize=tokenize), CHRF()
    named = {} if tokenize == TOKENIZERS[0] else {"bleu": {"tok": tokenize}}  # the metrics that signatures say more of
    right = {
        "exact": [float(row.tokens == row.reference) for row in translations],
        "bleu": [bleu.sentence_score(ours, [theirs]).score / 100 for ours, theirs in texts],
        "chrf": [chrf.sentence_score(ours, [theirs]).score / 100 for ours, theirs in texts],
    }
    for conf, confidence in confidences.items():
        for name, correct in right.items():
            parts = {"mode": "inference", "unit": "sentence", "conf": conf, "right": name, **named.get(name, {})}
            sentences = Predictions(settings, f"_sentence_{conf}_{name}", parts)
            # sacreBLEU's scores of a perfect match pass 100 by a rounding.
            sentences.update(index, confidence, torch.tensor(correct, dtype=torch.float64).clamp(max=1))
            yield sentences.binned_scores()[0]
    measured = {name: right[name] for name in ("bleu", "chrf")} | dict(quality)
    for how, logprob in {"sum": bits, "mean": bits / lengths}.items():
        for name, scores in measured.items():
            pair = (logprob, torch.as_tensor(scores, dtype=torch.float64))
            low = high = None
            if settings.replicates:
                low, high = spearman_interval(*pair, index.tolist(), settings.replicates, settings.seed)
            parts = {"mode": "inference", "unit": "sentence", "logprob": how, "quality": name, **named.get(name, {})}
            how_computed = signature("Spearman", **parts)
            yield Score(f"spearman_{how}_{name}", how_computed, float(spearman(*pair)), low, high, unit="")
