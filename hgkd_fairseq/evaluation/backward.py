"""How much translations tell of their sources, by a model that translates the other way."""

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

BLOCK = 4096  # sentences that are sorted by length together
WORST = float(np.finfo(np.float64).min)  # of what the model does not take


class BackwardModel:
    """A fairseq checkpoint, or several with ':' between them.

    Args:
        path: of it.
        task: of the model that has translated.
        max_tokens: of a batch.
        cpu: stay on the CPU where there is a GPU.

    Raises:
        UserError: it cannot be used, or has other dictionaries.
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
        """Number, and log-probability (nats a token) of the source given the translation.

        Args:
            translations: number, rank and ids (T,) of each.
            sources: ids (S,) by number.
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
        """Sentences of about one length."""
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
