"""Llama and Mistral: rotary embeddings, grouped queries, SwiGLU, RMSNorm, no biases by default.

Source: transformers `models/llama/modeling_llama.py`, `models/mistral/modeling_mistral.py`.
"""

from __future__ import annotations

from pma_megatron.errors import PlanError
from pma_megatron.export.families import blocks, trained
from pma_megatron.export.families.blocks import Layout
from pma_megatron.export.families.config import Config
from pma_megatron.export.families.trained import Arguments, Trained

MODEL_TYPES = ("llama", "mistral")


def layout(config: Config) -> Layout:
    """`attention_bias` is on all four projections, `mlp_bias` on all three, as Megatron's
    `--add-bias-linear` (its default) has them together."""
    bias = config.flag("attention_bias")
    hidden, inner = config.axis("hidden_size"), config.axis("intermediate_size")
    layer = (
        *blocks.norms(config),
        *blocks.attention(config, qkv_bias=bias, output_bias=bias),
        *blocks.gated_mlp(hidden, inner, bias=config.flag("mlp_bias")),
    )
    return blocks.whole_model(config, lambda number: layer)


def arguments(config: Config, given: Arguments) -> tuple[Trained, ...]:
    """What training must have been told; Mistral alone has a window."""
    mistral = config.model_type == "mistral"
    if mistral and not config.states("sliding_window"):
        raise PlanError(
            "config.json: sliding_window is missing, and transformers takes 4096 for Mistral then: "
            "add it, null for none"
        )
    window = blocks.window(config) if mistral else None
    return (*trained.common(config), *trained.grouped_attention(config, window=window))
