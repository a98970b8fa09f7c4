"""Means over seeds with 95 % confidence intervals, and what may be concluded from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Student's t, two-sided 95 %, for 1 to 9 degrees of freedom; beyond, the value for 9 is safe.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

REPRODUCED, NOT_REPRODUCED = "reproduced", "not reproduced"
IN_PART, UNDECIDED = "reproduced in part", "not decidable at this scale"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean over seeds; `margin` is half of its 95 % confidence interval, None for one seed."""

    mean: float
    margin: float | None
    n: int

    @property
    def low(self) -> float:
        """Lower end of the interval; minus infinity for one seed."""
        return self.mean - (math.inf if self.margin is None else self.margin)

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + (math.inf if self.margin is None else self.margin)

    def __str__(self) -> str:
        return self.shown("")

    @property
    def signed(self) -> str:
        """With its sign, for differences."""
        return self.shown("+")

    def shown(self, sign: str) -> str:
        """Mean and margin with four decimals."""
        margin = "" if self.margin is None else f" ± {self.margin:.4f}"
        return f"{self.mean:{sign}.4f}{margin}"


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval of one value per seed.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("no values")
    n, margin = len(values), None
    if n > 1:
        t = _T[min(n - 2, len(_T) - 1)]
        margin = t * statistics.stdev(values) / math.sqrt(n)
    return Estimate(mean=statistics.fmean(values), margin=margin, n=n)


def verdict(gains: Sequence[Estimate]) -> str:
    """Of a claim that every gain is positive.

    Reproduced if all intervals lie above zero, not reproduced if one lies below it, else open.
    """
    if all(gain.low > 0 for gain in gains):
        return REPRODUCED
    return NOT_REPRODUCED if any(gain.high < 0 for gain in gains) else UNDECIDED
