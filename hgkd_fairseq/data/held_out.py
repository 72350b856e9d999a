"""Training sentences that are kept aside, for what is learned beside the student."""

from __future__ import annotations

import logging

import numpy as np

logger = logging.getLogger(__name__)


class HeldOut:
    """A share of the training sentences: the same ones in every run of that share."""

    def __init__(self) -> None:
        self.share = 0.0

    def mask(self, sentences: int) -> np.ndarray:
        """(sentences,) bool, which of the training set's sentences are kept aside."""
        mask = np.zeros(sentences, dtype=bool)
        if self.share:
            count = max(round(self.share * sentences), 1)
            mask[np.random.default_rng(1).permutation(sentences)[:count]] = True
        return mask

    def leave_out(self, indices: np.ndarray, sentences: int) -> np.ndarray:
        """Those of the training set's `indices` that are trained on."""
        if not self.share:
            return indices
        kept = indices[~self.mask(sentences)[indices]]
        logger.info("%d of %d training sentences are kept aside", len(indices) - len(kept), len(indices))
        return kept
