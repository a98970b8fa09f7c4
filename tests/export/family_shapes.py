"""Names and shapes of checkpoints of each family, for maps that no run of the tests needs."""

from __future__ import annotations

from typing import Any

import numpy as np

from pma_megatron.export.families import export_map

Shapes = dict[str, tuple[int, ...]]


LAYER = "decoder.layers."


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 3,
    "vocab_size": 10,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
}


MIXTRAL = {
    **LLAMA,
    "model_type": "mixtral",
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": None,
}


DEEPSEEK: dict[str, Any] = {
    **LLAMA,
    "model_type": "deepseek_v3",
    "num_hidden_layers": 61,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 3,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}
"""DeepSeek-V3 as it was published."""


def llama_weights() -> Shapes:
    return {
        "embedding.word_embeddings.weight": (16, 8),
        LAYER + "self_attention.linear_qkv.layer_norm_weight": (2, 8),
        LAYER + "self_attention.linear_qkv.weight": (2, 24, 8),
        LAYER + "self_attention.linear_proj.weight": (2, 8, 12),
        LAYER + "mlp.linear_fc1.layer_norm_weight": (2, 8),
        LAYER + "mlp.linear_fc1.weight": (2, 12, 8),
        LAYER + "mlp.linear_fc2.weight": (2, 8, 6),
        "decoder.final_layernorm.weight": (8,),
        "output_layer.weight": (16, 8),
    }


def mixtral_weights() -> Shapes:
    weights = llama_weights()
    for name in ("fc1", "fc2"):
        layers, *shape = weights.pop(f"{LAYER}mlp.linear_{name}.weight")
        weights[f"{LAYER}mlp.experts.experts.linear_{name}.weight"] = (layers, 3, *shape)
    return {**weights, LAYER + "mlp.router.weight": (2, 3, 8)}


def deepseek_weights(config: dict[str, Any], *, transformer_engine: bool) -> Shapes:
    """Latent attention's up-projections have their norm with them, in Transformer Engine."""
    sizes = {name: value for name, value in config.items() if type(value) is int}
    hidden, heads, inner = (
        sizes[name] for name in ("hidden_size", "num_attention_heads", "moe_intermediate_size")
    )
    query, latent, experts = (
        sizes[name] for name in ("q_lora_rank", "kv_lora_rank", "n_routed_experts")
    )
    plain, rotary, value = (
        sizes[name] for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    )
    fused = "linear_{}_up_proj.layer_norm_weight" if transformer_engine else "{}_layernorm.weight"
    attention = {
        "linear_q_down_proj.weight": (query, hidden),
        fused.format("q"): (query,),
        "linear_q_up_proj.weight": (heads * (plain + rotary), query),
        "linear_kv_down_proj.weight": (latent + rotary, hidden),
        fused.format("kv"): (latent,),
        "linear_kv_up_proj.weight": (heads * (plain + value), latent),
        "linear_proj.weight": (hidden, heads * value),
    }
    norm = "mlp.linear_fc1.layer_norm_weight" if transformer_engine else "pre_mlp_layernorm.weight"
    dense = {
        norm: (hidden,),
        "mlp.linear_fc1.weight": (2 * sizes["intermediate_size"], hidden),
        "mlp.linear_fc2.weight": (hidden, sizes["intermediate_size"]),
    }
    shared = inner * sizes["n_shared_experts"]
    moe = {
        "pre_mlp_layernorm.weight": (hidden,),
        "mlp.router.weight": (experts, hidden),
        "mlp.router.expert_bias": (experts,),
        "mlp.experts.experts.linear_fc1.weight": (experts, 2 * inner, hidden),
        "mlp.experts.experts.linear_fc2.weight": (experts, hidden, inner),
        "mlp.shared_experts.linear_fc1.weight": (2 * shared, hidden),
        "mlp.shared_experts.linear_fc2.weight": (hidden, shared),
    }
    found: Shapes = {
        "embedding.word_embeddings.weight": (sizes["vocab_size"], hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (sizes["vocab_size"], hidden),
    }
    for number in range(sizes["num_hidden_layers"]):
        layer = f"{LAYER}{number}."
        found[f"{layer}input_layernorm.weight"] = (hidden,)
        found |= {f"{layer}self_attention.{name}": shape for name, shape in attention.items()}
        mlp = dense if number < sizes["first_k_dense_replace"] else moe
        found |= {layer + name: shape for name, shape in mlp.items()}
    return found


SMALL_DEEPSEEK = {
    **DEEPSEEK,
    "num_hidden_layers": 3,
    "hidden_size": 5,
    "intermediate_size": 7,
    "vocab_size": 4,
    "moe_intermediate_size": 2,
    "num_attention_heads": 2,
    "q_lora_rank": 3,
    "kv_lora_rank": 4,
    "qk_rope_head_dim": 2,
    "qk_nope_head_dim": 3,
    "v_head_dim": 1,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "n_shared_experts": 3,
}


def per_layer(weights: Shapes) -> Shapes:
    """The same model with the number of the layer in the key."""
    found = {key: shape for key, shape in weights.items() if not key.startswith(LAYER)}
    for key, (layers, *shape) in ((k, s) for k, s in weights.items() if k.startswith(LAYER)):
        for number in range(layers):
            found[f"{LAYER}{number}.{key.removeprefix(LAYER)}"] = tuple(shape)
    return found


def arrays(weights: Shapes) -> dict[str, np.ndarray]:
    """Each element of the checkpoint with a number of its own."""
    found, first = {}, 0
    for key, shape in weights.items():
        size = int(np.prod(shape))
        found[key] = np.arange(first, first + size).reshape(shape)
        first += size
    return found


def exported(config: dict[str, Any], weights: Shapes) -> dict[str, np.ndarray]:
    values, found = arrays(weights), {}
    for tensor in export_map(config, weights).tensors:
        flat = np.full(int(np.prod(tensor.shape)), -1)
        for part in tensor.filled_by:
            index = tuple(
                slice(o, o + n) for o, n in zip(part.box.offsets, part.box.sizes, strict=True)
            )
            flat[part.start : part.start + part.box.numel] = values[part.key][index].ravel()
        assert [part.start for part in tensor.filled_by] == sorted(
            part.start for part in tensor.filled_by
        )
        found[tensor.name] = flat.reshape(tensor.shape)
    return found
