"""Healthy runs in which the files go on unlike each other: none is refused as of two runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from conftest import DENSE, request_for
from pma_megatron import merge
from pma_megatron.testing import TinyTrainer, run_ranks

BEFORE, AFTER = 100, 60


def forget_moments(trainer: TinyTrainer) -> None:
    """As a resume with --no-load-optim does, and a merge with --optimizer-state reset."""
    for optimizer in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in optimizer.optimizer.param_groups:
            if "step" in group:
                group["step"] = 0
        for state in optimizer.optimizer.state.values():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    value.zero_()


def train(rank: int, world_size: int, root: str) -> None:
    """The rows of rare tokens are in the files of one stage, and have few gradients."""
    trainer = TinyTrainer(replace(DENSE, pipeline_model_parallel_size=2))
    trainer.train(BEFORE)
    trainer.save(root)
    forget_moments(trainer)
    trainer.train(AFTER)
    trainer.save(root)
    trainer.close()


def test_moments_that_began_again(tmp_path: Path) -> None:
    run_ranks(train, 2, str(tmp_path / "run"))
    merge(request_for(tmp_path / "run", tmp_path / "merged"))
