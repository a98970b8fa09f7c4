"""Held-out losses of many averages of one run, by the package's own `score_merges`."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from lab.runs import BATCHES, Run
from lab.trainer import LabTrainer
from pma_megatron.durable import write_small
from pma_megatron.grid import UNMERGED, Grid, parse_method
from pma_megatron.megatron.score import score_merges


@dataclass(frozen=True, kw_only=True)
class Merges:
    """Averages of one run: methods x counts x intervals x ends, and every end unmerged.

    Attributes:
        run: whose checkpoints.
        methods: as typed for `pma evaluate`: `sma`, `wma`, `ema:0.2`, `1-sqrt`.
        lasts: how many.
        every: iterations between them.
        ends: iterations of the newest.
    """

    run: Run
    methods: tuple[str, ...] = ("sma",)
    lasts: tuple[int, ...]
    every: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.run.ranks

    @property
    def after(self) -> tuple[Run, ...]:
        """What must be done first."""
        return (self.run,)

    @property
    def own_process(self) -> bool:
        """Nothing is saved here."""
        return False

    @cached_property
    def file(self) -> Path:
        """Where the losses are kept."""
        said = json.dumps([asdict(self) | {"run": ""}, BATCHES], sort_keys=True)
        return self.run.folder / f"merges-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"

    @property
    def is_done(self) -> bool:
        """Whether they have been scored."""
        return self.file.exists()

    def perform(self, rank: int) -> None:
        """Score them all with one live model. Every rank makes this call."""
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
        if rank == 0:
            points = [asdict(point) | {"losses": dict(point.losses)} for point in scores.points]
            write_small(self.file, json.dumps(points).encode())

    def points(self) -> list[dict[str, Any]]:
        """The points that were scored: fields of `pma_megatron.scores.Score`."""
        found: list[dict[str, Any]] = json.loads(self.file.read_text())
        return found

    def losses(self, end: int, method: str = "sma", last: int | None = None,
               every: int | None = None) -> dict[str, float]:  # fmt: skip
        """Losses of one point.

        Raises:
            KeyError: it was not scored, or the run has too few checkpoints for it.
        """
        for point in self.points():
            same = point["end_iteration"] == end and point["method"] == method
            if same and (method == UNMERGED or (
                last in (None, point["last"]) and every in (None, point["interval_iterations"])
            )):  # fmt: skip
                losses: dict[str, float] = point["losses"]
                return losses
        raise KeyError(f"{self}: no {method} of {last}, every {every}, at {end}")

    def __str__(self) -> str:
        return f"merges of {self.run}"
