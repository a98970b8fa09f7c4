"""A provider for `pma evaluate`: the tiny run that a checkpoint is of, scored on held-out text.

    torchrun --nproc-per-node 2 -m pma_megatron evaluate --load RUN \\
        --provider pma_megatron.testing.provider:tiny --lasts 3 6 --ends all -- --batches 8
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pma_megatron.formats import registry
from pma_megatron.megatron.curvature import Differentiable
from pma_megatron.megatron.score import Scored
from pma_megatron.runs.discover import choose, list_checkpoints
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.testing.config import TinyConfig

_SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


def tiny(load: str, provider_args: Sequence[str]) -> Scored:
    """The `TinyTrainer` of the newest checkpoint below `load`, as its saved arguments describe it.

    Parallel sizes are those of `provider_args` (`--tensor-model-parallel-size` and so on), else the
    checkpoint's, or 1 each where the ranks of this job do not divide into those. With `--float32`
    its weights are not rounded, and gradients of the loss can be taken (`pma geometry`).
    """
    from pma_megatron.testing.tiny import TinyTrainer

    given = _parse(provider_args)
    leave = group_of_one()
    trainer = TinyTrainer(_config(_saved_args(load), given))

    def close() -> None:
        trainer.close()
        leave()

    def score() -> float:
        return trainer.evaluate(given.batches)

    if not given.float32:
        return Scored(models=trainer.models, score=score, close=close)
    return Differentiable(
        models=trainer.models,
        score=score,
        close=close,
        batches=lambda: trainer.held_out_losses(given.batches),
    )


def group_of_one() -> Callable[[], None]:
    """Make a process group of this process alone, if it is in none; returns what ends it."""
    if dist.is_initialized():
        return lambda: None
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return dist.destroy_process_group


def _parse(provider_args: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pma_megatron.testing.provider:tiny")
    parser.add_argument("--batches", type=int, default=4, help="held-out global batches per score")
    parser.add_argument("--float32", action="store_true", help="float32 weights")
    for name in _SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help="default: as saved")
    return parser.parse_args(provider_args)


def _saved_args(load: str) -> Mapping[str, Any]:
    any_will_do = SelectionRequest(last=1, allow_gaps=True)
    newest = choose(list_checkpoints(load), any_will_do, load).refs[-1]
    common = registry.get(newest.format, newest.path).common(Path(newest.path))
    return dict(common["args"])


def _config(saved: Mapping[str, Any], given: argparse.Namespace) -> TinyConfig:
    sizes = {name: getattr(given, name) or saved[name] for name in _SIZES}
    world = dist.get_world_size()
    dense = sizes["tensor_model_parallel_size"] * sizes["pipeline_model_parallel_size"]
    experts = sizes["pipeline_model_parallel_size"] * sizes["expert_model_parallel_size"]
    if world % dense or world % experts:
        sizes, dense = dict.fromkeys(_SIZES, 1), 1
    values = {each.name: saved[each.name] for each in fields(TinyConfig) if each.name in saved}
    values |= {**sizes, "virtual_pipeline_model_parallel_size": None}
    values["use_distributed_optimizer"] = False  # nothing is trained
    values["bf16"] = values["bf16"] and not given.float32
    per_rank = values["global_batch_size"] // (world // dense)
    values["micro_batch_size"] = min(values["micro_batch_size"], per_rank)
    return TinyConfig(
        **values,
        vocab_size=saved["padded_vocab_size"],
        expert_bias=bool(saved["moe_router_enable_expert_bias"]),
    )
