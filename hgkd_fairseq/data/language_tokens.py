"""Tokens that say the language of a target, which tasks of several languages put before it or behind it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import get_lang_tok


def of_multilingual(task: Any) -> list[int]:
    """Ids of those that fairseq's multilingual task puts before targets."""
    dictionary, style = task.target_dictionary, task.args.lang_tok_style
    symbols = [get_lang_tok(language, style, spec) for spec in task.args.langtoks_specs for language in task.langs]
    return known(dictionary, symbols)


def of_pretrained_bart(task: Any) -> list[int]:
    """Ids of those that its task for mBART puts behind targets."""
    return known(task.target_dictionary, [f"[{language}]" for language in task.langs])


def known(dictionary: Dictionary, symbols: Sequence[str]) -> list[int]:
    return sorted({dictionary.index(symbol) for symbol in symbols} - {dictionary.unk()})


def set_aside(dataset: Any, tokens: Sequence[int], pad: int) -> None:
    """Have the batches of a data set keep them apart from their targets; see :func:`apart`."""
    if tokens:
        dataset.collater = functools.partial(apart, dataset.collater, tokens, pad)


def apart(collater: Callable[..., dict], tokens: Sequence[int], pad: int, samples: list, **options) -> dict:
    """A batch in whose target (B, T) they are pads, for no gate and no score should count what stands in every target;
    "language_tokens" (B, T) has them, and pads elsewhere. The decoder is given them as before."""
    batch = collater(samples, **options)
    if batch.get("target") is not None:
        is_token = torch.isin(batch["target"], torch.tensor(tokens))
        if is_token.any():
            batch["language_tokens"] = batch["target"].masked_fill(~is_token, pad)
        batch["target"] = batch["target"].masked_fill(is_token, pad)
        batch["ntokens"] -= int(is_token.sum())
    return batch
