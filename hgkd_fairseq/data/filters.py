"""Filters for a teacher's translations that a student should not be trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hgkd_fairseq.data.translations import Hypothesis
from hgkd_fairseq.errors import UserError

# In the order of the checks; the reason of a translation is the first one that applies.
REASONS = {
    "skipped": "the source is longer than the teacher takes",
    "empty": "no pieces",
    "limit": "as long as it was allowed to be",
    "long": "too many pieces, in it or in its source",
    "ratio": "too short or too long for its source",
    "copy": "a copy of its source",
    "loop": "a run of pieces again and again",
    "unknown": "has unknown pieces",
    "score": "among those of the worst scores",
    "backward": "among those that tell a backward model least of the source",
}
SWITCHES = tuple(name for name in REASONS if name != "skipped")
CODES = {name: code for code, name in enumerate(REASONS, 1)}  # 0: kept
LONGEST_LOOP = 8  # maximum length of a repeated run, in pieces


@dataclass(frozen=True)
class Filters:
    """Filters and their thresholds.

    The default thresholds of length are common in corpus cleaning. The default of `worst_backward` is that of
    Bergamot's recipes for small models.
    """

    off: frozenset[str] = field(default_factory=frozenset)  # names, from SWITCHES, of the filters that are disabled
    ratio: tuple[float, float] = (0.5, 2.0)  # least and greatest ratio of pieces, translation to source
    most: int = 150  # greatest number of pieces in the translation or the source
    repeats: int = 4  # number of consecutive repetitions of a run of pieces from which on it is a loop
    worst_score: float = 0.0  # fraction, of the translations that all earlier filters keep, with the lowest scores
    worst_backward: float = 0.05  # the same, by the scores of the backward model

    def reason(self, source: Sequence[str], hypothesis: Hypothesis | None, unknown: str) -> str | None:
        """Return the reason why a translation is dropped, or None if it is kept.

        Only filters that depend on a single translation are applied; :meth:`worst` applies the others.

        Args:
            source: pieces of the source, without the end of sentence.
            hypothesis: translation; None if the teacher has skipped the sentence.
            unknown: symbol of the unknown piece.
        """
        if hypothesis is None:
            return "skipped"
        pieces = hypothesis.pieces
        low, high = self.ratio
        found = {
            "empty": lambda: not pieces,
            "limit": lambda: hypothesis.limit,
            "long": lambda: max(len(pieces), len(source)) > self.most,
            "ratio": lambda: not low <= len(pieces) / max(len(source), 1) <= high,
            "copy": lambda: "".join(pieces) == "".join(source),
            "loop": lambda: loops(pieces, self.repeats),
            "unknown": lambda: unknown in pieces,
        }
        return next((name for name, holds in found.items() if name not in self.off and holds()), None)

    def worst(self, name: str, reasons: np.ndarray, scores: np.ndarray) -> None:
        """Drop the given fraction of the kept translations with the lowest scores; of equal scores the first ones.

        Args:
            name: reason, "score" or "backward".
            reasons: (N,) codes from CODES, 0 for kept translations; changed in place.
            scores: (N,) scores; those of translations that are already dropped are ignored.

        Raises:
            UserError: the score of a kept translation is not finite.
        """
        share = {"score": self.worst_score, "backward": self.worst_backward}[name]
        kept = np.flatnonzero(reasons == 0)
        if name in self.off:
            return
        count = int(share * len(kept))
        if not np.isfinite(scores[kept]).all():
            raise UserError(f"a model gives scores that are no numbers; leave them aside with --keep {name}")
        reasons[kept[np.argsort(scores[kept], kind="stable")[:count]]] = CODES[name]


def loops(pieces: Sequence[str], repeats: int) -> bool:
    """Return whether a run of 1 to LONGEST_LOOP pieces occurs `repeats` times in a row."""
    for length in range(1, LONGEST_LOOP + 1):
        same = 0
        for one, before in zip(pieces[length:], pieces, strict=False):
            same = same + 1 if one == before else 0
            if same >= length * (repeats - 1):
                return True
    return False
