"""Selection of the hypothesis of a sentence that is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from sacrebleu.metrics import BLEU, CHRF

from hgkd_fairseq import files
from hgkd_fairseq.data.translations import Hypothesis
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation import generated

Select = Callable[[int, Sequence[Hypothesis]], int]
"""The rank of one of the hypotheses of a sentence, which is known by its number; there is at least one. Sentences come
in order."""
FILE = "scores:"


def make(how: str, reference: Callable[[int], list[str]]) -> Select:
    """Create a function that selects one of the hypotheses of a sentence.

    Args:
        how: "best" (the first one), "bleu", "chrf" (:class:`Nearest`) or "scores:FILE" (:class:`ByFile`).
        reference: returns the pieces of the reference, given the number of a sentence.

    Raises:
        UserError: `how` is none of these.
    """
    if how.startswith(FILE):
        return ByFile(how.removeprefix(FILE))
    if how in ("bleu", "chrf"):
        return Nearest(BLEU(effective_order=True) if how == "bleu" else CHRF(), reference)
    if how != "best":
        raise UserError(f"--select {how}: give best, bleu, chrf or {FILE}FILE")
    return lambda _number, _hypotheses: 0


class Nearest:
    """Selects the hypothesis with the highest sentence-level score against the reference; of equal ones, the first.

    Args:
        metric: sacreBLEU metric.
        reference: returns the pieces of the reference, given the number of a sentence.
    """

    def __init__(self, metric, reference: Callable[[int], list[str]]):
        self.metric, self.reference = metric, reference

    def __call__(self, number: int, hypotheses: Sequence[Hypothesis]) -> int:
        if len(hypotheses) == 1:
            return 0
        *found, gold = generated.joined([*(one.pieces for one in hypotheses), self.reference(number)])
        scores = [self.metric.sentence_score(text, [gold]).score for text in found]
        return scores.index(max(scores))


class ByFile:
    """Selects the hypothesis with the highest score in a file; of equal ones, the first.

    The file has one line with a number for each hypothesis, in the order of the sentences and of their hypotheses.

    Args:
        file: name of the file.

    Raises:
        UserError: raised by a call, if the file cannot be read, ends too early, or a line is not a finite number.
    """

    def __init__(self, file: str):
        self.file = file
        self.lines = enumerate(files.read_lines(file, "name a file with a score a line for each hypothesis"), 1)

    def __call__(self, _number: int, hypotheses: Sequence[Hypothesis]) -> int:
        scores = [self.next() for _ in hypotheses]
        return scores.index(max(scores))

    def next(self) -> float:
        place, line = next(self.lines, (0, ""))
        try:
            score = float(line)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            what = f"line {place} is no number" if place else "it ends too early"
            raise UserError(f"{self.file}: {what}; it needs a score for each hypothesis, one a line")
        return score

    def end(self) -> None:
        """Check that no lines are left after the last sentence.

        Raises:
            UserError: the file has more lines than there are hypotheses.
        """
        for place, _ in self.lines:
            raise UserError(f"{self.file} has a line {place} and there are only {place - 1} hypotheses to score")
