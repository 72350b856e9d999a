"""Teacher-forced scores of a fairseq translation model or ensemble: how probable it finds the references, and how well
its confidence in its top-1 prediction matches how often that prediction is right."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from fairseq import utils
from fairseq.logging import progress_bar
from torch import Tensor

from hgkd_fairseq.calibration.distribution import brier, distribution_tables
from hgkd_fairseq.calibration.pieces import gold as gold_piece
from hgkd_fairseq.calibration.scores import Mean, Predictions, Results, Settings
from hgkd_fairseq.data import language_tokens, pairs
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import languages
from hgkd_fairseq.evaluation.token_table import TokenTable, opened
from hgkd_fairseq.loss.eager import mean_logprobs
from hgkd_fairseq.loss.options import Head
from hgkd_fairseq.plugin import binarised, checkpoints, features
from hgkd_fairseq.plugin.checkpoints import split_paths
from hgkd_fairseq.teacher import inputs

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 1024  # rows of the vocabulary's width that are alive at a time
MEANS = (Mean("nll", "NLL", "bits"), Mean("brier", "Brier"))


class TargetTokens(NamedTuple):
    """The N non-pad target tokens of a batch, sentence by sentence."""

    heads: list[Head]  # hidden (N, D), one a model
    target: Tensor  # (N,)
    sentence: Tensor  # (N,) the sentence's place in the subset


class TokenScores(NamedTuple):
    """Of the N non-pad target tokens of a batch."""

    nll: Tensor  # (N,) nats, -log p(gold)
    confidence: Tensor  # (N,) probability of the top-1 token
    correct: Tensor  # (N,) bool, the top-1 token is the gold one
    is_eos: Tensor  # (N,) bool
    brier: Tensor  # (N,) of the whole distribution
    top: Tensor  # (N,) the top-1 token
    tables: Tensor  # (2, 2, 3, bins) of the whole distributions: of tokens that are not EOS, and that are


def evaluate(
    data: str,
    path: str,
    subset: str = "test",
    max_tokens: int = 4000,
    cpu: bool = False,
    settings: Settings | None = None,
    temperature: float = 1.0,
    tokens_file: str | None = None,
    pair: str | None = None,
) -> Results:
    """Score a subset of binarised data under a checkpoint, or several with ':' between them (an ensemble).

    Args:
        data: folder of fairseq-preprocess; its dictionaries must be those of the models.
        path: fairseq translation checkpoint(s).
        subset: "test", "valid", ...
        max_tokens: tokens a batch.
        cpu: stay on the CPU where there is a GPU.
        settings: bins, intervals.
        temperature: divides the logits, of each model of an ensemble.
        tokens_file: where to write a row for each token.
        pair: of a model of several language pairs, as "de-en"; None: all of them together.

    Raises:
        UserError: a file that is missing or cannot be used, a subset that is missing or empty, a model that
            predicts NaN.
    """
    with opened(tokens_file) as table:
        models, task, device = load(data, path, cpu, pair, several=True)
        found = measure(models, task, device, subset, max_tokens, settings or Settings(), temperature, table)
    found.about["path"] = path
    return found


def measure(
    models: Sequence,
    task,
    device: torch.device,
    subset: str,
    max_tokens: int,
    settings: Settings,
    temperature: float,
    table: TokenTable | None = None,
) -> Results:
    """As :func:`evaluate`, of loaded models."""
    dictionary = task.target_dictionary
    parts = {"mode": "forced", "eos": "yes", "tok": "bpe"}
    if temperature != 1:
        parts["temp"] = f"{temperature:.4g}"
    whole = Predictions(settings, "", parts, MEANS)
    without_eos = Predictions(settings, "_without_eos", {**parts, "eos": "no"}, MEANS)
    tokens, sentences = 0, set()
    for batch in token_batches(models, batches(task, models, subset, max_tokens), dictionary, device):
        scores = score_rows(batch.heads, batch.target, dictionary.eos(), temperature, settings.bins)
        if not bool(scores.nll.isfinite().all()):
            raise UserError(
                f"the model gives probabilities that are NaN or 0 to references of subset {subset}; its training has "
                "diverged: name an earlier checkpoint"
            )
        # fp32 sums of probabilities may pass 1 by a rounding.
        confidence, nll = scores.confidence.double().clamp(max=1), scores.nll.double() / math.log(2)
        for predictions, rows in ((whole, slice(None)), (without_eos, ~scores.is_eos)):
            predictions.update(
                batch.sentence[rows], confidence[rows], scores.correct[rows], nll=nll[rows], brier=scores.brier[rows]
            )
        whole.add_distributions(scores.tables.sum(0))
        without_eos.add_distributions(scores.tables[0])
        tokens += scores.nll.numel()
        sentences.update(batch.sentence.tolist())
        if table is not None:
            table.write(token_rows(batch, scores, dictionary))
    return Results(
        about={
            "mode": "forced",
            "path": "",
            "data": task.cfg.data,
            "subset": subset,
            "temperature": temperature,
            "tokens": tokens,
            "sentences": len(sentences),
            "parameters": sum(parameter.numel() for model in models for parameter in model.parameters()),
        },
        settings=settings,
        scores=[*whole.scores(), *without_eos.scores()],
        histograms={"eos:yes": whole.bars(), "eos:no": without_eos.bars()},
        resampled_ece={"eos:yes": whole.resampled_ece(), "eos:no": without_eos.resampled_ece()},
    )


def load(data: str, path: str, cpu: bool = False, pair: str | None = None, several: bool = False):
    """(models, task, device): the checkpoints of `path` in eval mode under the plain translation task on `data`.

    Args:
        several: whether they may be of several language pairs, which are then under fairseq's own multilingual task.
        pair: one of those; None: all.

    Raises:
        UserError: they cannot be used, were trained by another task, or translate between other languages than the
            first of them.
    """
    data = binarised.first_shard(data)
    found = [checkpoints.read(file) for file in split_paths(path)]
    for checkpoint in found if not several else ():
        inputs.refuse_language_tokens(checkpoint.path, checkpoint.options("task"), languages.REFUSED)
    wanted = [pair] if pair else inputs.pairs_of(found[0].options("task"))
    for checkpoint in found[1:]:
        inputs.check_pairs(checkpoint.path, checkpoint.options("task"), wanted)
    task = languages.make_task(data, path, found[0], pair)
    for checkpoint in found:
        languages.check_dictionaries(checkpoint, task)
    models = [checkpoints.build(checkpoint, task) for checkpoint in found]
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    for model in models:
        model.to(device).eval()
    return models, task, device


def batches(task, models, subset: str, max_tokens: int):
    """The subset's batches in a fixed order, with a progress bar."""
    limits = utils.resolve_max_positions(task.max_positions(), *[model.max_positions() for model in models])
    dataset = binarised.subset(task, subset, limits)
    if isinstance(dataset, pairs.SEVERAL):
        pairs.number(dataset)
        pairs.tell_pairs(dataset, task)
    language_tokens.set_aside(dataset, languages.language_tokens(task), task.target_dictionary.pad())
    try:
        found = task.get_batch_iterator(dataset, max_tokens=max_tokens, max_positions=limits)
        itr = found.next_epoch_itr(shuffle=False)
    except AssertionError:  # fairseq's, of a sentence that fits into no batch
        raise UserError(
            f"--max-tokens {max_tokens} is less than the longest sentence of subset {subset} has; give more"
        ) from None
    return progress_bar.progress_bar(itr, log_format="none" if not os.isatty(2) else "tqdm")


