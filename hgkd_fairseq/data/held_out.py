"""Training sentences that are kept aside, for what is learned beside the student."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from hgkd_fairseq.errors import UserError

logger = logging.getLogger(__name__)


class HeldOut:
    """A share of the training sentences, the same ones in every run of that share; or one of N folds."""

    def __init__(self) -> None:
        self.share = 0.0
        self.fold: tuple[int, int] | None = None  # see `fold`

    def mask(self, sentences: int) -> np.ndarray:
        """(sentences,) bool, which of the training set's sentences are kept aside."""
        mask = np.zeros(sentences, dtype=bool)
        if self.share:
            count = max(round(self.share * sentences), 1)
            mask[np.random.default_rng(1).permutation(sentences)[:count]] = True
        if self.fold:
            mask[self.fold[0] :: self.fold[1]] = True
        return mask

    def leave_out(self, indices: np.ndarray, sentences: int, numbers: Callable[[], np.ndarray]) -> np.ndarray:
        """Those of the training set's `indices` that are trained on; `numbers`: makes those of their sentences."""
        if not self.share and not self.fold:
            return indices
        kept = indices[~self.mask(sentences)[numbers()]]
        logger.info("%d of %d training sentences are kept aside", len(indices) - len(kept), len(indices))
        return kept


def fold(given: str) -> tuple[int, int]:
    """(k, n) of K/N, the sentences k, k + n, ...

    Raises:
        UserError: it is no such pair.
    """
    try:
        number, folds = map(int, given.split("/"))
    except ValueError:
        number = folds = 0
    if not 1 <= number <= folds or folds < 2:
        raise UserError(f"--leave-out-fold {given}: give K/N, the K-th of N folds, such as 1/2")
    return number - 1, folds
