"""Language tokens, which multilingual tasks of fairseq put at the beginning or the end of targets."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.multilingual.multilingual_utils import get_lang_tok


def of_multilingual(task: Any) -> list[int]:
    """Return the ids, ascending, of the language tokens that fairseq's multilingual task puts before targets."""
    dictionary, style = task.target_dictionary, task.args.lang_tok_style
    symbols = [get_lang_tok(language, style, spec) for spec in task.args.langtoks_specs for language in task.langs]
    return known(dictionary, symbols)


def of_pretrained_bart(task: Any) -> list[int]:
    """Return the ids, ascending, of the language tokens that fairseq's task for mBART puts after targets."""
    return known(task.target_dictionary, [f"[{language}]" for language in task.langs])


def known(dictionary: Dictionary, symbols: Sequence[str]) -> list[int]:
    return sorted({dictionary.index(symbol) for symbol in symbols} - {dictionary.unk()})


def set_aside(dataset: Any, tokens: Sequence[int], pad: int) -> None:
    """Wrap the collater of a data set such that batches have language tokens apart from their targets.

    See :func:`apart`. Without `tokens` the data set is not changed.
    """
    if tokens:
        dataset.collater = functools.partial(apart, dataset.collater, tokens, pad)


def apart(collater: Callable[..., dict], tokens: Sequence[int], pad: int, samples: list, **options) -> dict:
    """Collate a batch and replace language tokens by padding in its target (B, T).

    Gates and scores should not count tokens that every target has. "language_tokens" (B, T) has the language tokens,
    and padding elsewhere; it is absent if the batch has none. "ntokens" does not count them. The input of the decoder
    is not changed.
    """
    batch = collater(samples, **options)
    if batch.get("target") is not None:
        is_token = torch.isin(batch["target"], torch.tensor(tokens))
        if is_token.any():
            batch["language_tokens"] = batch["target"].masked_fill(~is_token, pad)
        batch["target"] = batch["target"].masked_fill(is_token, pad)
        batch["ntokens"] -= int(is_token.sum())
    return batch
