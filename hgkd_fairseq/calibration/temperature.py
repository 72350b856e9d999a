"""Temperature scaling (Guo et al., ICML 2017, section 4.2): the one number that divides the logits, fitted by NLL."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

HIGHEST = 20.0  # temperatures from 1 / HIGHEST to HIGHEST are tried
TOLERANCE = 1e-4  # of the temperature, relative
MOST_PASSES = 30


def nll_slopes(logprobs: Callable[[Tensor], Tensor], gold: Tensor, inverse: float) -> tuple[float, float]:
    """First and second derivative of the summed NLL (nats) by the inverse temperature.

    Args:
        logprobs: temperature (0-d) -> (N, V) log-probabilities, differentiable twice.
        gold: (N,) int64.
    """
    with torch.enable_grad():
        beta = torch.tensor(inverse, dtype=torch.float64, device=gold.device, requires_grad=True)
        nll = -logprobs(1 / beta).gather(1, gold[:, None]).double().sum()
        (first,) = torch.autograd.grad(nll, beta, create_graph=True)
        (second,) = torch.autograd.grad(first, beta)
    return float(first.detach()), float(second)


def fit(slopes: Callable[[float], tuple[float, float]]) -> float | None:
    """The temperature of least NLL, from the two derivatives that `slopes` gives at an inverse temperature: Newton's
    method from 1, with bisection where it leaves the bracket. The NLL of one model is convex in the inverse
    temperature, so there is one such place. None where there is none between 1 / HIGHEST and HIGHEST.
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
