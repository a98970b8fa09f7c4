"""Qwen2 and Qwen2.5: as Llama, with biases on queries, keys and values alone (`--add-qkv-bias`).

Source: transformers `models/qwen2/modeling_qwen2.py`.
"""

from __future__ import annotations

from pma_megatron.export.families import blocks, trained
from pma_megatron.export.families.blocks import Layout
from pma_megatron.export.families.config import Config
from pma_megatron.export.families.trained import Arguments, Trained

MODEL_TYPES = ("qwen2",)


def layout(config: Config) -> Layout:
    """The biases have no field in the configuration: every Qwen2 has them."""
    config.require("Megatron's gated linear unit is compared for SwiGLU alone", hidden_act="silu")
    hidden, inner = config.axis("hidden_size"), config.axis("intermediate_size")
    layer = (
        *blocks.norms(config),
        *blocks.attention(config, qkv_bias=True),
        *blocks.gated_mlp(hidden, inner),
    )
    return blocks.whole_model(config, lambda number: layer)


def arguments(config: Config, given: Arguments) -> tuple[Trained, ...]:
    """What training must have been told; a window would be in some layers alone."""
    blocks.refuse_window(config)
    return (*trained.common(config), *trained.grouped_attention(config))
