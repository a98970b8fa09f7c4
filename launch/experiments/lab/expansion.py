"""The second-order expansion of the loss around a merge (eq. 15), by `pma geometry`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.command import scored_with
from lab.kept import Kept


@dataclass(frozen=True, kw_only=True)
class Expansion(Kept):
    """Distances, curvature and, if asked for, the contour of some checkpoints of a run.

    Attributes:
        iterations: of the members.
        grid: points of the contour along each side; 0 for none.
    """

    kind = "geometry"
    ranks = 1
    iterations: tuple[int, ...]
    grid: int = 0

    def commands(self, out: Path) -> Sequence[Sequence[str]]:
        """One, with float32 weights."""
        return [
            [
                "geometry",
                "--load",
                str(self.run.root),
                "--iterations",
                *map(str, self.iterations),
                "--curvature",
                *(["--contour", "--grid", str(self.grid)] if self.grid else []),
                *scored_with(self.run, out, "--float32"),
            ]
        ]
