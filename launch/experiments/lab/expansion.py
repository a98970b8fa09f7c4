"""The second-order expansion of the loss around a merge (eq. 15), by `pma geometry`'s own code."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lab.runs import BATCHES, Run
from lab.trainer import LabTrainer
from pma_megatron.durable import write_small
from pma_megatron.gram import measure
from pma_megatron.megatron.contour import contour
from pma_megatron.megatron.curvature import Differentiable, curvature
from pma_megatron.request import MergeRequest
from pma_megatron.selection import SelectionRequest


@dataclass(frozen=True, kw_only=True)
class Expansion:
    """Distances, curvature and, if asked for, the contour of some checkpoints of a run.

    Attributes:
        run: whose.
        iterations: of the members.
        grid: points of the contour along each side; 0 for none.
    """

    run: Run
    iterations: tuple[int, ...]
    grid: int = 0
    ranks = 1
    own_process = False

    @property
    def after(self) -> tuple[Run, ...]:
        """What must be done first."""
        return (self.run,)

    @cached_property
    def file(self) -> Path:
        """Where the result is kept."""
        said = json.dumps([asdict(self) | {"run": ""}, BATCHES], sort_keys=True)
        return self.run.folder / f"expansion-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"

    @property
    def is_done(self) -> bool:
        """Whether it has been measured."""
        return self.file.exists()

    def perform(self, rank: int) -> None:
        """Measure, with float32 weights, in one process."""
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
        write_small(self.file, json.dumps(found).encode())

    def result(self) -> dict[str, Any]:
        """`curvature`, `spread`, `contour`: see the `to_json` of each."""
        found: dict[str, Any] = json.loads(self.file.read_text())
        return found

    def __str__(self) -> str:
        return f"expansion of {self.run}"


def _losses(trainer: LabTrainer) -> Iterator[torch.Tensor]:
    yield from trainer.held_out_losses(BATCHES)
