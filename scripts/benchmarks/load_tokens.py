"""The parts of load.py that process tokens: the calibration scores, and a loss step with a large vocabulary.

Each part is a function of a folder and a number of tokens. It prepares its inputs and returns the function to measure.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from hgkd_fairseq.calibration import corp, correlation, distribution, fine, histogram, labels, pieces, temperature
from hgkd_fairseq.calibration.scores import Predictions, Settings
from hgkd_fairseq.loss import gated_distillation

# The function to measure. If its result is callable, load.py calls that after the measurement and reports the string
# that it returns.
Run = Callable[[], object]

AT_ONCE = 4000  # tokens per batch
SENTENCE = 25  # tokens per sentence
TYPES = 32  # vocabulary size for the scores of whole distributions
REPLICATES = 1000  # bootstrap resamples


def tokens(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (confidence, correct, sentence), each of shape (count,); most confidences are near 1 and slightly too
    high."""
    generator = torch.Generator().manual_seed(1)
    confidence = torch.rand(count, generator=generator) ** 0.3
    correct = torch.rand(count, generator=generator) < confidence**1.1
    return confidence, correct, torch.arange(count) // SENTENCE


def binned(score: Callable[[Tensor], object]) -> Callable[[Path, int], Run]:
    def part(_: Path, count: int) -> Run:
        confidence, correct, _ = tokens(count)
        return lambda: score(histogram.tabulate(confidence, correct, 20)[0])

    return part


def finely(score: Callable[[fine.FineHistogram], object]) -> Callable[[Path, int], Run]:
    def part(_: Path, count: int) -> Run:
        confidence, correct, _ = tokens(count)

        def run() -> None:
            table = fine.FineHistogram()
            table.update(confidence, correct)
            score(table)

        return run

    return part


def of_arrays(score: Callable[[Tensor, Tensor], object]) -> Callable[[Path, int], Run]:
    def part(_: Path, count: int) -> Run:
        confidence, correct, _ = tokens(count)
        return lambda: score(confidence, correct)

    return part


def predictions(at_once: int | None) -> Callable[[Path, int], Run]:
    """Return the part that computes all scores with intervals, in batches of `at_once` tokens (None: one batch)."""

    def part(_: Path, count: int) -> Run:
        found = tokens(count)

        def run() -> None:
            whole = Predictions(Settings())
            batches = zip(*[values.split(at_once or count) for values in found], strict=True)
            for confidence, correct, sentence in batches:
                whole.update(sentence, confidence, correct)
            whole.scores()
            whole.bars()

        return run

    return part


