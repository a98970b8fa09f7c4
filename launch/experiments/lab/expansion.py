"""The second-order expansion of the loss around a merge (eq. 15), by `pma geometry`'s own code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from lab.kept import Kept
from lab.runs import BATCHES
from lab.trainer import LabTrainer
from pma_megatron.gram import measure
from pma_megatron.megatron.contour import contour
from pma_megatron.megatron.curvature import Differentiable, curvature
from pma_megatron.request import MergeRequest
from pma_megatron.selection import SelectionRequest


@dataclass(frozen=True, kw_only=True)
class Expansion(Kept):
    """Distances, curvature and, if asked for, the contour of some checkpoints of a run.

    Attributes:
        iterations: of the members.
        grid: points of the contour along each side; 0 for none.
    """

    kind = "expansion"
    ranks = 1
    iterations: tuple[int, ...]
    grid: int = 0

    def measure(self) -> dict[str, Any]:
        """`curvature`, `spread`, `contour`: see the `to_json` of each. With float32 weights."""
        whole = replace(self.run.config, bf16=False, use_distributed_optimizer=False,
                        expert_model_parallel_size=1,
                        micro_batch_size=self.run.config.global_batch_size)  # fmt: skip
        trainer = LabTrainer(whole)
        measured = measure(MergeRequest(
            load=str(self.run.root), selection=SelectionRequest(iterations=self.iterations),
            threads=1,
        ))  # fmt: skip
        scored = Differentiable(
            models=trainer.models,
            score=lambda: trainer.losses(BATCHES)["validation"],
            batches=lambda: _losses(trainer),
        )
        try:
            found: dict[str, Any] = {
                "curvature": curvature(scored, measured).to_json(),
                "spread": {n: s.to_json() for n, s in measured.spreads().items()},
                "contour": None,
            }
            if self.grid:
                found["contour"] = contour(scored, measured, size=self.grid).to_json()
        finally:
            trainer.close()
        return found


def _losses(trainer: LabTrainer) -> Iterator[torch.Tensor]:
    yield from trainer.held_out_losses(BATCHES)
