"""Held-out training sentences, which are excluded from training."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from hgkd_fairseq.errors import UserError

logger = logging.getLogger(__name__)


class HeldOut:
    """Selection of held-out training sentences: a share of them at random, one of N folds, or both.

    The selection depends only on the share, the fold and the number of sentences, so it is the same in every run.

    Attributes:
        share: fraction of the sentences; 0: none. Otherwise at least one sentence is held out.
        fold: (k, n), which holds out the sentences k, k + n, ...; None: none.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self.fold: tuple[int, int] | None = None

    def mask(self, sentences: int) -> np.ndarray:
        """Return which sentences of a training set are held out, (sentences,) bool."""
        mask = np.zeros(sentences, dtype=bool)
        if self.share:
            count = max(round(self.share * sentences), 1)
            mask[np.random.default_rng(1).permutation(sentences)[:count]] = True
        if self.fold:
            mask[self.fold[0] :: self.fold[1]] = True
        return mask

    def leave_out(self, indices: np.ndarray, sentences: int, numbers: Callable[[], np.ndarray]) -> np.ndarray:
        """Remove the indices of held-out sentences, and log their number.

        Args:
            indices: (I,) indices of the training set.
            sentences: number of distinct sentences in the training set.
            numbers: function that returns the sentence number of each index, (I,); called only if sentences are held
                out.

        Returns:
            The remaining indices, in their order.
        """
        if not self.share and not self.fold:
            return indices
        kept = indices[~self.mask(sentences)[numbers()]]
        logger.info("%d of %d training sentences are kept aside", len(indices) - len(kept), len(indices))
        return kept


def fold(given: str) -> tuple[int, int]:
    """Parse a fold "K/N", the K-th of N, to (k, n) = (K - 1, N); the fold has the sentences k, k + n, ...

    Raises:
        UserError: `given` is not of this form, N is less than 2, or K is not from 1 to N.
    """
    try:
        number, folds = map(int, given.split("/"))
    except ValueError:
        number = folds = 0
    if not 1 <= number <= folds or folds < 2 or given != f"{number}/{folds}":
        raise UserError(f"--leave-out-fold {given}: give K/N, the K-th of N folds, such as 1/2")
    return number - 1, folds
