"""DeepSeek-V3 and R1: latent attention, sigmoid router with a bias, shared experts, dense first.

Source: transformers `models/deepseek_v3/modeling_deepseek_v3.py`; Megatron's
`transformer/multi_latent_attention.py` splits every projection in the same order (per head: the
part without position before the rotary one, and keys before values), and both take the rotary part
as pairs of neighbours, so no row moves.
"""

from __future__ import annotations

from pma_megatron.errors import PlanError
from pma_megatron.export.families import blocks, trained
from pma_megatron.export.families.blocks import Layout, Stored, same
from pma_megatron.export.families.config import Axis, Config
from pma_megatron.export.families.trained import Arguments, Trained

MODEL_TYPES = ("deepseek_v3",)


def layout(config: Config) -> Layout:
    """The first `first_k_dense_replace` layers are dense, all others MoE."""
    config.require("Megatron turns neighbours in the rotary part", rope_interleave=True)
    config.require("Megatron has no biases in latent attention", attention_bias=False)
    config.require("the first layers alone are dense", moe_layer_freq=1)
    config.require("the router's bias is that of `noaux_tc`", topk_method="noaux_tc")
    config.require("the router's bias belongs to sigmoid scores", scoring_func="sigmoid")
    config.require("Megatron's shares of the chosen experts sum to 1", norm_topk_prob=True)
    dense = config.axis("first_k_dense_replace", least=0).size
    _check_groups(config)
    hidden = config.axis("hidden_size")
    ends = (*blocks.norms(config), *_latent_attention(config))

    def layer(number: int) -> tuple[Stored, ...]:
        if number >= dense:
            return (*ends, *_experts(config))
        return (*ends, *blocks.gated_mlp(hidden, config.axis("intermediate_size")))

    return blocks.whole_model(config, layer)


def arguments(config: Config, given: Arguments) -> tuple[Trained, ...]:
    """What training must have been told."""
    return (
        *trained.common(config),
        *trained.sigmoid_router(config),
        *trained.latent_rope(config, given),
    )


def _check_groups(config: Config) -> None:
    """Megatron rates a group by its best `topk // group_topk` experts, transformers by two."""
    chosen = config.axis("num_experts_per_tok").size
    groups = config.axis("topk_group").size if "topk_group" in config else 1
    several = "n_group" in config and config.axis("n_group").size > 1
    if several and chosen // groups != 2:
        raise PlanError(
            f"config.json: num_experts_per_tok={chosen} and topk_group={groups}: transformers "
            "rates a group of experts by its best two, and Megatron by the best "
            f"{chosen // groups}, so the export would route otherwise than was trained"
        )


def _latent_attention(config: Config) -> tuple[Stored, ...]:
    hidden, heads = config.axis("hidden_size"), config.axis("num_attention_heads")
    latent, rotary = config.axis("kv_lora_rank"), config.axis("qk_rope_head_dim")
    plain, value = config.axis("qk_nope_head_dim"), config.axis("v_head_dim")
    queries, keys = heads * (plain + rotary), heads * (plain + value)
    found = [
        _projection("kv_a_proj_with_mqa", "kv_down_proj", latent + rotary, hidden),
        _norm("kv", latent),
        _projection("kv_b_proj", "kv_up_proj", keys, latent),
        _projection("o_proj", "proj", hidden, heads * value),
    ]
    if "q_lora_rank" not in config:
        return (*found, _projection("q_proj", "q_proj", queries, hidden))
    rank = config.axis("q_lora_rank")
    return (
        *found,
        _projection("q_a_proj", "q_down_proj", rank, hidden),
        _norm("q", rank),
        _projection("q_b_proj", "q_up_proj", queries, rank),
    )


def _projection(name: str, stored: str, rows: Axis, columns: Axis) -> Stored:
    key = f"self_attention.linear_{stored}.weight"
    return same(f"self_attn.{name}.weight", key, axes=(rows, columns))


def _norm(which: str, rank: Axis) -> Stored:
    """Stored alone (local layer specs), or with the up-projection after it."""
    alone, fused = f"{which}_layernorm.weight", f"linear_{which}_up_proj.layer_norm_weight"
    keys = f"self_attention.{alone}", f"self_attention.{fused}"
    return same(f"self_attn.{which}_a_layernorm.weight", *keys, axes=(rank,))


def _experts(config: Config) -> tuple[Stored, ...]:
    hidden, inner = config.axis("hidden_size"), config.axis("moe_intermediate_size")
    experts = config.axis("n_routed_experts", "num_local_experts")
    shared, bias = "mlp.shared_experts", "mlp.gate.e_score_correction_bias"
    prefix = "mlp.experts.{expert}"
    return (
        blocks.router("mlp.gate.weight", hidden, experts),
        same(bias, "mlp.router.expert_bias", axes=(experts,), float32=True),
        *blocks.gated_mlp(hidden, inner, key=blocks.EXPERTS, prefix=prefix, experts=experts),
        *blocks.gated_mlp(
            hidden, inner * config.axis("n_shared_experts"), key=shared, prefix=shared
        ),
    )
