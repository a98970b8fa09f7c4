"""What a part is given: where it may write, what it runs on, and how large its models are."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from pma_megatron.testing import TinyConfig
from pma_megatron.testing.cpu import has_transformer_engine

EVERY, SAVES, LAST = 2, 4, 3
"""Iterations between checkpoints, how many, and how many are averaged."""
WEIGHTS = (1 / LAST,) * LAST
WITHOUT_TE = "Transformer Engine, whose optimizer it needs, is not installed"


@dataclass(frozen=True, kw_only=True)
class Job:
    """Attributes:
    folder: of this part alone, removed after it.
    gpu: whether on a GPU, with models that fill one; else tiny, on the CPU.
    """

    folder: Path
    gpu: bool

    def config(self) -> TinyConfig:
        """The GPT of the correctness parts: 11M weights on a GPU."""
        if not self.gpu:
            return TinyConfig(warmup_iters=2)
        return TinyConfig(
            num_layers=4,
            hidden_size=512,
            ffn_hidden_size=1024,
            num_attention_heads=8,
            seq_length=128,
            micro_batch_size=16,
            global_batch_size=16,
            lr=1e-3,
            warmup_iters=2,
        )

    def large(self) -> TinyConfig:
        """The GPT of the costs: 134M weights on a GPU."""
        if not self.gpu:
            return TinyConfig()
        return TinyConfig(
            num_layers=8,
            hidden_size=1024,
            ffn_hidden_size=4096,
            num_attention_heads=16,
            seq_length=512,
            micro_batch_size=8,
            global_batch_size=8,
            lr=1e-4,
        )

    def kinds(self) -> dict[str, TinyConfig | None]:
        """Megatron's optimizers by name; None for one that is not here."""
        base = self.config()
        exact = replace(base, precision_aware_optimizer=True)
        return {
            "distributed optimizer": base,
            "Float16 optimizer": replace(base, use_distributed_optimizer=False),
            "FP32 optimizer": replace(base, bf16=False, use_distributed_optimizer=False),
            "precision-aware optimizer": exact if has_transformer_engine() and self.gpu else None,
        }

    @contextlib.contextmanager
    def scratch(self, name: str) -> Iterator[Path]:
        """A folder that is gone after the block: many checkpoints must not add up."""
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def synchronize() -> None:
    """Wait for the GPU, so that a clock read next says when it was done."""
    import torch

    from pma_megatron.testing import cpu

    if cpu.on_gpu():
        torch.cuda.synchronize()
