"""The runs of breaking.py as jobs: each seed's healthy part once, then every event and strategy."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab import breaking
from lab.text import cache
from pma_megatron.base.durable import write_small


@dataclass(frozen=True, kw_only=True)
class Healthy:
    """The healthy part of one seed, which all strategies share."""

    seed: int
    ranks = 1
    own_process = True
    after = ()

    @property
    def folder(self) -> Path:
        """Its checkpoints and what was seen, and the results of its strategies."""
        return cache() / "runs" / f"collapse-{self.seed}"

    @property
    def is_done(self) -> bool:
        """Whether it has been trained."""
        return (self.folder / "begun.json").exists()

    def perform(self, rank: int) -> None:
        """Train it."""
        begun = breaking.prefix(self.seed, self.folder / "checkpoints")
        write_small(self.folder / "begun.json", json.dumps(begun).encode())

    def __str__(self) -> str:
        return f"before a collapse, seed {self.seed}"


@dataclass(frozen=True, kw_only=True)
class Collapse:
    """One seed, event and strategy."""

    seed: int
    event: str
    strategy: str
    ranks = 1
    own_process = False

    @property
    def after(self) -> tuple[Healthy, ...]:
        """What must be done first."""
        return (Healthy(seed=self.seed),)

    @property
    def file(self) -> Path:
        """Where the result is kept."""
        name = f"{self.event}-{self.strategy}.json".replace(" ", "_").replace(",", "")
        return Healthy(seed=self.seed).folder / name

    @property
    def is_done(self) -> bool:
        """Whether it has been run."""
        return self.file.exists()

    def perform(self, rank: int) -> None:
        """From iteration 200 to the end, on a copy of the healthy checkpoints: it logs there."""
        healthy, root = Healthy(seed=self.seed).folder, self.file.with_suffix(".run")
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(healthy / "checkpoints", root)
        begun = json.loads((healthy / "begun.json").read_text())
        result = breaking.strategy(self.seed, self.event, self.strategy, root, begun)
        shutil.rmtree(root)
        write_small(self.file, json.dumps(asdict(result)).encode())

    def result(self) -> dict[str, Any]:
        """Fields of `Result`."""
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def __str__(self) -> str:
        return f"{self.event}, {self.strategy}, seed {self.seed}"
