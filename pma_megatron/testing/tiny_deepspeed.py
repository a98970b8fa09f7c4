"""A tiny real DeepSpeed run on the CPU: an engine with ZeRO, a schedule, checkpoints.

Everything is DeepSpeed's own; only the model and the loop are here. Nothing is compiled: torch's
AdamW is the optimizer, and the shared-memory operator of DeepSpeed's CPU communication is off.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

_BATCH = 4
_WIDTH = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepSpeedConfig:
    """One kind of run.

    Attributes:
        stage: of ZeRO.
        bf16: 16-bit weights.
        float32_gradients: accumulate them in float32; with ZeRO-1 this selects `BF16_Optimizer`.
        zero: further settings of `zero_optimization`.
        experts: of an MoE layer; 0 for a dense model.
        expert_parallel_size: ranks that share one set of them.
    """

    stage: int = 1
    bf16: bool = True
    float32_gradients: bool = False
    zero: Mapping[str, Any] = field(default_factory=dict)
    experts: int = 0
    expert_parallel_size: int = 1

    def to_json(self, ranks: int) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        config: dict[str, Any] = {
            "train_batch_size": _BATCH * ranks,
            "zero_optimization": {"stage": self.stage, **self.zero},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}},
        }
        if self.bf16:
            config["bf16"] = {"enabled": True}
        if self.float32_gradients:
            config["data_types"] = {"grad_accum_dtype": "fp32"}
        return config


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
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("LOCAL_RANK", str(dist.get_rank()))
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
        self.deepspeed: Any = importlib.import_module("deepspeed")
        torch.manual_seed(seed)
        self.config = config
        model = self._model()
        self.engine, _, _, self.scheduler = self.deepspeed.initialize(
            model=model,
            config=config.to_json(dist.get_world_size()),
            model_parameters=_param_groups(model, config),
        )
        self._dtype = torch.bfloat16 if config.bf16 else torch.float32

    def _model(self) -> nn.Module:
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
            draw = torch.Generator().manual_seed(1000 * self.engine.global_steps + dist.get_rank())
            loss = self.engine(torch.randn(_BATCH, _WIDTH, generator=draw).to(self._dtype))
            self.engine.backward(loss)
            self.engine.step()
            losses.append(float(loss.detach()))
        return losses

    def save(self, root: str | Path) -> None:
        """Save a tag below `root`, with a client state that says which."""
        state = {"note": f"saved after {self.engine.global_steps}"}
        self.engine.save_checkpoint(str(root), client_state=state)

    def load(self, root: str | Path) -> dict[str, Any]:
        """Resume from `root`, as any script does; returns the client state."""
        path, client_state = self.engine.load_checkpoint(str(root))
        assert path is not None, f"DeepSpeed loaded nothing from {root}"
        return dict(client_state)

    def stop_learning(self) -> None:
        """Set every learning rate to zero for the next iteration."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = 0.0

    def snapshot(self) -> dict[str, Any]:
        """What the run holds: whole main params, weights and buffers by name, and where it stands.

        Main params come from DeepSpeed's own `safe_get_full_fp32_param`.
        """
        masters, weights = {}, {}
        full = self.deepspeed.utils.safe_get_full_fp32_param
        for name, parameter in self.engine.module.named_parameters():
            if parameter.requires_grad:
                masters[name] = full(parameter).detach().clone()
            with self.deepspeed.zero.GatheredParameters([parameter]):
                weights[name] = parameter.detach().clone()
        return {
            "masters": masters,
            "weights": weights,
            "buffers": {n: b.detach().clone() for n, b in self.engine.module.named_buffers()},
            "iteration": self.engine.global_steps,
            "samples": self.engine.global_samples,
            "scheduler": dict(self.scheduler.state_dict()),
        }

    def close(self) -> None:
        """Free what the engine holds."""
        self.engine.destroy()


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