@torch.no_grad()
def token_batches(models, samples, dictionary, device) -> Iterator[TargetTokens]:
    """The models' features of the target tokens, batch by batch."""
    for sample in samples:
        sample = utils.move_to_cuda(sample) if device.type == "cuda" else sample
        target = sample["target"]  # (B, T)
        rows = (target.flatten() != dictionary.pad()).nonzero().squeeze(1)
        heads = [features.head(model, sample["net_input"]) for model in models]
        heads = [head._replace(hidden=head.hidden.flatten(0, 1)[rows]) for head in heads]  # (N, D)
        sentence = sample["id"][:, None].expand_as(target).flatten()[rows]
        yield TargetTokens(heads, target.flatten()[rows], sentence)


def chunks(heads: Sequence[Head], target: Tensor) -> Iterator[tuple[list[Head], Tensor]]:
    """`CHUNK_TOKENS` rows at a time."""
    for start in range(0, target.numel(), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        yield [head._replace(hidden=head.hidden[rows]) for head in heads], target[rows]


@torch.no_grad()
def score_rows(heads: Sequence[Head], target: Tensor, eos: int, temperature: float, bins: int = 20) -> TokenScores:
    """`heads` with hidden (N, D), `target` (N,); the models' mean probability where there are several. Never a table of
    tokens x vocabulary beyond `CHUNK_TOKENS` rows."""
    parts = []
    for rows, gold in chunks(heads, target):
        logp = mean_logprobs(rows, temperature)
        nll = -logp.gather(1, gold[:, None]).squeeze(1)
        probability = logp.exp_()
        top, argmax = probability.max(dim=1)
        is_eos = gold == eos
        tables = distribution_tables(probability, gold, bins, is_eos.long(), groups=2)
        parts.append(TokenScores(nll, top, argmax == gold, is_eos, brier(probability, gold), argmax, tables))
    whole = TokenScores(*[torch.cat(column) for column in zip(*parts, strict=True)])
    return whole._replace(tables=whole.tables.unflatten(0, (-1, 2)).sum(0))


def token_rows(batch: TargetTokens, scores: TokenScores, dictionary) -> dict[str, list]:
    """Columns of the table of tokens."""
    return {
        "sentence": batch.sentence.tolist(),
        "token": [gold_piece(dictionary, index) for index in batch.target.tolist()],
        "predicted": [dictionary[index] for index in scores.top.tolist()],
        "confidence": scores.confidence.tolist(),
        "correct": scores.correct.int().tolist(),
        "nll_bits": (scores.nll.double() / math.log(2)).tolist(),
        "brier": scores.brier.tolist(),
    }
