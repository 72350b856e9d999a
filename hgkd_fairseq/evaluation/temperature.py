"""Post-hoc temperature (Guo et al. 2017, section 4.2): one number that divides the logits, fitted by NLL.

What a temperature also fixes is no gain of a training method: report it beside every calibration claim.
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

LEAST, MOST = 0.01, 100.0  # temperatures that are taken: logits in fp32 stay far from their limits


class Fit(NamedTuple):
    """A fitted temperature, and the scores on the subset without it and with it."""

    temperature: float
    raw: Results
    scaled: Results

    def to_json(self) -> dict[str, Any]:
        return {"temperature": self.temperature, "raw": self.raw.to_json(), "scaled": self.scaled.to_json()}

    def __str__(self) -> str:
        shown = [results[key] for results in (self.raw, self.scaled) for key in ("nll", "ece", "ece_without_eos")]
        return "\n".join([*map(str, shown), f"temperature = {self.temperature:.4f}"])


class NoMinimum(UserError):
    """No temperature is the best one: of a model that has learnt nothing, or data it was trained on."""


def fit(
    data: str,
    path: str,
    subset: str = "valid",
    max_tokens: int = 4000,
    cpu: bool = False,
    settings: Settings | None = None,
    pair: str | None = None,
) -> Fit:
    """The temperature under which a subset has the least NLL; arguments as of :func:`forced.evaluate`.

    Raises:
        UserError: as of :func:`forced.evaluate`; NoMinimum: the NLL has none between 1/20 and 20.
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
    """The temperature of --temperature: a number, or the file that `hgkd calibration temperature --json` wrote.

    Raises:
        UserError: neither of the two, or not from LEAST to MOST.
    """
    try:
        value = float(given)
    except ValueError:
        try:
            value = read_file(given)["temperature"]
        except UserError as error:
            raise UserError(f"--temperature {given} is neither a number nor a file of it: {error}") from None
    if not LEAST <= value <= MOST:  # NaN is not
        raise UserError(f"--temperature {given}: it must be above 0, from {LEAST:g} to {MOST:g}")
    return value


def read_file(file: str | Path) -> dict[str, Any]:
    """The content of a file of `hgkd calibration temperature --json`.

    Raises:
        UserError: it is no such file.
    """
    schema = {"temperature": files.Within(LEAST, MOST, float), "command?": str}
    return files.read_json(file, schema, "file of `hgkd calibration temperature --json`")