def distributions(of: Callable[[Tensor, Tensor], object]) -> Callable[[Path, int], Run]:
    """Return the part that calls `of` on (AT_ONCE, TYPES) probabilities and (AT_ONCE,) gold tokens, batch by batch."""

    def part(_: Path, count: int) -> Run:
        probability = torch.randn(AT_ONCE, TYPES, generator=torch.Generator().manual_seed(1)).mul(2).softmax(1)
        gold = probability.multinomial(1, generator=torch.Generator().manual_seed(2)).squeeze(1)

        def run() -> None:
            for _ in range(count // AT_ONCE):
                of(probability, gold)

        return run

    return part


def tables(probability: Tensor, gold: Tensor) -> None:
    distribution.distribution_tables(probability, gold, 20, torch.zeros_like(gold), 1)


def fit(_: Path, count: int) -> Run:
    """Fit a temperature to (count, TYPES) logits that are processed batch by batch, as `hgkd calibration temperature`
    does."""
    z = 3 * torch.randn(AT_ONCE, TYPES, generator=torch.Generator().manual_seed(1))
    gold = (z / 1.5).softmax(1).multinomial(1, generator=torch.Generator().manual_seed(2)).squeeze(1)

    def slopes(inverse: float) -> tuple[float, float]:
        found = [
            temperature.nll_slopes(lambda tau: (z / tau).log_softmax(1), gold, inverse) for _ in range(count // AT_ONCE)
        ]
        return sum(first for first, _ in found), sum(second for _, second in found)

    return lambda: temperature.fit(slopes)


def rank_correlation(_: Path, count: int) -> Run:
    """Compute Spearman's rank correlation of `count` / SENTENCE sentences and its bootstrap interval."""
    generator = torch.Generator().manual_seed(1)
    first, noise = torch.randn(2, count // SENTENCE, generator=generator, dtype=torch.float64)
    numbers = list(range(count // SENTENCE))

    def run() -> None:
        correlation.spearman(first, first + noise)
        correlation.spearman_interval(first, first + noise, numbers, REPLICATES, 1)

    return run


def sentences(count: int) -> list[list[str]]:
    words = [f"▁w{index % 977}" if index % 3 else f"s{index % 89}" for index in range(count)]
    return [words[start : start + SENTENCE] for start in range(0, count, SENTENCE)]


def ter(_: Path, count: int) -> Run:
    """Compute TER labels of hypotheses in which about one token in ten is wrong and one in ten is missing."""
    references = sentences(count)

    def run() -> None:
        for number, reference in enumerate(references):
            there = [place for place in range(len(reference)) if place % 10 != number % 10]
            said = [reference[place] if place % 10 else "wrong" for place in there]
            labels.ter_labels(said, reference)

    return run


def words(_: Path, count: int) -> Run:
    there = sentences(count)

    def run() -> None:
        mark = pieces.mark(there)
        for one in there:
            pieces.join(one, mark)

    return run


# (function, share of the requested number of tokens that it processes)
PARTS: dict[str, tuple[Callable[[Path, int], Run], float]] = {
    "ECE": (binned(histogram.ece), 1),
    "MCE": (binned(histogram.mce), 1),
    "RMS error": (binned(histogram.rms), 1),
    "debiased ECE": (binned(histogram.debiased_ece), 1),
    "debiased RMS error": (binned(histogram.debiased_rms), 1),
    "adaptive ECE": (finely(fine.FineHistogram.adaptive_ece), 1),
    "smooth ECE": (finely(fine.FineHistogram.smooth_ece), 1),
    "CORP": (finely(lambda table: corp.split(table.sums, 0.1, 0.5)), 1),
    "adaptive ECE, exact": (of_arrays(fine.adaptive_ece), 1),
    "CORP, exact": (of_arrays(corp.exact), 1),
    "all with intervals, in batches": (predictions(AT_ONCE), 1),
    "all with intervals, at once": (predictions(None), 1),
    "Brier of distributions": (distributions(distribution.brier), 1),
    "weighted and full ECE": (distributions(tables), 1),
    "fitted temperature": (fit, 1),
    "Spearman of sentences, with interval": (rank_correlation, 1),
    "labels by TER (1/20)": (ter, 1 / 20),
    "pieces to words": (words, 1),
}

# Of `step`: tokens of the sentence, types, size of a hidden state, and tokens per slice of the fp64 reference.
TOKENS, VOCABULARY, WIDTH, SLICE = 1024, 262_144, 64, 64


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return one sentence as (hidden, weight, teacher_hidden, teacher_weight, target).

    The shapes are (1, TOKENS, WIDTH), (VOCABULARY, WIDTH), the same two for the teacher, and (1, TOKENS). The values do
    not depend on `dtype`, except for rounding.
    """
    generator = torch.Generator().manual_seed(1)
    hidden, teacher = torch.randn(2, 1, TOKENS, WIDTH, generator=generator)
    weight, other = torch.randn(2, VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    target = torch.randint(4, VOCABULARY, (1, TOKENS), generator=generator)
    hidden, weight = (tensor.to(dtype).requires_grad_() for tensor in (hidden, weight))
    return hidden, weight, teacher.to(dtype), other.to(dtype), target


def truth(folder: Path) -> Path:
    """Return the file with the loss and gradients of the eager implementation in fp64; write it if it is missing."""
    file = folder / "truth.pt"
    if not file.exists():
        hidden, weight, teacher, other, target = inputs(torch.float64)
        total = 0.0
        for start in range(0, TOKENS, SLICE):
            some = slice(start, start + SLICE)
            output = gated_distillation(
                hidden[:, some], weight, teacher[:, some], other, target[:, some], gate="token", implementation="eager"
            )
            output.loss.backward()
            total += float(output.loss)
        found = {"loss": torch.tensor(total, dtype=torch.float64), "hidden": hidden.grad, "weight": weight.grad}
        torch.save(found, file)
    return file


def step(implementation: str, folder: Path, _: int) -> Run:
    file = truth(folder)
    hidden, weight, teacher, other, target = inputs(torch.float32)

    def run() -> Callable[[], str]:
        output = gated_distillation(hidden, weight, teacher, other, target, gate="token", implementation=implementation)
        output.loss.backward()
        return lambda: errors(file, output.loss.detach(), hidden.grad, weight.grad)

    return run


def errors(file: Path, loss: Tensor, hidden: Tensor, weight: Tensor) -> str:
    """Format the relative error of each result: the norm of its difference from :func:`truth` over the norm of the
    latter."""
    found = {"loss": loss, "hidden": hidden, "weight": weight}
    expected = torch.load(file, weights_only=True, mmap=True)
    apart = {name: (value - expected[name]).norm() / expected[name].norm() for name, value in found.items()}
    return ", ".join(f"{name} {float(error):.1e}" for name, error in apart.items())


STEPS: dict[str, tuple[Callable[[Path, int], Run], float]] = {
    name: (functools.partial(step, name), 1) for name in ("eager", "chunked", "native")
}
