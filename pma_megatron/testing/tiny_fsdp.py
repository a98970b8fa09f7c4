"""A tiny real FSDP2 run on the CPU: `fully_shard`, an optimizer, checkpoints of torch's own DCP.

Checkpoints are written as trainers write them: `STYLES` says whose. Nothing of this package's
formats is used here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh

from pma_megatron.testing import cpu

_VOCABULARY, _WIDTH = 11, 6
TORCHTITAN, ACCELERATE, STATE_DICT, NUMBERED = "torchtitan", "accelerate", "state_dict", "numbered"
STYLES = (TORCHTITAN, ACCELERATE, STATE_DICT, NUMBERED)
"""torchtitan's flat dictionary; Accelerate's two folders; `{"model": ..., "optimizer": ...}` of
`get_state_dict`; the same with `optimizer.state_dict()`, whose parameters are numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FsdpConfig:
    """One kind of run.

    Attributes:
        style: as whom it saves, see `STYLES`.
        bf16: 16-bit parameters, which nothing keeps in float32; else float32 ones, computed with in
            bfloat16.
        reshard: as `fully_shard` has it.
    """

    style: str = STATE_DICT
    bf16: bool = False
    reshard: bool = True


class TinyModel(nn.Module):
    """Sizes that no number of ranks divides, tied weights, buffers, a frozen parameter."""

    mean: torch.Tensor
    calls: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, _WIDTH)
        self.layers = nn.ModuleList([nn.Linear(_WIDTH, _WIDTH) for _ in range(2)])
        self.norm = nn.LayerNorm(_WIDTH)
        self.output = nn.Linear(_WIDTH, _VOCABULARY, bias=False)
        self.output.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("mean", torch.zeros(_WIDTH))
        self.register_buffer("calls", torch.zeros(1, dtype=torch.int64))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        for layer in self.layers:
            hidden = torch.relu(layer(hidden))
        self.mean.mul_(0.9).add_(1.0)  # alike on every rank: one of them saves it
        self.calls.add_(1)
        scores = self.output(self.norm(hidden)).float()
        return nn.functional.cross_entropy(scores, (tokens + 1) % _VOCABULARY)


class TinyFsdp:
    """One rank of a run; every method is called by all ranks together.

    Needs an initialised process group. `seed` decides the initial weights.
    """

    def __init__(self, config: FsdpConfig, seed: int = 0) -> None:
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        self.config = config
        torch.manual_seed(seed)
        mesh = init_device_mesh(cpu.device().type, (dist.get_world_size(),))
        model = TinyModel().to(cpu.device(), torch.bfloat16 if config.bf16 else torch.float32)
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
        for layer in (*model.layers, model):
            fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=config.reshard)
        self.model = model
        trained = [p for p in model.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trained if p.ndim > 1]},
            {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: min(1.0, (step + 1) / 4)
        )
        self.iteration = 0

    def train(self, iterations: int) -> list[float]:
        """Train on; data depends on the iteration and the rank alone. Returns the losses."""
        losses = []
        for _ in range(iterations):
            draw = torch.Generator().manual_seed(1000 * self.iteration + dist.get_rank())
            tokens = torch.randint(0, _VOCABULARY, (8,), generator=draw).to(cpu.device())
            loss = self.model(tokens)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.iteration += 1
            losses.append(float(loss.detach()))
        return losses

    def stop_learning(self) -> None:
        """Set every learning rate to zero for the next iteration."""
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    # Checkpoints.

    def save(self, root: str | Path) -> Path:
        """Save a checkpoint below `root`, under the name that its trainer would give it."""
        folder = Path(root) / self.folder_name
        for below, state in self._state().items():
            dcp.save(state, checkpoint_id=str(folder / below))
        return folder

    @property
    def folder_name(self) -> str:
        """Of a checkpoint of now."""
        names = {TORCHTITAN: "step-", ACCELERATE: "checkpoint-"}
        return f"{names.get(self.config.style, 'step_')}{self.iteration}"

    def load(self, folder: str | Path) -> None:
        """Load one checkpoint by torch's own `dcp.load`, as its trainer would.

        As on another number of ranks (torchtitan's `--checkpoint.exclude_from_loading dataloader`).
        """
        for below, state in self._state().items():
            state.pop("dataloader", None)
            dcp.load(state, checkpoint_id=str(Path(folder) / below))
            self._put(state)

    def _state(self) -> dict[str, dict[str, Any]]:
        """Folder below the checkpoint -> what is saved there."""
        flat = StateDictOptions(flatten_optimizer_state_dict=True)
        model, style = get_model_state_dict(self.model), self.config.style
        if style == TORCHTITAN:
            optimizer: Any = get_optimizer_state_dict(self.model, self.optimizer, options=flat)
            stands = {"step": self.iteration, "ntokens_seen": 8 * self.iteration}
            schedule = dict(self.scheduler.state_dict())
            own = {f"dp_rank_{dist.get_rank()}": b"position of a data loader"}
            others = {"train_state": stands, "lr_scheduler": schedule, "dataloader": own}
            return {"": {**model, "optimizer": optimizer, **others}}
        if style == NUMBERED:
            return {"": {"model": model, "optimizer": self.optimizer.state_dict()}}
        optimizer = get_optimizer_state_dict(self.model, self.optimizer)
        if style == ACCELERATE:
            return {
                "pytorch_model_fsdp_0": {"model": model},
                "optimizer_0": {"optimizer": optimizer},
            }
        return {"": {"model": model, "optimizer": optimizer, "note": "by hand"}}

    def _put(self, state: Mapping[str, Any]) -> None:
        style = self.config.style
        if style == TORCHTITAN:
            names = set(get_model_state_dict(self.model))
            set_model_state_dict(self.model, {n: v for n, v in state.items() if n in names})
            self.scheduler.load_state_dict(dict(state["lr_scheduler"]))
            self.iteration = state["train_state"]["step"]
        elif "model" in state:
            set_model_state_dict(self.model, state["model"])
        if "optimizer" in state and style == NUMBERED:
            self.optimizer.load_state_dict(state["optimizer"])
        elif "optimizer" in state:
            flat = StateDictOptions(flatten_optimizer_state_dict=style == TORCHTITAN)
            set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=flat)

    # What it holds.

    def snapshot(self) -> dict[str, dict[str, torch.Tensor]]:
        """`weight` (parameters and buffers), moments and `step`, whole, by the model's names."""
        named = get_model_state_dict(self.model)
        found = {"weight": {name: _whole(value) for name, value in named.items()}}
        states: Any = get_optimizer_state_dict(self.model, self.optimizer)["state"]
        for name, values in states.items():
            for state, value in values.items():
                found.setdefault(state, {})[name] = _whole(value)
        return found


def _whole(value: Any) -> torch.Tensor:
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return whole.detach().clone()
