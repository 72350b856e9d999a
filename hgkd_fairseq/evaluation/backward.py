"""Scores of translations by a model of the opposite direction: how probable the source is given its translation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from fairseq import utils
from fairseq.data import LanguagePairDataset

from hgkd_fairseq.data.batches import filled
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import forced
from hgkd_fairseq.loss.eager import mean_logprobs

BLOCK = 4096  # sentences that are sorted by length and batched at a time
# Score of the pairs that are longer than the model accepts; finite, as Filters.worst requires.
WORST = float(np.finfo(np.float64).min)


class BackwardModel:
    """A translation model of the opposite direction, from target to source, that scores translations.

    Args:
        path: fairseq checkpoint, or several joined by ':' (an ensemble).
        task: task of the model that translated; the backward model must have its languages and dictionaries, swapped.
        max_tokens: maximum number of tokens in a batch, counted with padding on the longer side.
        cpu: use the CPU even if a GPU is available.

    Raises:
        UserError: the checkpoint cannot be used, or has other languages or dictionaries.
    """

    def __init__(self, path: str, task, max_tokens: int, cpu: bool):
        self.models, self.task, self.device = forced.load(task.cfg.data, path, cpu)
        found = self.task.source_dictionary, self.task.target_dictionary
        names = self.task.cfg.source_lang, self.task.cfg.target_lang
        if found != (task.target_dictionary, task.source_dictionary) or names != (
            task.cfg.target_lang, task.cfg.source_lang
        ):  # fmt: skip
            wanted = f"{task.cfg.target_lang} to {task.cfg.source_lang}"
            raise UserError(f"--backward-path {path} does not translate from {wanted}; name a model that does")
        self.max_tokens = max_tokens
        self.limits = utils.resolve_max_positions(
            self.task.max_positions(), *[model.max_positions() for model in self.models]
        )

    def scores(self, translations: Iterable[tuple[int, int, torch.Tensor]], sources) -> Iterator[tuple[int, float]]:
        """Yield the number of each sentence and the mean log-probability of its source given the translation.

        The mean is over the tokens of the source, in nats per token. Pairs that are longer than the model accepts have
        the score :data:`WORST`. Results are in the order of the batches, not in that of the input.

        Args:
            translations: sentence number, rank (not used) and token ids (T,) of each translation, EOS included.
            sources: token ids (S,) of the sources, EOS included, indexed by sentence number.
        """
        rows = iter(translations)
        while block := {number: ids.long() for number, _, ids in islice(rows, BLOCK)}:
            for batch in self.batches(block, sources):
                yield from zip(batch, self.score([(block[one], sources[one].long()) for one in batch]), strict=True)
            taken = {one for one in block if self.takes(block[one], sources[one])}
            yield from ((one, WORST) for one in block if one not in taken)

    def takes(self, translation: torch.Tensor, source: torch.Tensor) -> bool:
        return len(translation) <= self.limits[0] and len(source) <= self.limits[1]

    def batches(self, block: dict[int, torch.Tensor], sources) -> Iterator[list[int]]:
        """Yield batches of sentence numbers, sorted by length; pairs longer than the model accepts are left out."""
        sizes = {one: max(len(ids), len(sources[one])) for one, ids in block.items() if self.takes(ids, sources[one])}
        return filled(sorted(sizes, key=lambda one: (sizes[one], one)), sizes.__getitem__, self.max_tokens)

    @torch.no_grad()
    def score(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> list[float]:
        sides = list(zip(*pairs, strict=True))
        lengths = [[len(one) for one in side] for side in sides]
        dictionaries = self.task.source_dictionary, self.task.target_dictionary
        dataset = LanguagePairDataset(
            sides[0], lengths[0], dictionaries[0], sides[1], lengths[1], dictionaries[1], shuffle=False
        )
        sample = dataset.collater([dataset[place] for place in range(len(pairs))])
        rows = next(forced.token_batches(self.models, [sample], dictionaries[1], self.device))
        parts = [
            mean_logprobs(heads, 1.0).gather(1, gold[:, None]).squeeze(1)
            for heads, gold in forced.chunks(rows.heads, rows.target)
        ]
        sentence = rows.sentence.cpu()
        sums = torch.zeros(len(pairs), dtype=torch.float64).index_add_(0, sentence, torch.cat(parts).double().cpu())
        return (sums / torch.bincount(sentence, minlength=len(pairs))).tolist()
