"""Merges written to disk as `pma merge` writes them, read back and scored."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

import pma_megatron
from lab.kept import Kept
from lab.runs import BATCHES
from lab.trainer import LabTrainer
from pma_megatron.grid import Grid
from pma_megatron.megatron.score import score_merges
from pma_megatron.policy import Policy
from pma_megatron.request import MergeRequest, Method
from pma_megatron.selection import SelectionRequest


@dataclass(frozen=True, kw_only=True)
class Written(Kept):
    """One merge of one run on one rank.

    Attributes:
        iterations: which.
        method: how they are weighted; `custom` with `coefficients`.
        coefficients: oldest first.
        average: `main-params` or `weights`.
    """

    kind = "written"
    iterations: tuple[int, ...]
    method: str = "sma"
    coefficients: tuple[float, ...] | None = None
    average: str = "main-params"

    def measure(self) -> dict[str, float]:
        """Merge, load, score, and remove the merge."""
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
        if dist.get_rank() == 0:
            torch.save(weights, self.file.with_suffix(".pt"))
            shutil.rmtree(folder)
        return dict(scores.points[0].losses)

    def weights(self) -> dict[str, torch.Tensor]:
        """What the forward pass used, by name; of a run on one rank."""
        found: dict[str, torch.Tensor] = torch.load(self.file.with_suffix(".pt"))
        return found


def distance(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Euclidean distance of two sets of weights, relative to the first."""
    apart = math.fsum(float((one[n].double() - other[n].double()).pow(2).sum()) for n in one)
    size = math.fsum(float(value.double().pow(2).sum()) for value in one.values())
    return math.sqrt(apart / size)
