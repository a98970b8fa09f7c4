"""Distances between all checkpoints of a run, by `pma geometry`, and what follows from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from lab.kept import Kept


@dataclass(frozen=True, kw_only=True)
class Distances(Kept):
    """Of every pair of the checkpoints of `run`; it needs no model.

    Attributes:
        iterations: which.
    """

    kind = "distances"
    ranks = 1
    iterations: tuple[int, ...]

    def commands(self, out: Path) -> Sequence[Sequence[str]]:
        """One."""
        which = ["--iterations", *map(str, self.iterations)]
        return [["geometry", "--load", str(self.run.root), *which, "--out", str(out)]]

    @cached_property
    def _total(self) -> dict[str, list[float]]:
        found: dict[str, list[float]] = self.result()["groups"]["total"]
        return found

    def squares(self, iterations: Sequence[int]) -> np.ndarray:
        """[N, N] squared distances between some of them."""
        at = [self.iterations.index(each) for each in iterations]
        found: np.ndarray = np.square(np.asarray(self._total["distances"]))[np.ix_(at, at)]
        return found

    def spread(self, iterations: Sequence[int]) -> float:
        """Mean squared distance from their mean."""
        return float(self.squares(iterations).mean() / 2)

    def size(self, iteration: int) -> float:
        """Length of the weights."""
        return float(self._total["norms"][self.iterations.index(iteration)])


def centred(squares: np.ndarray) -> np.ndarray:
    """[N, N] inner products around the mean, from squared distances."""
    n = len(squares)
    centre = np.eye(n) - 1 / n
    found: np.ndarray = -centre @ squares @ centre / 2
    return found


def first_share(products: np.ndarray, combinations: np.ndarray) -> float:
    """Share of the squared deviations of some averages along their first principal direction.

    Args:
        products: [N, N] inner products of checkpoints around any point.
        combinations: [K, N] coefficients of the averages; each row sums to 1.
    """
    around = combinations - combinations.mean(axis=0)
    values = np.linalg.eigvalsh(around @ products @ around.T)
    return float(values[-1] / values.sum())
