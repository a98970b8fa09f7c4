"""The models of each scale, and the constant-rate runs that most experiments share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from lab.runs import Run
from lab.trainer import Rate
from pma_megatron.testing import TinyConfig

WARMUP = 20


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How large everything is.

    Attributes:
        name: as typed for `--scale`.
        dense: configurations, smallest first; the middle one is the default.
        moe: the same.
        end: iterations of a constant-rate run.
        every: iterations between its checkpoints: the smallest interval of a merge.
        early: an end soon after the warmup, where merges may reach back into unstable weights.
        fork: where annealing runs leave the constant-rate run.
        decay: iterations of an annealing run.
        peak: the constant learning rate.
        device: `cpu` or `cuda`.
    """

    name: str
    dense: tuple[TinyConfig, ...]
    moe: tuple[TinyConfig, ...]
    end: int
    every: int
    early: int
    fork: int
    decay: int
    peak: float = 4e-3
    device: str = "cpu"

    def model(self, *, moe: bool = False, size: int = 1) -> TinyConfig:
        """A configuration: `size` 0 to 2."""
        return (self.moe if moe else self.dense)[size]

    def kinds(self) -> Iterator[tuple[bool, int]]:
        """(whether MoE, size) of every model."""
        for moe in (False, True):
            yield from ((moe, size) for size in range(len(self.dense)))

    def tokens(self, iterations: int) -> int:
        """Tokens that so many iterations consume."""
        config = self.dense[0]
        return iterations * config.global_batch_size * config.seq_length


def _dense(hidden_size: int, num_layers: int, seq_length: int, batch: int = 16) -> TinyConfig:
    return TinyConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=2 * hidden_size,
        num_attention_heads=hidden_size // 16,
        seq_length=seq_length,
        global_batch_size=batch,
        micro_batch_size=batch,
    )


def _moe(
    configs: tuple[TinyConfig, ...], ranks: tuple[int, ...] = (2, 1, 2)
) -> tuple[TinyConfig, ...]:
    """As many weights per token as the dense ones, twice as many in all.

    With expert parallelism over `ranks`; not for the middle one, which most experiments fork from:
    in one process it takes less than half of the time.
    """
    return tuple(
        replace(
            config,
            num_experts=4,
            moe_router_topk=2,
            ffn_hidden_size=config.hidden_size,
            expert_model_parallel_size=size,
            micro_batch_size=config.global_batch_size // size,
        )
        for config, size in zip(configs, ranks, strict=True)
    )


_TINY = tuple(_dense(hidden, layers, 64) for hidden, layers in ((32, 2), (64, 2), (96, 3)))
_SMALL = tuple(_dense(hidden, layers, 128) for hidden, layers in ((128, 4), (192, 6), (256, 8)))
_GPU = tuple(_dense(hidden, layers, 512, 64) for hidden, layers in ((256, 6), (512, 8), (768, 12)))
SCALES = {
    "ci": Scale(
        name="ci",
        dense=(_TINY[0],) * 3,
        moe=_moe((_TINY[0],) * 3),
        end=300,
        every=10,
        early=150,
        fork=200,
        decay=50,
    ),
    "tiny": Scale(
        name="tiny", dense=_TINY, moe=_moe(_TINY), end=800, every=10, early=150, fork=500, decay=100
    ),
    "small": Scale(
        name="small",
        dense=_SMALL,
        moe=_moe(_SMALL),
        end=8000,
        every=100,
        early=1500,
        fork=5000,
        decay=1000,
    ),
    "gpu": Scale(
        name="gpu",
        dense=_GPU,
        moe=_moe(_GPU, (1, 1, 1)),
        end=16000,
        every=200,
        early=3000,
        fork=10000,
        decay=2000,
        peak=1e-3,
        device="cuda",
    ),
}


def constant(
    scale: Scale, seed: int, *, moe: bool = False, size: int = 1, factor: float = 1.0
) -> Run:
    """Warmup and a constant rate to the end, saved all along."""
    return Run(
        config=replace(scale.model(moe=moe, size=size), seed=seed),
        rate=Rate(peak=scale.peak * factor, warmup=WARMUP),
        end=scale.end,
        saves=tuple(range(5 * scale.every, scale.end + 1, scale.every)),
    )
