"""What rounds with and without something say of its cost, and what they cannot tell."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Attributes:
    extra: mean of the differences of neighbouring rounds.
    margin: twice its standard error; infinite for one pair.
    """

    extra: float
    margin: float

    @property
    def is_seen(self) -> bool:
        """Whether the rounds can tell it from nothing."""
        return self.extra > self.margin


def cost(without: Sequence[float], with_it: Sequence[float]) -> Cost:
    """Of neighbouring rounds, in pairs."""
    differences = [after - before for before, after in zip(without, with_it, strict=True)]
    margin = math.inf
    if len(differences) > 1:
        margin = 2 * statistics.stdev(differences) / math.sqrt(len(differences))
    return Cost(extra=statistics.fmean(differences), margin=margin)
