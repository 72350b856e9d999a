"""Which translations of a teacher a student had better not learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from hgkd_fairseq.data.translations import Hypothesis
from hgkd_fairseq.errors import UserError

# In the order in which they are asked for; the first that holds is the reason.
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
LONGEST_LOOP = 8  # pieces


@dataclass(frozen=True)
class Filters:
    """What is dropped. The thresholds of length are those that corpora are commonly cleaned by; the share of the worst
    by a backward model is that of Bergamot's recipes for small models."""

    off: frozenset[str] = field(default_factory=frozenset)  # of SWITCHES
    ratio: tuple[float, float] = (0.5, 2.0)  # pieces of the translation over those of the source
    most: int = 150  # pieces
    repeats: int = 4  # of a run of pieces, one after another
    worst_score: float = 0.0  # share of what no filter before it has dropped
    worst_backward: float = 0.05

    def reason(self, source: Sequence[str], hypothesis: Hypothesis | None, unknown: str) -> str | None:
        """Why a translation is dropped, of what can be told of it alone; None: it is kept. `source` in pieces, without
        the end of sentence; no `hypothesis`: it was skipped; `unknown`: the piece that stands for unknown ones."""
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
        """Give the worst share of what is kept its reason, "score" or "backward": those of the lowest scores, the first
        ones where they are equal.

        Args:
            name: of the reason.
            reasons: (N,) of CODES, 0 where kept.
            scores: (N,).
        """
        share = {"score": self.worst_score, "backward": self.worst_backward}[name]
        kept = np.flatnonzero(reasons == 0)
        count = 0 if name in self.off else int(share * len(kept))
        if not np.isfinite(scores[kept]).all():
            raise UserError(f"a model gives scores that are no numbers; leave them aside with --keep {name}")
        reasons[kept[np.argsort(scores[kept], kind="stable")[:count]]] = CODES[name]


def loops(pieces: Sequence[str], repeats: int) -> bool:
    """Whether a run of 1 to LONGEST_LOOP pieces stands `repeats` times in a row."""
    for length in range(1, LONGEST_LOOP + 1):
        same = 0
        for one, before in zip(pieces[length:], pieces, strict=False):
            same = same + 1 if one == before else 0
            if same >= length * (repeats - 1):
                return True
    return False
