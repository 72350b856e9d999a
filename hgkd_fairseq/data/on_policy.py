"""The student's own translations of training sentences, trained on in place of the targets (on-policy distillation:
GKD, Agarwal et al., ICLR 2024, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hgkd_fairseq.data import batches


def drawn(sentences: np.ndarray, share: float, seed: int, epoch: int) -> tuple[list[int], int]:
    """Which of the sentences are translated in an epoch, by their numbers in ascending order, and a seed for what is
    drawn of them."""
    generator = np.random.default_rng([seed % 2**32, epoch])
    count = round(share * len(sentences))
    return sorted(generator.permutation(sentences)[:count].tolist()), int(generator.integers(2**31))


class OwnTranslations:
    """Translations by the numbers of their sentences.

    Attributes:
        state: a dict of tensors, to be kept with the checkpoints: "number" and "length" (M,) int64, "token" int32, all
            translations in the order of the numbers, each with its end of sentence; and what else its owner puts there.
    """

    def __init__(self, state: dict[str, Tensor]):
        self.state = state
        self._found: dict[int, Tensor] | None = None

    def fill(self, number: Tensor, length: Tensor, token: Tensor) -> None:
        """Replace all that is there."""
        self.state.update(number=number, length=length, token=token)
        self._found = None

    def by_number(self) -> dict[int, Tensor]:
        """Tokens (T,) of each."""
        if self._found is None:
            self._found = {}
            if "number" in self.state:
                tokens = self.state["token"].split(self.state["length"].tolist())
                self._found = dict(zip(self.state["number"].tolist(), tokens, strict=True))
        return self._found

    def in_place_of_targets(
        self, sample: dict[str, Any], pad: int, eos: int, most: int | None
    ) -> tuple[dict[str, Any], list[bool] | None]:
        """A batch of fairseq's whose targets, and with them the decoder's input, are the translations of the sentences
        that have one.

        Args:
            sample: the batch, padded on the right.
            most: tokens that its targets may have with pads; a translation that would take more is cut, for what comes
                before does not depend on what is cut off. None: any number.

        Returns: the batch, and which of its sentences are such; None where none is.
        """
        found = [self.by_number().get(number) for number in sample["id"].tolist()]
        rows = [row for row, tokens in enumerate(found) if tokens is not None]
        if not rows:
            return sample, None
        target, given = sample["target"], sample["net_input"]["prev_output_tokens"]
        width = None if most is None else max(most // len(found), target.size(1))
        translations = [tokens[:width] for tokens in found if tokens is not None]
        ours = pad_sequence(translations, batch_first=True, padding_value=pad).long()  # (R, T)
        before = ours.roll(1, 1)
        before[:, 0] = eos
        before.masked_fill_(ours == pad, pad)
        lengths = list(batches.target_lengths(sample, 0, pad))
        for row, tokens in zip(rows, translations, strict=True):
            lengths[row] = len(tokens)
        place = torch.tensor(rows, device=target.device)
        made = [with_rows(whole, place, some, pad) for whole, some in ((target, ours), (given, before))]
        replaced = {
            **sample,
            "target": made[0],
            "ntokens": sum(lengths),
            "target_lengths": lengths,
            "net_input": {**sample["net_input"], "prev_output_tokens": made[1]},
        }
        return replaced, [tokens is not None for tokens in found]


def with_rows(whole: Tensor, place: Tensor, rows: Tensor, pad: int) -> Tensor:
    """(B, T) tokens with others in some rows, as wide as both need."""
    made = whole.new_full((whole.size(0), max(whole.size(1), rows.size(1))), pad)
    made[:, : whole.size(1)] = whole
    made.index_fill_(0, place, pad)
    made[:, : rows.size(1)].index_copy_(0, place, rows.to(whole.device))
    return made


def apart(target: Tensor, lengths: Sequence[int], own: Sequence[bool], pad: int) -> list[tuple[Tensor, list[int]]]:
    """Targets (B, T) and their lengths of the other sentences, and of those in `own`: each with pads for the rest."""
    mask = torch.tensor(own, device=target.device)[:, None]
    return [
        (target.masked_fill(out, pad), [0 if one is here else length for one, length in zip(own, lengths, strict=True)])
        for out, here in ((mask, True), (~mask, False))
    ]
