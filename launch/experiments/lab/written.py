"""Merges written to disk as `pma merge` writes them, read back and scored."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch

import pma_megatron
from lab.runs import BATCHES, Run
from lab.trainer import LabTrainer
from pma_megatron.durable import write_small
from pma_megatron.grid import Grid
from pma_megatron.megatron.score import score_merges
from pma_megatron.policy import Policy
from pma_megatron.request import MergeRequest, Method
from pma_megatron.selection import SelectionRequest


@dataclass(frozen=True, kw_only=True)
class Written:
    """One merge of one run on one rank.

    Attributes:
        run: whose checkpoints.
        iterations: which.
        method: how they are weighted; `custom` with `coefficients`.
        coefficients: oldest first.
        average: `main-params` or `weights`.
    """

    run: Run
    iterations: tuple[int, ...]
    method: str = "sma"
    coefficients: tuple[float, ...] | None = None
    average: str = "main-params"

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
        """Only reads through Megatron."""
        return False

    @cached_property
    def file(self) -> Path:
        """Where the losses are kept."""
        said = json.dumps([asdict(self) | {"run": ""}, BATCHES], sort_keys=True)
        return self.run.folder / f"written-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"

    @property
    def is_done(self) -> bool:
        """Whether it has been scored."""
        return self.file.exists()

    def perform(self, rank: int) -> None:
        """Merge, load, score, and remove the merge. Every rank makes this call."""
        folder = self.file.with_suffix(".merge")
        values = self.coefficients
        pma_megatron.merge(MergeRequest(
            load=str(self.run.root), save=str(folder), overwrite=True, threads=1,
            selection=SelectionRequest(iterations=self.iterations),
            method=Method(name=self.method, values=values),
            policy=Policy(average=self.average),
        ))  # fmt: skip
        trainer, weights = LabTrainer(self.run.config), {}

        def score() -> dict[str, float]:
            weights.update({n: w.clone() for n, w in trainer.model_params().items()})
            return trainer.losses(BATCHES)

        try:
            scores = score_merges(trainer.models, str(folder), Grid(lasts=(1,)), score)
        finally:
            trainer.close()
        if rank == 0:
            torch.save(weights, self.file.with_suffix(".pt"))
            write_small(self.file, json.dumps(dict(scores.points[0].losses)).encode())
            shutil.rmtree(folder)

    def losses(self) -> dict[str, float]:
        """Held-out losses of the merge."""
        losses: dict[str, float] = json.loads(self.file.read_text())
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass used, by name; of a run on one rank."""
        found: dict[str, torch.Tensor] = torch.load(self.file.with_suffix(".pt"))
        return found

    def __str__(self) -> str:
        return f"{self.method} of {self.run}, written"


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights, relative to the first."""
    apart = math.fsum(float((one[n].double() - other[n].double()).pow(2).sum()) for n in one)
    size = math.fsum(float(value.double().pow(2).sum()) for value in one.values())
    return math.sqrt(apart / size)
