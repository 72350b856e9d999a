"""Teacher-forced scores of a fairseq translation model or ensemble: the probability of the references, and the
calibration of its confidence in the top-1 prediction."""

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

CHUNK_TOKENS = 1024  # tokens whose probabilities over the vocabulary are in memory at a time
MEANS = (Mean("nll", "NLL", "bits"), Mean("brier", "Brier"))


class TargetTokens(NamedTuple):
    """The N target tokens of a batch, without padding, sentence by sentence."""

    heads: list[Head]  # one per model, with hidden states (N, D)
    target: Tensor  # (N,) gold tokens
    sentence: Tensor  # (N,) index of the token's sentence in the subset


class TokenScores(NamedTuple):
    """Scores of the N target tokens of a batch, without padding."""

    nll: Tensor  # (N,) nats, -log p(gold)
    confidence: Tensor  # (N,) probability of the top-1 token
    correct: Tensor  # (N,) bool, the top-1 token is the gold one
    is_eos: Tensor  # (N,) bool, the gold token is EOS
    brier: Tensor  # (N,) Brier score of the whole distribution
    top: Tensor  # (N,) the top-1 token
    tables: Tensor  # (2, 2, 3, bins) tables of distribution_tables(), first without EOS, then of EOS alone


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
    """Score a subset of binarised data under a checkpoint or an ensemble, with teacher forcing.

    Args:
        data: folder that fairseq-preprocess wrote; its dictionaries must be those of the models.
        path: fairseq translation checkpoint, or several joined by ':' (an ensemble, whose probabilities are averaged).
        subset: name of the subset, such as "test" or "valid".
        max_tokens: maximum number of tokens in a batch.
        cpu: use the CPU even if a GPU is available.
        settings: bins and bootstrap intervals; None: the defaults.
        temperature: divisor of the logits of each model.
        tokens_file: file to write a row per token to, .tsv or .parquet; None: no such file.
        pair: language pair to score, such as "de-en", of a model of several; None: all of them together.

    Returns:
        NLL (bits per token), Brier score and calibration scores, with and without EOS.

    Raises:
        UserError: a file is missing or cannot be used, the subset is missing or empty, or the NLL of a token is NaN or
            infinite.
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
    """Score a subset under models that :func:`load` returned; otherwise as :func:`evaluate`.

    Args:
        table: open table to write a row per token to; None: no such table.

    Raises:
        UserError: the subset is missing or empty, or the NLL of a token is NaN or infinite.
    """
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
        # In fp32, a probability may exceed 1 by rounding.
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
    """Load checkpoints in eval mode, and the task on `data` that they run under.

    Args:
        data: folder that fairseq-preprocess wrote; the first one is used if several are joined by ':'.
        path: fairseq translation checkpoint, or several joined by ':' (an ensemble).
        cpu: use the CPU even if a GPU is available.
        pair: language pair to use of models of several; None: all of them.
        several: accept models whose task adds language tokens (several language pairs, mBART), under fairseq's own
            tasks for them; otherwise all models run under the plain translation task.

    Returns:
        (models, task, device): one model per checkpoint, the task, and the device that the models are on.

    Raises:
        UserError: a checkpoint cannot be used, its task adds language tokens and `several` is False, its dictionaries
            differ from those of the data, or it was not trained on `pair` or the language pairs of the first one.
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
    """Return an iterator over the subset's batches in a fixed order, with a progress bar on a terminal.

    Raises:
        UserError: the subset is missing or empty, or has sentences longer than the models accept or `max_tokens`.
    """
    limits = utils.resolve_max_positions(task.max_positions(), *[model.max_positions() for model in models])
    dataset = binarised.subset(task, subset, limits)
    if isinstance(dataset, pairs.SEVERAL):
        pairs.number(dataset)
        pairs.tell_pairs(dataset, task)
    language_tokens.set_aside(dataset, languages.language_tokens(task), task.target_dictionary.pad())
    try:
        found = task.get_batch_iterator(dataset, max_tokens=max_tokens, max_positions=limits)
        itr = found.next_epoch_itr(shuffle=False)
    except AssertionError:  # raised by fairseq if a sentence is longer than max_tokens
        raise UserError(
            f"--max-tokens {max_tokens} is less than the longest sentence of subset {subset} has; give more"
        ) from None
    return progress_bar.progress_bar(itr, log_format="none" if not os.isatty(2) else "tqdm")


@torch.no_grad()
def token_batches(models, samples, dictionary, device) -> Iterator[TargetTokens]:
    """Run the models on fairseq batches, and yield the hidden states of the target tokens of each batch."""
    for sample in samples:
        sample = utils.move_to_cuda(sample) if device.type == "cuda" else sample
        target = sample["target"]  # (B, T)
        rows = (target.flatten() != dictionary.pad()).nonzero().squeeze(1)
        heads = [features.head(model, sample["net_input"]) for model in models]
        heads = [head._replace(hidden=head.hidden.flatten(0, 1)[rows]) for head in heads]  # (N, D)
        sentence = sample["id"][:, None].expand_as(target).flatten()[rows]
        yield TargetTokens(heads, target.flatten()[rows], sentence)


def chunks(heads: Sequence[Head], target: Tensor) -> Iterator[tuple[list[Head], Tensor]]:
    """Yield the hidden states (n, D) and the targets (n,) of at most :data:`CHUNK_TOKENS` tokens at a time."""
    for start in range(0, target.numel(), CHUNK_TOKENS):
        rows = slice(start, start + CHUNK_TOKENS)
        yield [head._replace(hidden=head.hidden[rows]) for head in heads], target[rows]


@torch.no_grad()
def score_rows(heads: Sequence[Head], target: Tensor, eos: int, temperature: float, bins: int = 20) -> TokenScores:
    """Compute the scores of N target tokens, under the mean probability of the models.

    Probabilities over the vocabulary are computed for :data:`CHUNK_TOKENS` tokens at a time, so that a model with a
    linear output layer never needs a (tokens, vocabulary) matrix of the whole batch.

    Args:
        heads: one per model, with hidden states (N, D).
        target: (N,) gold tokens.
        eos: index of EOS.
        temperature: divisor of the logits.
        bins: bins of the calibration tables.
    """
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
    """Return the columns of the token table by name, with a value per token."""
    return {
        "sentence": batch.sentence.tolist(),
        "token": [gold_piece(dictionary, index) for index in batch.target.tolist()],
        "predicted": [dictionary[index] for index in scores.top.tolist()],
        "confidence": scores.confidence.tolist(),
        "correct": scores.correct.int().tolist(),
        "nll_bits": (scores.nll.double() / math.log(2)).tolist(),
        "brier": scores.brier.tolist(),
    }
