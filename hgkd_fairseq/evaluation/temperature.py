"""Temperature scaling (Guo et al., ICML 2017, section 4.2): a single divisor of the logits, fitted by minimising NLL.

It is a control: an improvement of the calibration that a temperature also achieves is not due to the training method.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

from hgkd_fairseq import files
from hgkd_fairseq.calibration import temperature as calibration
from hgkd_fairseq.calibration.scores import Results, Settings
from hgkd_fairseq.errors import UserError
from hgkd_fairseq.evaluation.forced import batches, chunks, load, measure, token_batches
from hgkd_fairseq.loss.eager import mean_logprobs

LEAST, MOST = 0.01, 100.0  # accepted temperatures: logits stay well within the range of fp32


class Fit(NamedTuple):
    """A fitted temperature, and the scores on the subset without and with it."""

    temperature: float
    raw: Results  # at temperature 1
    scaled: Results  # at the fitted temperature

    def to_json(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "raw": self.raw.to_json(), "scaled": self.scaled.to_json()}

    def __str__(self) -> str:
        shown = [results[key] for results in (self.raw, self.scaled) for key in ("nll", "ece", "ece_without_eos")]
        return "\n".join([*map(str, shown), f"temperature = {self.temperature:.4f}"])


class NoMinimum(UserError):
    """The NLL has no minimum over the temperatures, as for an untrained model or on its training data."""


def fit(
    data: str,
    path: str,
    subset: str = "valid",
    max_tokens: int = 4000,
    cpu: bool = False,
    settings: Settings | None = None,
    pair: str | None = None,
) -> Fit:
    """Fit the temperature that minimises the NLL of a subset; arguments as of :func:`forced.evaluate`.

    Returns:
        The temperature, and the teacher-forced scores without and with it.

    Raises:
        UserError: see :func:`forced.evaluate`.
        NoMinimum: no temperature between 1/20 and 20 minimises the NLL.
    """
    settings = settings or Settings()
    models, task, device = load(data, path, cpu, pair, several=True)
    raw = measure(models, task, device, subset, max_tokens, settings, temperature=1.0)

    def slope(inverse: float) -> tuple[float, float]:
        first = second = 0.0
        for batch in token_batches(models, batches(task, models, subset, max_tokens), task.target_dictionary, device):
            for heads, gold in chunks(batch.heads, batch.target):
                slopes = calibration.nll_slopes(functools.partial(mean_logprobs, heads), gold, inverse)
                first, second = first + slopes[0], second + slopes[1]
        return first, second

    found = calibration.fit(slope)
    if found is None:
        raise NoMinimum(
            f"the NLL of subset {subset} falls up to a temperature of {calibration.HIGHEST:g} or down to "
            f"1/{calibration.HIGHEST:g}; fit it on data the model was not trained on, with --gen-subset"
        )
    scaled = measure(models, task, device, subset, max_tokens, settings, found)
    for results in (raw, scaled):
        results.about["path"] = path
    return Fit(found, raw, scaled)


def read(given: str) -> float:
    """Parse the value of --temperature: a number, or a file that `hgkd calibration temperature --json` wrote.

    Raises:
        UserError: the value is neither of these, or the temperature is not from LEAST to MOST.
    """
    try:
        value = float(given)
    except ValueError:
        try:
            value = read_file(given)["temperature"]
        except UserError as error:
            raise UserError(f"--temperature {given} is neither a number nor a file of it: {error}") from None
    if not LEAST <= value <= MOST:  # false for NaN
        raise UserError(f"--temperature {given}: it must be above 0, from {LEAST:g} to {MOST:g}")
    return value


def read_file(file: str | Path) -> dict[str, Any]:
    """Read a file that `hgkd calibration temperature --json` wrote.

    Raises:
        UserError: the file cannot be read, or is none of these.
    """
    schema = {"temperature": files.Within(LEAST, MOST, float), "command?": str}
    return files.read_json(file, schema, "file of `hgkd calibration temperature --json`")
