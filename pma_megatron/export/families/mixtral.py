"""Mixtral: Llama's attention, and a router over SwiGLU experts in every layer.

Source: transformers `models/mixtral/modeling_mixtral.py`. The names are those of its files
(`block_sparse_moe`, `w1` the gate, `w3` the other half, `w2` down), which transformers 5 renames
and stacks when it loads them.
"""

from __future__ import annotations

from pma_megatron.export.families import blocks, trained
from pma_megatron.export.families.blocks import Layout
from pma_megatron.export.families.config import Config
from pma_megatron.export.families.trained import Arguments, Trained

MODEL_TYPES = ("mixtral",)


def layout(config: Config) -> Layout:
    """All layers are MoE; `intermediate_size` is that of one expert."""
    hidden, inner = config.axis("hidden_size"), config.axis("intermediate_size")
    experts = config.axis("num_local_experts")
    prefix, names = "block_sparse_moe.experts.{expert}", ("w1", "w3", "w2")
    layer = (
        *blocks.norms(config),
        *blocks.attention(config),
        blocks.router("block_sparse_moe.gate.weight", hidden, experts),
        *blocks.gated_mlp(
            hidden, inner, key=blocks.EXPERTS, prefix=prefix, names=names, experts=experts
        ),
    )
    return blocks.whole_model(config, lambda number: layer)


def arguments(config: Config, given: Arguments) -> tuple[Trained, ...]:
    """What training must have been told; shares of the chosen experts always sum to 1."""
    return (
        *trained.common(config),
        *trained.grouped_attention(config, window=blocks.window(config)),
        *trained.softmax_router(config, normalised=True),
    )
