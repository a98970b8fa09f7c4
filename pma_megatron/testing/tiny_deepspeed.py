"""A tiny real DeepSpeed run: an engine with ZeRO, a schedule, checkpoints.

Everything is DeepSpeed's own; only the model and the loop are here. Nothing is compiled: torch's
AdamW is the optimizer, and the shared-memory operator of DeepSpeed's CPU communication is off. It
runs on the CPU, or on a GPU (`cpu.DEVICE_ENV`).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

from pma_megatron.testing import cpu
from pma_megatron.testing.deepspeed_parallel import WIDTH, ModelParallel, batches, pipeline

_BATCH = 4
_WIDTH = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """One kind of run.

    Attributes:
        stage: of ZeRO.
        bf16: 16-bit weights.
        fp16: weights in the other 16-bit format, with a loss scale; `bf16` does not count then.
        fused: without ZeRO, the wrapper that DeepSpeed gives its fused Adam (`FP16_Optimizer`).
        float32_gradients: accumulate them in float32; with ZeRO-1 this selects `BF16_Optimizer`.
        zero: further settings of `zero_optimization`.
        experts: of an MoE layer; 0 for a dense model.
        expert_parallel_size: ranks that share one set of them.
        pipeline_stages: of a `PipelineModule`; 0 for a plain model.
        tied: the pipeline's first and last layer share their weights.
        model_parallel_size: ranks that hold different parts of the model, by an `mpu`.
        settings: further settings of DeepSpeed's.
    """

    stage: int = 1
    bf16: bool = True
    fp16: bool = False
    fused: bool = False
    float32_gradients: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 0
    expert_parallel_size: int = 1
    pipeline_stages: int = 0
    tied: bool = False
    model_parallel_size: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        if self.fp16:
            return torch.float16
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def data_parallel_size(self) -> int:
        """In this job."""
        return dist.get_world_size() // (self.model_parallel_size * max(self.pipeline_stages, 1))

    def to_json(self, ranks: int) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        config: dict[str, Any] = {
            "train_batch_size": _BATCH * ranks,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        }
        if self.fp16:
            config["fp16"] = {"enabled": True, "initial_scale_power": 8}
        elif self.bf16:
            config["bf16"] = {"enabled": True}
        if self.float32_gradients:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return {k: v for k, v in {**config, **self.settings}.items() if v is not None}


class TinyModel(nn.Module):
    """Odd sizes (so that partitions need padding), tied weights, buffers, a frozen parameter.

    `experts` is a layer of DeepSpeed's MoE, or None for a dense model.
    """

    mean: torch.Tensor
    calls: torch.Tensor

    def __init__(self, experts: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = experts
        self.first = nn.Linear(_WIDTH, 7)
        self.norm = nn.LayerNorm(7)
        self.last = nn.Linear(7, 7, bias=False)
        self.tied = nn.Linear(7, 7)
        self.tied.weight = self.last.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(7))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(self.first(x))
        if self.experts is not None:
            hidden = hidden + self.experts(hidden)[0]
        self.mean.mul_(0.9).add_(hidden.detach().mean(0), alpha=0.1)
        self.calls.add_(1)
        return self.tied(torch.relu(self.last(hidden))).float().pow(2).mean()


class TinyDeepSpeed:
    """One rank of a run; every method is called by all ranks together.

    Needs an initialised process group. Runs of several configurations may follow each other in one
    process. `seed` decides the initial weights.
    """

    def __init__(self, config: DeepSpeedConfig, seed: int = 0) -> None:
        os.environ["DS_ACCELERATOR"] = cpu.device().type
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        self.deepspeed: Any = importlib.import_module("deepspeed")
        self.config = config
        mpu = ModelParallel(config.model_parallel_size) if config.model_parallel_size > 1 else None
        torch.manual_seed(seed if mpu is None else 2 * seed + mpu.get_model_parallel_rank())
        model = self._model()
        engine = importlib.import_module("deepspeed.runtime.engine")
        if config.fp16:  # asked for instructions of the processor; torch computes it without them
            engine.get_accelerator().is_fp16_supported = lambda: True
        # DeepSpeed chooses FP16_Optimizer by the type of its fused Adam, which needs a compiler.
        found = torch.optim.AdamW if config.fused else engine.FusedAdam
        with mock.patch.object(engine, "FusedAdam", found):
            self.engine, _, _, self.scheduler = self.deepspeed.initialize(
                model=model,
                config=config.to_json(config.data_parallel_size),
                model_parameters=_param_groups(model, config),
                mpu=mpu,
            )

    def _model(self) -> nn.Module:
        if self.config.pipeline_stages:
            self.deepspeed.init_distributed("gloo")
            return pipeline(self.config.pipeline_stages, tied=self.config.tied)
        return TinyModel(self._experts(self.config) if self.config.experts else None)

    def _experts(self, config: DeepSpeedConfig) -> nn.Module:
        layer = importlib.import_module("deepspeed.moe.layer").MoE
        moe: nn.Module = layer(
            7, nn.Linear(7, 7), config.experts, config.expert_parallel_size, k=1, min_capacity=4
        )
        return moe

    def train(self, iterations: int) -> list[float]:
        """Train on; data depends on the iteration and the rank alone. Returns the losses."""
        losses = []
        for _ in range(iterations):
            seed = 1000 * self.engine.global_steps + self._data_rank()
            draw = torch.Generator().manual_seed(seed)
            if self.config.pipeline_stages:
                x = self._placed(torch.randn(_BATCH, WIDTH, generator=draw))
                losses.append(float(self.engine.train_batch(batches(x))))
                continue
            loss = self.engine(self._placed(torch.randn(_BATCH, _WIDTH, generator=draw)))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(float(loss.detach()))
        return losses

    def _placed(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(cpu.device(), self.config.dtype)

    def save(self, root: str | Path) -> None:
        """Save a tag below `root`, with a client state that says which."""
        state = {"note": f"saved after {self.engine.global_steps}"}
        self.engine.save_checkpoint(str(root), client_state=state)

    def load(self, root: str | Path, tag: str | None = None) -> dict[str, Any]:
        """Resume from `root`, as any script does; returns the client state."""
        path, client_state = self.engine.load_checkpoint(str(root), tag=tag)
        assert path is not None, f"DeepSpeed loaded nothing from {root}, tag {tag}"
        return dict(client_state)

    def stop_learning(self) -> None:
        """Set every learning rate to zero for the next iteration."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0

    def snapshot(self) -> dict[str, Any]:
        """What the run holds: whole main params, weights and buffers by name, and where it stands.

        A rank of a pipeline, or one of several model-parallel ranks, holds its own part.
        """
        weights = {}
        for name, parameter in self.engine.module.named_parameters():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        return {
            "masters": self._masters(),
            "weights": weights,
            "buffers": {n: b.detach().clone() for n, b in self.engine.module.named_buffers()},
            "data_rank": self._data_rank(),
            "iteration": self.engine.global_steps,
            "samples": self.engine.global_samples,
            "scheduler": dict(self.scheduler.state_dict()),
        }

    def _data_rank(self) -> int:
        return dist.get_rank(self.engine.seq_data_parallel_group)

    def _masters(self) -> dict[str, torch.Tensor]:
        """Main params, from DeepSpeed's own `safe_get_full_fp32_param` where there is ZeRO."""
        trained = [(n, p) for n, p in self.engine.module.named_parameters() if p.requires_grad]
        optimizer = self.engine.optimizer
        if hasattr(optimizer, "fp32_groups_flat"):  # FP16_Optimizer
            flat = zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True)
            by_id = {
                id(parameter): main.view(parameter.shape)
                for group, buffer in flat
                for parameter, main in zip(
                    group, buffer.split([p.numel() for p in group]), strict=True
                )
            }
        elif hasattr(optimizer, "fp32_groups"):  # FP16_UnfusedOptimizer
            groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
            by_id = {id(p): main for g, m in groups for p, main in zip(g, m, strict=True)}
        elif isinstance(optimizer, torch.optim.Optimizer):
            by_id = {id(parameter): parameter for _, parameter in trained}
        else:
            full = self.deepspeed.utils.safe_get_full_fp32_param
            by_id = {id(parameter): full(parameter) for _, parameter in trained}
        return {name: by_id[id(parameter)].detach().clone() for name, parameter in trained}

    def close(self) -> None:
        """Free what the engine holds, and the `mpu`, which the next run would inherit."""
        self.engine.destroy()
        self.deepspeed.utils.groups.mpu = None


def _param_groups(model: nn.Module, config: DeepSpeedConfig) -> list[dict[str, Any]]:
    trained = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trained if p.ndim > 1], "name": "matrices"},
        {"params": [p for p in trained if p.ndim == 1], "name": "vectors", "weight_decay": 0.0},
    ]
    if config.experts:
        split = importlib.import_module("deepspeed.moe.utils")
        groups = split.split_params_into_different_moe_groups_for_optimizer(groups)
    return groups
