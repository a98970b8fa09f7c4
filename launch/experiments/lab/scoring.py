"""Held-out losses of many averages of one run, by `pma evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.command import scored_with
from lab.kept import Kept
from pma_megatron.scores.grid import UNMERGED


@dataclass(frozen=True, kw_only=True)
class Merges(Kept):
    """Averages of one run: methods x counts x intervals x ends, and every end unmerged.

    Attributes:
        methods: as typed for `pma evaluate`: `sma`, `wma`, `ema:0.2`, `1-sqrt`.
        lasts: how many.
        every: iterations between them.
        ends: iterations of the newest.
    """

    kind = "evaluate"
    methods: tuple[str, ...] = ("sma",)
    lasts: tuple[int, ...]
    every: tuple[int, ...]
    ends: tuple[int, ...]

    def commands(self, out: Path) -> Sequence[Sequence[str]]:
        """One for the whole grid, scored by one live model."""
        return [
            [
                "evaluate",
                "--load",
                str(self.run.root),
                "--methods",
                *self.methods,
                "--lasts",
                *map(str, self.lasts),
                "--intervals-iterations",
                *map(str, self.every),
                "--ends",
                *map(str, self.ends),
                "--tolerance",
                "0",
                *scored_with(self.run, out),
            ]
        ]

    def losses(
        self, end: int, method: str = "sma", last: int | None = None, every: int | None = None
    ) -> dict[str, float]:
        """Losses of one point.

        Raises:
            KeyError: it was not scored, or the run has too few checkpoints for it.
        """
        for point in self.result()["points"]:
            same = point["end_iteration"] == end and point["method"] == method
            if same and (
                method == UNMERGED
                or (last in (None, point["last"]) and every in (None, point["interval_iterations"]))
            ):
                losses: dict[str, float] = point["losses"]
                return losses
        raise KeyError(f"{self}: no {method} of {last}, every {every}, at {end}")
