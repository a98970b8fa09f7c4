"""Tiny DeepSpeed models that are split: over pipeline stages, or over model-parallel ranks."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

WIDTH = 6


class Stage(nn.Module):
    """One layer of a pipeline, with a buffer and a frozen parameter."""

    mean: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(self.norm(x))
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        return hidden


class Last(nn.Linear):
    """A layer that is tied to the first."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)


def pipeline(stages: int, *, tied: bool) -> nn.Module:
    """Four layers over `stages`; the first and the last share their weights if `tied`."""
    pipe = importlib.import_module("deepspeed.pipe")
    ends = [pipe.TiedLayerSpec("ends", Last) if tied else pipe.LayerSpec(Last) for _ in range(2)]
    layers = [ends[0], pipe.LayerSpec(Stage), torch.relu, pipe.LayerSpec(Stage), ends[1]]
    module: nn.Module = pipe.PipelineModule(
        layers=layers,
        num_stages=stages,
        loss_fn=lambda y, _: y.float().pow(2).mean(),
        partition_method="uniform",
    )
    return module


def batches(x: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What a pipeline is fed with."""
    while True:
        yield x, x


class ModelParallel:
    """The `mpu` of Megatron: neighbouring ranks hold different parts of the model.

    Every rank makes the groups; `size` divides the world.
    """

    def __init__(self, size: int) -> None:
        world, rank = dist.get_world_size(), dist.get_rank()
        self._model_rank, self._data_rank = rank % size, rank // size
        self._sizes = size, world // size
        rows = [list(range(first, first + size)) for first in range(0, world, size)]
        columns = [list(range(first, world, size)) for first in range(size)]
        self._model_group = [dist.new_group(ranks) for ranks in rows][self._data_rank]
        self._data_group = [dist.new_group(ranks) for ranks in columns][self._model_rank]

    def get_model_parallel_rank(self) -> int:
        return self._model_rank

    def get_model_parallel_world_size(self) -> int:
        return self._sizes[0]

    def get_model_parallel_group(self) -> Any:
        return self._model_group

    def get_data_parallel_rank(self) -> int:
        return self._data_rank

    def get_data_parallel_world_size(self) -> int:
        return self._sizes[1]

    def get_data_parallel_group(self) -> Any:
        return self._data_group
