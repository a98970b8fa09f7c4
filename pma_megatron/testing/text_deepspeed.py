"""A small GPT trained on text by DeepSpeed: losses in nats per byte that mean something.

The text and the order of its samples are those of `TinyTrainer` (`testing.corpus`).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from pma_megatron.testing import cpu
from pma_megatron.testing.corpus import batch
from pma_megatron.testing.tiny_deepspeed import DeepSpeedConfig, TinyDeepSpeed

_BALANCE = 0.01  # of the experts' load-balancing loss, as in deepspeed's MoE tutorial
_HEAD_WIDTH = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class TextConfig(DeepSpeedConfig):
    """One run on text.

    Attributes:
        layers, width, vocab_size, seq_length: of the GPT.
        batch_size: samples per iteration, over all ranks.
        lr: after the warmup it stays.
        warmup_iterations: from zero, linear.
        seed: of the data.
    """

    layers: int = 2
    width: int = 32
    vocab_size: int = 256
    seq_length: int = 32
    batch_size: int = 16
    lr: float = 4e-3
    warmup_iterations: int = 20
    seed: int = 1234

    def to_json(self, ranks: int) -> dict[str, Any]:
        """DeepSpeed's own configuration."""
        steps = {
            "warmup_min_lr": 0,
            "warmup_max_lr": self.lr,
            "warmup_type": "linear",
            "warmup_num_steps": self.warmup_iterations,
        }
        return {
            **DeepSpeedConfig.to_json(self, ranks),
            "train_batch_size": self.batch_size,
            "train_micro_batch_size_per_gpu": self.batch_size // ranks,
            "gradient_clipping": 1.0,
            "steps_per_print": 1_000_000_000,
            "optimizer": {"type": "AdamW", "params": {"lr": self.lr, "torch_adam": True}},
            "scheduler": {"type": "WarmupLR", "params": steps},
        }


class TextModel(nn.Module):
    """A GPT: learned positions, pre-norm layers; `mlps` are the feed-forward halves of its layers.

    Called with tokens and next tokens `[batch, sequence]` int64; returns the mean cross-entropy in
    float32 nats, and the load-balancing loss of the experts.
    """

    def __init__(self, config: TextConfig, mlps: Sequence[nn.Module]) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.positions = nn.Embedding(config.seq_length, config.width)
        self.layers = nn.ModuleList(TextLayer(config.width, mlp) for mlp in mlps)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1 and "gate" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self, inputs: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(inputs.shape[1], device=inputs.device)
        hidden = self.tokens(inputs) + self.positions(places)
        balance = torch.zeros((), device=inputs.device)
        for layer in self.layers:
            hidden, own = layer(hidden)
            balance = balance + own
        logits = self.head(self.norm(hidden)).float()
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), balance


class TextLayer(nn.Module):
    """Causal attention and an MLP, or DeepSpeed's MoE, with residuals."""

    def __init__(self, width: int, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        size, length, width = hidden.shape
        parts = self.qkv(self.norm_1(hidden)).view(size, length, 3, -1, _HEAD_WIDTH)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.project(seen.transpose(1, 2).reshape(size, length, width))
        out = self.mlp(self.norm_2(hidden))
        if isinstance(out, tuple):
            return hidden + out[0], out[1].float()
        return hidden + out, torch.zeros((), device=hidden.device)


class TextDeepSpeed(TinyDeepSpeed):
    """One rank of a run on text; see `TinyDeepSpeed`."""

    config: TextConfig

    def _model(self) -> nn.Module:
        config = self.config
        mlps = [_mlp(config.width) for _ in range(config.layers)]
        if config.experts:
            moe = importlib.import_module("deepspeed.moe.layer").MoE
            mlps = [
                # No token is dropped and none is drawn, so that a loss depends on the model alone.
                moe(
                    config.width,
                    mlp,
                    config.experts,
                    config.expert_parallel_size,
                    k=1,
                    drop_tokens=False,
                    use_rts=False,
                )
                for mlp in mlps
            ]
        return TextModel(config, mlps)

    def train(self, iterations: int) -> list[float]:
        """Train on; returns the mean loss over all ranks of each iteration, in nats per byte."""
        losses = []
        for _ in range(iterations):
            loss, balance = self._loss(self.engine.global_samples, held_out=False)
            self.engine.backward(loss + _BALANCE * balance)
            self.engine.step()
            losses.append(_mean(loss))
        return losses

    @torch.no_grad()
    def evaluate(self, batches: int) -> float:
        """Mean held-out loss in nats per byte, over the same batches each time."""
        self.engine.eval()
        losses = [
            _mean(self._loss(number * self.config.batch_size, held_out=True)[0])
            for number in range(batches)
        ]
        self.engine.train()
        return sum(losses) / batches

    def set_lr(self, lr: float) -> None:
        """Train with this rate from here on."""
        self.scheduler.max_lrs = [lr] * len(self.scheduler.max_lrs)
        self.scheduler.delta_lrs = [lr] * len(self.scheduler.max_lrs)

    def _loss(self, first: int, held_out: bool) -> tuple[torch.Tensor, torch.Tensor]:
        own = self.config.batch_size // dist.get_world_size()
        start = first + own * dist.get_rank()
        inputs, labels = batch(
            [*range(start, start + own)],
            seq_length=self.config.seq_length,
            seed=self.config.seed,
            vocab_size=self.config.vocab_size,
            held_out=held_out,
        )
        device = cpu.device()
        found: tuple[torch.Tensor, torch.Tensor] = self.engine(inputs.to(device), labels.to(device))
        return found


def _mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def _mean(loss: torch.Tensor) -> float:
    total = loss.detach().double()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()
