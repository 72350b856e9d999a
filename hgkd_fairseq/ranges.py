"""Ranges of numbers that an option may have; nan and infinity are in none."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    low: float  # both ends belong to it
    high: float
    text: str  # what follows "it must be"
    otherwise: str = "out of range"  # what a number is that is not in it

    def problem(self, value: object) -> str | None:
        """None for a number in the range; otherwise what is wrong with it."""
        if isinstance(value, int | float) and self.low <= value <= self.high:
            return None
        return f"it must be {self.text}"


LARGEST = 1e6  # far above anything useful, far below what overflows in single precision

SHARE = Range(0, 1, "between 0 and 1", "no share")
BELOW_1 = Range(0, math.nextafter(1, 0), "at least 0 and below 1")
WEIGHT = Range(0, LARGEST, "at least 0 and finite (at most 1e6)")
POSITIVE = Range(1 / LARGEST, LARGEST, "above 0 and finite (1e-6 to 1e6)")
COUNT = Range(0, 2**62, "at least 0")
NUMBER = Range(1, 2**31, "at least 1")
FINITE = Range(-1.7e308, 1.7e308, "a finite number")
