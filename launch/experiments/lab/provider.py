"""A provider for `pma evaluate` and `pma geometry`: a run of the laboratory, on held-out text.

    PYTHONPATH=launch/experiments torchrun --nproc-per-node 1 -m pma_megatron evaluate \\
        --load RUN/checkpoints --lasts 3 6 --provider lab.provider:build -- --run RUN
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from lab.runs import BATCHES
from lab.trainer import LabTrainer
from pma_megatron.megatron.curvature import Differentiable
from pma_megatron.megatron.score import Scored
from pma_megatron.testing import TinyConfig
from pma_megatron.testing.provider import group_of_one


def build(_load: str, words: Sequence[str]) -> Scored:
    """The model of a run, and its losses on every held-out part."""
    given = _parse(words)
    config = TinyConfig(**json.loads((given.run / "run.json").read_text())["config"])
    leave = group_of_one()
    if given.float32:
        config = replace(
            config,
            bf16=False,
            use_distributed_optimizer=False,
            expert_model_parallel_size=1,
            micro_batch_size=config.global_batch_size,
        )
    trainer = LabTrainer(config)

    def close() -> None:
        trainer.close()
        leave()

    def score() -> dict[str, float]:
        if given.weights is not None:
            torch.save(trainer.model_params(), given.weights)
        return trainer.losses(given.batches)

    if not given.float32:
        return Scored(models=trainer.models, score=score, close=close)
    return Differentiable(
        models=trainer.models,
        close=close,
        score=lambda: trainer.evaluate(given.batches),
        batches=lambda: trainer.held_out_losses(given.batches),
    )


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="lab.provider:build")
    parser.add_argument("--run", type=Path, required=True, help="the run's folder")
    parser.add_argument("--batches", type=int, default=BATCHES, help="global batches of each part")
    parser.add_argument("--float32", action="store_true", help="validation alone, with gradients")
    parser.add_argument("--weights", type=Path, help="keep the weights of the last score here")
    return parser.parse_args(words)
