"""Teacher-forced scores of a fairseq translation model or ensemble: how probable it finds the references, and how well
its confidence in its top-1 prediction matches how often that prediction is right."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from fairseq import checkpoint_utils, tasks, utils
from fairseq.logging import progress_bar
from omegaconf import open_dict
from torch import Tensor

import hgkd_fairseq
from hgkd_fairseq import features
from hgkd_fairseq.calibration import CalibrationHistogram
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.loss.eager import mean_logprobs

logger = logging.getLogger(__name__)

CHUNK_TOKENS = 1024  # rows of the vocabulary's width that are alive at a time


class TokenScores(NamedTuple):
    """Of the N non-pad target tokens of a batch."""

    nll: Tensor  # (N,) nats, -log p(gold)
    confidence: Tensor  # (N,) probability of the top-1 token
    correct: Tensor  # (N,) bool, the top-1 token is the gold one
    is_eos: Tensor  # (N,) bool


@dataclass(frozen=True)
class ForcedScores:
    """Scores of one model on one subset. ECE, MCE and accuracy are fractions, NLL is in bits a token."""

    ece: float
    mce: float
    ece_without_eos: float
    nll: float
    accuracy: float
    tokens: int
    parameters: int
    bins: int
    subset: str
    path: str

    def signature(self, score: str = "ECE", eos: bool = True) -> str:
        """How a number was computed, in sacreBLEU's manner."""
        return (
            f"{score}|bins:{self.bins}|mode:forced|eos:{'yes' if eos else 'no'}|tok:bpe|"
            f"version:{hgkd_fairseq.__version__}"
        )

    def to_json(self) -> dict:
        return {**asdict(self), "signature": self.signature()}


def evaluate(
    data: str, path: str, subset: str = "test", max_tokens: int = 4000, bins: int = 20, cpu: bool = False
) -> ForcedScores:
    """Score a subset of binarised data under a checkpoint, or several with ':' between them (an ensemble).

    Args:
        data: folder of fairseq-preprocess; its dictionaries must be those of the models.
        path: fairseq translation checkpoint(s).
        subset: "test", "valid", ...
        max_tokens: tokens a batch.
        bins: equal-width bins of confidence.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        UserError: a file that is missing or cannot be used, a subset that is missing or empty.
    """
    models, task = load(data, path)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    for model in models:
        model.to(device).eval()
    whole, without_eos = CalibrationHistogram(bins), CalibrationHistogram(bins)
    nll, correct, tokens = 0.0, 0, 0
    for scores in token_scores(models, batches(task, models, subset, max_tokens), task.target_dictionary, device):
        whole.update(scores.confidence, scores.correct)
        without_eos.update(scores.confidence[~scores.is_eos], scores.correct[~scores.is_eos])
        nll += float(scores.nll.double().sum())
        correct += int(scores.correct.sum())
        tokens += scores.nll.numel()
    if tokens == 0:
        raise UserError(f"subset {subset} of {data} holds no tokens; name another with --gen-subset")
    return ForcedScores(
        ece=whole.ece(),
        mce=whole.mce(),
        ece_without_eos=without_eos.ece(),
        nll=nll / tokens / math.log(2),
        accuracy=correct / tokens,
        tokens=tokens,
        parameters=sum(parameter.numel() for model in models for parameter in model.parameters()),
        bins=bins,
        subset=subset,
        path=path,
    )


def load(data: str, path: str):
    """(models, task): the checkpoints of `path` under the plain translation task on `data`."""
    if not os.path.isdir(data):
        raise UserError(f"{data} is no folder; name the one that fairseq-preprocess wrote")
    for file in utils.split_paths(path):
        if not os.path.exists(file):
            raise UserError(f"--path names {file}, which does not exist; name a fairseq checkpoint")
    files = utils.split_paths(path)
    first = checkpoint_utils.load_checkpoint_to_cpu(files[0])
    cfg = first.get("cfg")
    if cfg is None or "task" not in cfg or "model" not in first:
        raise UserError(f"{path} is no fairseq model; name a checkpoint of fairseq-train")
    with open_dict(cfg):
        cfg.task._name, cfg.task.data, cfg.task.eval_bleu = "translation", data, False
    try:
        task = tasks.setup_task(cfg.task, from_checkpoint=True)
    except Exception as error:  # fairseq's own, for an unknown language pair
        raise UserError(
            f"{data} is no data for {path}: {error}; name the folder that fairseq-preprocess wrote"
        ) from error
    try:
        models, _ = checkpoint_utils.load_model_ensemble(files, task=task, state=first if len(files) == 1 else None)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the dictionaries in {data}: {str(error).splitlines()[-1].strip()}; "
            "name the data the model was trained on"
        ) from error
    return models, task


def batches(task, models, subset: str, max_tokens: int):
    """The subset's batches in a fixed order, with a progress bar."""
    try:
        task.load_dataset(subset)
    except FileNotFoundError:
        raise UserError(f"there is no subset {subset} in {task.cfg.data}; name another with --gen-subset") from None
    itr = task.get_batch_iterator(
        task.dataset(subset),
        max_tokens=max_tokens,
        max_positions=utils.resolve_max_positions(task.max_positions(), *[model.max_positions() for model in models]),
        ignore_invalid_inputs=True,
    ).next_epoch_itr(shuffle=False)
    return progress_bar.progress_bar(itr, log_format="none" if not os.isatty(2) else "tqdm")


@torch.no_grad()
def token_scores(models, samples, dictionary, device, temperature: float = 1.0) -> Iterator[TokenScores]:
    """Scores batch by batch; the models' mean probability where there are several. Never a table of
    tokens x vocabulary beyond `CHUNK_TOKENS` rows."""
    for sample in samples:
        sample = utils.move_to_cuda(sample) if device.type == "cuda" else sample
        target = sample["target"].flatten()  # (B * T,)
        rows = (target != dictionary.pad()).nonzero().squeeze(1)
        heads = [features.head(model, sample["net_input"]) for model in models]
        heads = [head._replace(hidden=head.hidden.flatten(0, 1)[rows]) for head in heads]  # (N, D)
        yield score_rows(heads, target[rows], dictionary.eos(), temperature)


def score_rows(heads: Sequence, target: Tensor, eos: int, temperature: float) -> TokenScores:
    """`heads` with hidden (N, D), `target` (N,)."""
    parts = []
    for start in range(0, target.numel(), CHUNK_TOKENS):
        end = start + CHUNK_TOKENS
        logp = mean_logprobs([head._replace(hidden=head.hidden[start:end]) for head in heads], temperature)
        gold = target[start:end]
        top, argmax = logp.max(dim=1)
        parts.append(TokenScores(-logp.gather(1, gold[:, None]).squeeze(1), top.exp(), argmax == gold, gold == eos))
    return TokenScores(*[torch.cat(column) for column in zip(*parts, strict=True)])
