"""Inference calibration (Wang et al., ACL 2020, "On the Inference Calibration of Neural Machine Translation"): the
calibration of a model on its own translations, read from the output of fairseq-generate with any search."""

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
# fairseq prints differences of cumulative log-probabilities: by rounding, that of a probability of 1 may exceed 0.
ROUNDING_BITS = 0.01
WITH_PIECES = "run fairseq-generate without --remove-bpe and without --bpe, so that its lines hold pieces"


class Uneven(UserError):
    """The number of scores does not match the number of tokens."""


class Translation(NamedTuple):
    """A translation of a sentence, with the log-probabilities of its tokens."""

    sentence: int  # index in the subset
    tokens: list[str]  # without EOS
    logprobs: list[float]  # base-2 logarithms, one per token and one for EOS
    reference: list[str]  # without EOS


@dataclass(frozen=True)
class Labelling:
    """How tokens and sentences are labelled as correct or wrong.

    Attributes:
        labels: "ter": a token is correct if TER aligns it with an equal token of the reference; "wang2020": the same,
            except that the token after a deletion is wrong (see :func:`ter_labels`).
        words: score whole words instead of pieces.
        language_token: which score of a sentence is that of a language token that fairseq-generate does not print:
            "first", or "last", after that of EOS (or in its place, if the translation is cut at the maximum length);
            None: there is none.
        tokenize: sacreBLEU tokenizer, for sentence BLEU.
    """

    labels: str = "wang2020"
    words: bool = False
    language_token: str | None = None
    tokenize: str = TOKENIZERS[0]


def read(file: str, reference_file: str | None = None, language_token: str | None = None) -> list[Translation]:
    """Read the best translation of each sentence with its tokens' log-probabilities, in the order of the subset.

    Args:
        file: output of fairseq-generate, or its generate-SUBSET.txt with --results-path. The lines T- (reference), H-
            (hypothesis) and P- (log-probabilities of the tokens, base 2 with 4 decimals) are read. T- and H- must be in
            the model's pieces, which they are not with --remove-bpe, nor T- with --bpe.
        reference_file: text file of references in pieces, one per line, in the order of the subset; None: the T- lines.
        language_token: position of a score to leave out; see :class:`Labelling`.

    Raises:
        UserError: the file is missing, holds no translations or scores, or its lines do not match each other.
        Uneven: the number of scores of a sentence does not match the number of its tokens.
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
    """Score the translations in an output of fairseq-generate: :func:`read`, then :func:`score`.

    Args:
        file: output of fairseq-generate; see :func:`read`.
        reference_file: see :func:`read`.
        options: labelling of tokens and sentences; None: the defaults.
        settings: bins and bootstrap intervals; None: the defaults.
        tokens_file: file to write a row per token to, .tsv or .parquet; None: no such file.
        segment_scores: files of sentence scores by other metrics, one for each metric.

    Raises:
        UserError: see :func:`read`, :func:`score` and :func:`segments.read`.
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
    """Compute calibration and correlation scores of N translations.

    The confidence of a token is its probability, and that of a word is the product of its pieces' probabilities; which
    of them are correct is determined by :func:`ter_labels`. For sentences there is an ECE for each combination of two
    confidences, the probability of the whole translation (`conf:product`) and the geometric mean per token
    (`conf:geomean`), and three degrees of correctness: equality with the reference (`right:exact`), and sacreBLEU's
    sentence BLEU and chrF, divided by 100. Spearman's rank correlation measures whether the translations with a high
    log-probability, as a sum or as a mean per token, are those of high quality by BLEU, chrF and other metrics.

    Args:
        translations: translations, in the order of the subset.
        name: origin of the translations, for the results and error messages.
        options: labelling of tokens and sentences; None: the defaults.
        settings: bins and bootstrap intervals; None: the defaults.
        table: open table to write a row per token to; None: no such table.
        quality: sentence scores (N,) by other metrics, by metric name.

    Raises:
        UserError: the translations are in pieces and the references are not; or words are to be scored and a piece
            spans several.
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
    """Yield the scores of whole sentences: ECE of two confidences with three degrees of correctness, and rank
    correlations of the log-probability, as a sum or as a mean per token, with quality."""
    index = torch.tensor([row.sentence for row in translations])
    bits = torch.tensor([sum(row.logprobs) for row in translations], dtype=torch.float64)
    lengths = torch.tensor([len(row.logprobs) for row in translations])
    confidences = {"product": bits.exp2(), "geomean": (bits / lengths).exp2()}
    texts = [(text(row.tokens, marked), text(row.reference, marked)) for row in translations]
    bleu, chrf = BLEU(effective_order=True, tokenize=tokenize), CHRF()
    named = {} if tokenize == TOKENIZERS[0] else {"bleu": {"tok": tokenize}}  # additions to signatures
    right = {
        "exact": [float(row.tokens == row.reference) for row in translations],
        "bleu": [bleu.sentence_score(ours, [theirs]).score / 100 for ours, theirs in texts],
        "chrf": [chrf.sentence_score(ours, [theirs]).score / 100 for ours, theirs in texts],
    }
    for conf, confidence in confidences.items():
        for name, correct in right.items():
            parts = {"mode": "inference", "unit": "sentence", "conf": conf, "right": name, **named.get(name, {})}
            sentences = Predictions(settings, f"_sentence_{conf}_{name}", parts)
            # sacreBLEU's score of a perfect match may exceed 100 by rounding.
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
