"""Qwen2, Qwen2.5 and their MoE: as Llama, with biases on queries, keys and values alone.

Source: transformers `models/qwen2/modeling_qwen2.py`, `models/qwen2_moe/modeling_qwen2_moe.py`;
Megatron's `--add-qkv-bias` and `--moe-shared-expert-gate` (transformer/moe/shared_experts.py).
"""

from __future__ import annotations

from pma_megatron.export.families import blocks, trained
from pma_megatron.export.families.blocks import Layout, Stored, same
from pma_megatron.export.families.config import Config

MODEL_TYPES = ("qwen2", "qwen2_moe")


def layout(config: Config) -> Layout:
    """The biases have no field in the configuration: every Qwen2 has them."""
    config.require("every Qwen2 has these biases", qkv_bias=True)
    hidden, moe = config.axis("hidden_size"), config.model_type == "qwen2_moe"
    ends = (*blocks.norms(config), *blocks.attention(config, qkv_bias=True))

    def layer(number: int) -> tuple[Stored, ...]:
        if moe and blocks.is_sparse(config, number):
            return (*ends, *blocks.qwen_experts(config), *_shared_expert(config))
        return (*ends, *blocks.gated_mlp(hidden, config.axis("intermediate_size")))

    return blocks.whole_model(config, layer)


arguments = trained.qwen


def _shared_expert(config: Config) -> tuple[Stored, ...]:
    """One for all tokens, weighted by a gate of its own."""
    hidden, inner = config.axis("hidden_size"), config.axis("shared_expert_intermediate_size")
    gate, prefix = "mlp.shared_experts.gate_weight", "mlp.shared_expert"
    return (
        *blocks.gated_mlp(hidden, inner, key="mlp.shared_experts", prefix=prefix),
        same("mlp.shared_expert_gate.weight", gate, axes=(blocks.ONE, hidden)),
    )
