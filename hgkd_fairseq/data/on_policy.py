"""Translations of training sentences by the student itself, which replace the references in training (on-policy
distillation: GKD, Agarwal et al., ICLR 2024, arXiv:2306.13649)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hgkd_fairseq.data import batches


def drawn(sentences: np.ndarray, share: float, seed: int, epoch: int) -> tuple[list[int], int]:
    """Draw the sentences that the student translates in an epoch.

    Args:
        sentences: (S,) sentence numbers to choose from.
        share: fraction of the sentences to choose.
        seed: seed of the training.
        epoch: epoch, from 1.

    Returns:
        The numbers of the chosen sentences in ascending order, and a seed for sampling their translations.
    """
    generator = np.random.default_rng([seed % 2**32, epoch])
    count = round(share * len(sentences))
    return sorted(generator.permutation(sentences)[:count].tolist()), int(generator.integers(2**31))


class OwnTranslations:
    """Buffer of the student's translations, by sentence number.

    Attributes:
        state: dict of tensors that is saved in checkpoints: "number" and "length", (M,) int64, and "token", int32, the
            concatenated translations in the order of "number", each with its end of sentence. Its owner may add other
            tensors.
    """

    def __init__(self, state: dict[str, Tensor]):
        self.state = state
        self._found: dict[int, Tensor] | None = None

    def fill(self, number: Tensor, length: Tensor, token: Tensor) -> None:
        """Replace all translations.

        Args:
            number: (M,) int64, sentence numbers.
            length: (M,) int64, lengths of the translations, with the end of sentence.
            token: (sum of the lengths,) int32, concatenated translations.
        """
        self.state.update(number=number, length=length, token=token)
        self._found = None

    def by_number(self) -> dict[int, Tensor]:
        """Return the tokens (T,) of each translation by sentence number."""
        if self._found is None:
            self._found = {}
            if "number" in self.state:
                tokens = self.state["token"].split(self.state["length"].tolist())
                self._found = dict(zip(self.state["number"].tolist(), tokens, strict=True))
        return self._found

    def in_place_of_targets(
        self, sample: dict[str, Any], pad: int, eos: int, most: int | None
    ) -> tuple[dict[str, Any], list[bool] | None]:
        """Replace the targets of a batch, and the decoder's input, by translations where there are any.

        Args:
            sample: batch of fairseq, with targets padded on the right; it is not changed.
            pad: id of the padding token.
            eos: id of the end of sentence, with which the decoder's input begins.
            most: maximum number of tokens in the new targets, padding included. Translations are truncated to it, but
                not below the width of the given targets; this does not change what precedes the cut. None: no maximum.

        Returns:
            The new batch, and whether the target of each sentence is a translation, a list of length B; the second is
            None, and the batch the given one, if no sentence has a translation.
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
    """Return tokens `whole` (B, T) with the rows `place` (R,) replaced by `rows` (R, U): (B, max(T, U)), padded."""
    made = whole.new_full((whole.size(0), max(whole.size(1), rows.size(1))), pad)
    made[:, : whole.size(1)] = whole
    made.index_fill_(0, place, pad)
    made[:, : rows.size(1)].index_copy_(0, place, rows.to(whole.device))
    return made


def apart(target: Tensor, lengths: Sequence[int], own: Sequence[bool], pad: int) -> list[tuple[Tensor, list[int]]]:
    """Split targets into those of the references and those of the student's own translations.

    Args:
        target: (B, T) token ids.
        lengths: number of tokens of each target, of length B.
        own: whether each target is a translation of the student, of length B.
        pad: id of the padding token.

    Returns:
        Targets (B, T) and lengths of the references, then of the translations. In both, the other sentences are
        all padding and have length 0.
    """
    mask = torch.tensor(own, device=target.device)[:, None]
    return [
        (target.masked_fill(out, pad), [0 if one is here else length for one, length in zip(own, lengths, strict=True)])
        for out, here in ((mask, True), (~mask, False))
    ]
