"""Merges written to disk by `pma merge`, read back and scored by `pma evaluate`."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lab.command import scored_with
from lab.kept import Kept


@dataclass(frozen=True, kw_only=True)
class Written(Kept):
    """One merge of one run on one rank.

    Attributes:
        iterations: which.
        method: how they are weighted; unused with `coefficients`.
        coefficients: oldest first.
        average: `main-params` or `weights`.
    """

    kind = "merge"
    iterations: tuple[int, ...]
    method: str = "sma"
    coefficients: tuple[float, ...] | None = None
    average: str = "main-params"

    def commands(self, out: Path) -> Sequence[Sequence[str]]:
        """A merge, and a score of it as it is."""
        how = ["--method", self.method]
        if self.coefficients is not None:
            how = ["--coefficients", *map(str, self.coefficients)]
            if min(self.coefficients) < 0:
                how.append("--allow-any-coefficients")
        merge = [
            "merge",
            "--load",
            str(self.run.root),
            "--save",
            str(self._folder),
            "--overwrite",
            "--iterations",
            *map(str, self.iterations),
            *how,
            "--average",
            self.average,
            "--threads",
            "1",
        ]
        kept = ("--weights", str(self._weights))
        score = [
            "evaluate",
            "--load",
            str(self._folder),
            "--lasts",
            "1",
            *scored_with(self.run, out, *kept),
        ]
        return [merge, score]

    def perform(self, rank: int) -> None:
        """Merge, score, and remove the merge."""
        super().perform(rank)
        shutil.rmtree(self._folder)

    def losses(self) -> dict[str, float]:
        """Losses of the merge."""
        losses: dict[str, float] = self.result()["points"][0]["losses"]
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass used, by name."""
        found: dict[str, torch.Tensor] = torch.load(self._weights)
        return found

    @property
    def _folder(self) -> Path:
        return self.file.with_suffix(".merge")

    @property
    def _weights(self) -> Path:
        return self.file.with_suffix(".pt")


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights, relative to the first."""
    apart = math.fsum(float((one[n].double() - other[n].double()).pow(2).sum()) for n in one)
    size = math.fsum(float(value.double().pow(2).sum()) for value in one.values())
    return math.sqrt(apart / size)
