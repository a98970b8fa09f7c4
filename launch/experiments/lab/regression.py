"""Least squares on rows, and how well it predicts rows that it has not seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lab.experiment import Row, groups

Features = Callable[[Row], Sequence[float]]
"""What a row is predicted from; one of them is 1 where there is to be an intercept."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Rows of one group, predicted by what was fitted to all others.

    Attributes:
        group: what they have in common.
        found, predicted: [n] each.
    """

    group: str
    found: np.ndarray
    predicted: np.ndarray

    @property
    def rmse(self) -> float:
        """Root of the mean squared error."""
        return float(np.sqrt(np.mean((self.found - self.predicted) ** 2)))

    @property
    def explained(self) -> float:
        """1 - squared error / squared deviation from their own mean; below 0 if that is better."""
        return float(1 - self.rmse**2 / np.var(self.found))

    @property
    def signs(self) -> float:
        """Share of rows whose sign is right."""
        return float(np.mean((self.found > 0) == (self.predicted > 0)))


def fit(rows: Sequence[Row], features: Features, what: str = "gain") -> np.ndarray:
    """[k] coefficients of `features` for `what`."""
    table = np.asarray([features(row) for row in rows], dtype=np.float64)
    found: np.ndarray = np.linalg.lstsq(table, np.asarray([row[what] for row in rows]))[0]
    return found


def held_out(rows: Sequence[Row], by: str, features: Features, what: str = "gain") -> list[HeldOut]:
    """Each value of `by` in turn is left out of the fit and then predicted."""
    results = []
    for (value,), mine in groups(rows, by):
        used = fit([row for row in rows if row[by] != value], features, what)
        table = np.asarray([features(row) for row in mine], dtype=np.float64)
        found = np.asarray([row[what] for row in mine])
        results.append(HeldOut(group=str(value), found=found, predicted=table @ used))
    return results
