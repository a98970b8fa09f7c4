"""Held-out losses of many averages of one run, by the package's own `score_merges`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lab.kept import Kept
from lab.runs import BATCHES
from lab.trainer import LabTrainer
from pma_megatron.grid import UNMERGED, Grid, parse_method
from pma_megatron.megatron.score import score_merges


@dataclass(frozen=True, kw_only=True)
class Merges(Kept):
    """Averages of one run: methods x counts x intervals x ends, and every end unmerged.

    Attributes:
        methods: as typed for `pma evaluate`: `sma`, `wma`, `ema:0.2`, `1-sqrt`.
        lasts: how many.
        every: iterations between them.
        ends: iterations of the newest.
    """

    kind = "merges"
    methods: tuple[str, ...] = ("sma",)
    lasts: tuple[int, ...]
    every: tuple[int, ...]
    ends: tuple[int, ...]

    def measure(self) -> list[dict[str, Any]]:
        """Fields of `pma_megatron.scores.Score`, of every point, by one live model."""
        trainer = LabTrainer(self.run.config)
        grid = Grid(
            methods=tuple(map(parse_method, self.methods)), lasts=self.lasts,
            intervals_iterations=self.every, ends=self.ends, tolerance=0.0,
        )  # fmt: skip
        try:
            scores = score_merges(
                trainer.models, str(self.run.root), grid, lambda: trainer.losses(BATCHES), threads=1
            )
        finally:
            trainer.close()
        return [asdict(point) | {"losses": dict(point.losses)} for point in scores.points]

    def losses(self, end: int, method: str = "sma", last: int | None = None,
               every: int | None = None) -> dict[str, float]:  # fmt: skip
        """Losses of one point.

        Raises:
            KeyError: it was not scored, or the run has too few checkpoints for it.
        """
        for point in self.result():
            same = point["end_iteration"] == end and point["method"] == method
            if same and (method == UNMERGED or (
                last in (None, point["last"]) and every in (None, point["interval_iterations"])
            )):  # fmt: skip
                losses: dict[str, float] = point["losses"]
                return losses
        raise KeyError(f"{self}: no {method} of {last}, every {every}, at {end}")
