"""Qwen3, dense and MoE: a norm over each head of queries and keys (`--qk-layernorm`), no biases.

Source: transformers `models/qwen3/modeling_qwen3.py`, `models/qwen3_moe/modeling_qwen3_moe.py`.
"""

from __future__ import annotations

from pma_megatron.export.families import blocks, trained
from pma_megatron.export.families.blocks import Layout, Stored
from pma_megatron.export.families.config import Config

MODEL_TYPES = ("qwen3", "qwen3_moe")


def layout(config: Config) -> Layout:
    """Layers are MoE where `num_experts`, `decoder_sparse_step` and `mlp_only_layers` say so."""
    config.axis("head_dim")  # not the hidden size's share of one where it is missing
    bias, moe = config.flag("attention_bias"), config.model_type == "qwen3_moe"
    attention = blocks.attention(config, qkv_bias=bias, output_bias=bias, qk_norm=True)
    ends = (*blocks.norms(config), *attention)
    hidden = config.axis("hidden_size")

    def layer(number: int) -> tuple[Stored, ...]:
        if moe and blocks.is_sparse(config, number):
            return (*ends, *blocks.qwen_experts(config))
        return (*ends, *blocks.gated_mlp(hidden, config.axis("intermediate_size")))

    return blocks.whole_model(config, layer)


arguments = trained.qwen
