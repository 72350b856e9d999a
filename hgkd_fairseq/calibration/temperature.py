"""Temperature scaling (Guo et al., ICML 2017, section 4.2): a scalar that divides the logits, fitted by NLL."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

HIGHEST = 20.0  # the search covers temperatures from 1 / HIGHEST to HIGHEST
TOLERANCE = 1e-4  # relative change of the inverse temperature at which the search stops
MOST_PASSES = 30  # evaluations of the derivatives, each of which usually is a pass over the data


def nll_slopes(logprobs: Callable[[Tensor], Tensor], gold: Tensor, inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of the summed NLL (nats) with respect to the inverse temperature.

    Args:
        logprobs: function from a temperature (0-d tensor) to log-probabilities (N, V), twice differentiable.
        gold: (N,) int64, gold tokens.
        inverse: inverse temperature at which the derivatives are evaluated.
    """
    with torch.enable_grad():
        beta = torch.tensor(inverse, dtype=torch.float64, device=gold.device, requires_grad=True)
        nll = -logprobs(1 / beta).gather(1, gold[:, None]).double().sum()
        (first,) = torch.autograd.grad(nll, beta, create_graph=True)
        (second,) = torch.autograd.grad(first, beta)
    return float(first.detach()), float(second)


def fit(slopes: Callable[[float], tuple[float, float]]) -> float | None:
    """Return the temperature that minimises the NLL, by Newton's method in the inverse temperature, starting at 1.

    A step that leaves the bracket is replaced by bisection. The NLL of a single model is convex in the inverse
    temperature, so it has at most one minimum.

    Args:
        slopes: function from an inverse temperature to the first and second derivative of the NLL, such as
            :func:`nll_slopes`.

    Returns:
        The temperature; None if there is no minimum between 1 / HIGHEST and HIGHEST, or if the search has not converged
        after MOST_PASSES evaluations.
    """
    low, high = 1 / HIGHEST, HIGHEST
    inverse = 1.0
    for _ in range(MOST_PASSES):
        first, second = slopes(inverse)
        low, high = (inverse, high) if first < 0 else (low, inverse)
        step = inverse - first / second if second > 0 else math.nan
        after = step if low < step < high else math.sqrt(low * high)
        if abs(after - inverse) <= TOLERANCE * inverse:
            if after > (1 - 2 * TOLERANCE) * HIGHEST or after < (1 + 2 * TOLERANCE) / HIGHEST:
                return None
            return 1 / after
        inverse = after
    return None
