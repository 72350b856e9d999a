"""Ranges of allowed values of numeric options. NaN and infinity are in none of them."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    low: float  # inclusive
    high: float  # inclusive
    text: str  # description of the range, to follow "it must be"
    otherwise: str = "out of range"  # description of a value outside of the range

    def problem(self, value: object) -> str | None:
        """Return None for a number in the range, and an error message for any other value."""
        if isinstance(value, int | float) and self.low <= value <= self.high:
            return None
        return f"it must be {self.text}"


LARGEST = 1e6  # far above any useful value, far below overflow in single precision

SHARE = Range(0, 1, "between 0 and 1", "no share")
BELOW_1 = Range(0, math.nextafter(1, 0), "at least 0 and below 1")
WEIGHT = Range(0, LARGEST, "at least 0 and finite (at most 1e6)")
POSITIVE = Range(1 / LARGEST, LARGEST, "above 0 and finite (1e-6 to 1e6)")
COUNT = Range(0, 2**62, "at least 0")
NUMBER = Range(1, 2**31, "at least 1")
FINITE = Range(-1.7e308, 1.7e308, "a finite number")
