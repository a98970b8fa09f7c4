"""What a map refuses, and what it does with names and shapes that no run of the tests has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from pma_megatron.errors import PlanError
from pma_megatron.export.families import KNOWN, export_map

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
ARGUMENTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "swiglu": True,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 3,
    "norm_epsilon": 1e-6,
    "apply_layernorm_1p": False,
    "rotary_base": 10000,
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "position_embedding_type": "rope",
    "use_rope_scaling": False,
    "window_size": None,
    "moe_router_topk": 2,
    "moe_router_score_function": "softmax",
    "moe_router_pre_softmax": False,
    "moe_router_topk_scaling_factor": None,
    "vocab_size": None,
    "padded_vocab_size": 16,
    "make_vocab_size_divisible_by": 8,
    "tensor_model_parallel_size": 1,
    "softmax_type": "vanilla",
}


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


@pytest.mark.parametrize(
    ("config", "weights"),
    [
        (LLAMA, llama_weights()),
        (LLAMA, per_layer(llama_weights())),
        (MIXTRAL, mixtral_weights()),
        (MIXTRAL, per_layer(mixtral_weights())),
        (SMALL_DEEPSEEK, deepseek_weights(SMALL_DEEPSEEK, transformer_engine=True)),
        (SMALL_DEEPSEEK, deepseek_weights(SMALL_DEEPSEEK, transformer_engine=False)),
    ],
)
def test_every_element_but_padding_is_exported_once(
    config: dict[str, Any], weights: Shapes
) -> None:
    elements = np.concatenate([value.ravel() for value in exported(config, weights).values()])
    values = arrays(weights)
    wanted = [
        (
            value[:10]
            if key in ("embedding.word_embeddings.weight", "output_layer.weight")
            else value
        )
        for key, value in values.items()
    ]
    assert sorted(elements) == sorted(np.concatenate([value.ravel() for value in wanted]))


def test_deepseek_v3_has_its_671_billion_parameters() -> None:
    """With the names of Transformer Engine, under which it can be trained at that size."""
    weights = deepseek_weights(DEEPSEEK, transformer_engine=True)
    tensors = export_map(DEEPSEEK, weights).tensors
    elements = sum(math.prod(tensor.shape) for tensor in tensors)
    assert elements == sum(math.prod(shape) for shape in weights.values()) == 671_026_419_200
    assert len(tensors) == 45_395


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (4, 4), (6, 2), (1, 1)])
def test_queries_of_a_group_lie_before_its_key_and_value(heads: int, groups: int) -> None:
    config = {**LLAMA, "num_attention_heads": heads, "num_key_value_heads": groups}
    weights = llama_weights() | {
        LAYER + "self_attention.linear_qkv.weight": (2, (heads + 2 * groups) * 3, 8),
        LAYER + "self_attention.linear_proj.weight": (2, 8, heads * 3),
    }
    found = exported(config, weights)
    stored = arrays(weights)[LAYER + "self_attention.linear_qkv.weight"]
    grouped = stored.reshape(2, groups, heads // groups + 2, 3, 8)
    wanted = {"q": grouped[:, :, :-2], "k": grouped[:, :, -2], "v": grouped[:, :, -1]}
    for layer in range(2):
        for name, value in wanted.items():
            tensor = found[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
            assert np.array_equal(tensor, value[layer].reshape(-1, 8)), name


@pytest.mark.parametrize("names", ["alone", "per layer"])
def test_norms_that_are_stored_alone_are_the_same_norms(names: str) -> None:
    """Transformer Engine stores a norm with the layer after it, an MoE layer's norm alone."""
    alone = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    weights = llama_weights()
    renamed = {
        LAYER + alone.get(key.removeprefix(LAYER), key.removeprefix(LAYER))
        if key.startswith(LAYER)
        else key: s
        for key, s in weights.items()
    }
    if names == "per layer":
        weights, renamed = per_layer(weights), per_layer(renamed)
    assert weights != renamed
    before, after = exported(LLAMA, weights), exported(LLAMA, renamed)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_what_is_left_out_is_said() -> None:
    weights = llama_weights() | {"mtp.layers.0.eh_proj.weight": (8, 16), "mtp.layers.0.x": (8,)}
    notes = export_map(LLAMA, weights).notes
    assert notes == (
        "left out: 6 rows of padding of embedding.word_embeddings.weight",
        "left out: 6 rows of padding of output_layer.weight",
        "left out: 2 tensors of multi-token prediction (`mtp.*`), which transformers has no layer "
        "for",
    )


def refusal(config: Any, weights: Shapes, arguments: dict[str, Any] | None = None) -> str:
    with pytest.raises(PlanError) as caught:
        export_map(config, weights, arguments)
    return str(caught.value)


WITHOUT = object()
BAD_FIELDS: dict[str, tuple[Any, str]] = {
    "model_type": ("opt", "model_type 'opt' cannot be exported. Known are deepseek_v3, llama"),
    "model_type    ": (None, "model_type is missing"),
    "model_type ": ("gpt_oss", "stored transposed"),
    "model_type  ": (["llama"], "model_type ['llama'] cannot be exported"),
    "hidden_size": (WITHOUT, "hidden_size is missing"),
    "hidden_size ": ("8", "hidden_size must be a whole number from 1 on, found '8'"),
    "hidden_size  ": (8.0, "hidden_size must be a whole number from 1 on, found 8.0"),
    "hidden_size   ": (True, "hidden_size must be a whole number from 1 on, found True"),
    "hidden_size    ": (0, "hidden_size must be a whole number from 1 on, found 0"),
    "vocab_size": (10**30, "vocab_size must be a whole number"),
    "num_hidden_layers": (10**9, "linear_fc1.layer_norm_weight) than config.json says (num_hidden"),
    "num_attention_heads": (3, "num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
    "tie_word_embeddings": ("no", "tie_word_embeddings must be true or false, found 'no'"),
    "hidden_act": ("gelu", "hidden_act is 'gelu', and this export needs 'silu'"),
}


@pytest.mark.parametrize("field", BAD_FIELDS)
def test_a_field_that_cannot_be_is_named(field: str) -> None:
    value, words = BAD_FIELDS[field]
    config = {**LLAMA, field.strip(): value}
    if value is WITHOUT:
        del config[field.strip()]
    assert words in refusal(config, llama_weights())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, "1e4", True, [1]])
def test_a_number_must_be_one(value: Any) -> None:
    config = {**LLAMA, "rope_theta": value}
    assert "rope_theta must be a finite number" in refusal(config, llama_weights(), ARGUMENTS)
    arguments = ARGUMENTS | {"rotary_base": value}
    assert "and rope_theta is 10000.0" in refusal(LLAMA, llama_weights(), arguments)


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_configuration_that_is_no_object_is_refused(config: Any) -> None:
    assert "expected an object of fields" in refusal(config, llama_weights())


BAD_WEIGHTS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown keys": (
        {"vision.patch.weight": (3, 3), LAYER + "mlp.extra": (2, 8)},
        f"no place for {LAYER}mlp.extra, vision.patch.weight",
    ),
    "bias": (
        {LAYER + "self_attention.linear_qkv.bias": (2, 24)},
        "no place for decoder.layers.self_attention.linear_qkv.bias",
    ),
    "missing": (
        {LAYER + "mlp.linear_fc2.weight": None},
        "missing decoder.layers.mlp.linear_fc2.weight",
    ),
    "tied": (
        {"output_layer.weight": None},
        "missing output_layer.weight (or tie_word_embeddings is true)",
    ),
    "both": (
        {LAYER + "input_layernorm.weight": (2, 8)},
        "both decoder.layers.input_layernorm.weight and "
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight are there",
    ),
    "shape": (
        {LAYER + "mlp.linear_fc1.weight": (2, 6, 8)},
        "decoder.layers.mlp.linear_fc1.weight: expected [2, 12, 8] (intermediate_size=6), "
        "found [2, 6, 8]",
    ),
    "groups": (
        {LAYER + "self_attention.linear_qkv.weight": (2, 36, 8)},
        "expected [2, 24, 8] (num_attention_heads=4, num_key_value_heads=2, head_dim=3), "
        "found [2, 36, 8]",
    ),
    "rank": ({"decoder.final_layernorm.weight": (8, 1)}, "expected [8] (hidden_size=8)"),
    "vocabulary": (
        {"embedding.word_embeddings.weight": (8, 8)},
        "embedding.word_embeddings.weight: expected [10, 8] (vocab_size=10), found [8, 8]",
    ),
    "one layer more": (
        {LAYER + "mlp.linear_fc2.weight": (3, 8, 6)},
        "another number of layers (3 by decoder.layers.mlp.linear_fc2.weight) than config.json",
    ),
}


@pytest.mark.parametrize("wrong", BAD_WEIGHTS)
def test_weights_that_do_not_fit_are_named(wrong: str) -> None:
    changes, words = BAD_WEIGHTS[wrong]
    weights = llama_weights() | changes
    assert words in refusal(LLAMA, {key: shape for key, shape in weights.items() if shape})


def test_a_checkpoint_without_layers_is_refused_before_they_are_counted() -> None:
    config = {**LLAMA, "num_hidden_layers": 1 << 40}
    assert "none, no decoder.layers.*" in refusal(config, {"output_layer.weight": (16, 8)})


def test_a_prefix_of_all_keys_is_kept() -> None:
    weights = {f"module.{key}": shape for key, shape in llama_weights().items()}
    without, with_it = exported(LLAMA, llama_weights()), exported(LLAMA, weights)
    assert without.keys() == with_it.keys()
    assert all(np.array_equal(without[name], with_it[name]) for name in without)


def test_tied_embeddings_have_no_output_layer() -> None:
    tied = {**LLAMA, "tie_word_embeddings": True}
    assert "no place for output_layer.weight" in refusal(tied, llama_weights())


def test_a_router_bias_is_not_dropped() -> None:
    """It decides which experts see a token, and Mixtral has none."""
    weights = {**mixtral_weights(), LAYER + "mlp.router.expert_bias": (2, 3)}
    assert "no place for decoder.layers.mlp.router.expert_bias" in refusal(MIXTRAL, weights)


def test_all_unknown_keys_are_told_and_those_of_many_layers_as_one() -> None:
    many = {f"vision.{number:02}": (1,) for number in range(60)}
    text = refusal(LLAMA, llama_weights() | many)
    assert all(key in text for key in many)
    each = {f"{LAYER}{number}.self_attention.linear_qkv.bias": (24,) for number in range(2)}
    text = refusal(LLAMA, per_layer(llama_weights()) | each)
    assert f"no place for {LAYER}N.self_attention.linear_qkv.bias (2 layers)\n" in text
    assert "and 20 more" in refusal(
        LLAMA, llama_weights() | {f"vision.{number:03}": (1,) for number in range(120)}
    )


def test_what_is_so_in_many_layers_is_told_once() -> None:
    weights = per_layer(llama_weights())
    for number in range(2):
        weights[f"{LAYER}{number}.mlp.linear_fc2.weight"] = (8, 7)
        del weights[f"{LAYER}{number}.mlp.linear_fc1.weight"]
    text = refusal(LLAMA, weights)
    assert "missing decoder.layers.mlp.linear_fc1.weight (layers 0, 1)\n" in text
    assert (
        "decoder.layers.N.mlp.linear_fc2.weight: expected [8, 6] (intermediate_size=6), "
        "found [8, 7] (layers 0, 1)\n"
    ) in text


def test_arguments_that_fit_are_taken() -> None:
    export_map(MIXTRAL, mixtral_weights(), ARGUMENTS)
    export_map(MIXTRAL, mixtral_weights(), ARGUMENTS | {"rotary_base": 10000.0, "new": object()})


BAD_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "rotary_base": ({"rotary_base": 500000}, "rotary_base=500000, and rope_theta is 10000.0"),
    "norm_epsilon": ({"norm_epsilon": 1e-5}, "norm_epsilon=1e-05, and rms_norm_eps is 1e-06"),
    "layernorm_epsilon": ({"layernorm_epsilon": 1e-5}, "layernorm_epsilon=1e-05"),
    "normalization": ({"normalization": "LayerNorm"}, "normalization='LayerNorm'"),
    "zero-centered": ({"apply_layernorm_1p": True}, "apply_layernorm_1p=True"),
    "heads": (
        {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 6},
        "num_attention_heads=8, and num_attention_heads is 4",
    ),
    "no groups": (
        {"group_query_attention": False},
        "num_query_groups=4, and num_key_value_heads=2",
    ),
    "head width": ({"kv_channels": 6}, "kv_channels=6, and head_dim=3"),
    "positions": ({"position_embedding_type": "learned_absolute"}, "has rotary embeddings"),
    "partly": ({"rotary_percent": 0.5}, "rotary_percent=0.5, and partial_rotary_factor is 1.0"),
    "interleaved": ({"rotary_interleaved": True}, "rotary_interleaved=True"),
    "scaled": ({"use_rope_scaling": True}, "use_rope_scaling=True"),
    "window": ({"window_size": (127, 0)}, "window_size=(127, 0), and config.json asks for no"),
    "top-k": ({"moe_router_topk": 1}, "moe_router_topk=1, and num_experts_per_tok is 2"),
    "sigmoid": ({"moe_router_score_function": "sigmoid"}, "moe_router_score_function='sigmoid'"),
    "shares": ({"moe_router_pre_softmax": True}, "moe_router_pre_softmax=True"),
    "scale": ({"moe_router_topk_scaling_factor": 2.5}, "moe_router_topk_scaling_factor=2.5"),
    "no gate": ({"swiglu": False}, "swiglu=False"),
    "of another type": ({"rotary_base": "10000"}, "rotary_base='10000'"),
    "vocabulary": ({"vocab_size": 12}, "vocab_size=12, and vocab_size=10 would drop tokens"),
    "padding": ({"padded_vocab_size": 24}, "padded_vocab_size=24, and vocab_size=10 would drop"),
    "sinks": ({"softmax_type": "learnable"}, "softmax_type='learnable'"),
}


@pytest.mark.parametrize("wrong", BAD_ARGUMENTS)
def test_arguments_that_contradict_the_configuration_are_named(wrong: str) -> None:
    changes, words = BAD_ARGUMENTS[wrong]
    assert words in refusal(MIXTRAL, mixtral_weights(), ARGUMENTS | changes)


def test_what_the_configuration_leaves_out_is_not_guessed() -> None:
    """A family's own default may be another: Mixtral's rotary base is a million."""
    config = {name: value for name, value in MIXTRAL.items() if name != "rope_theta"}
    text = refusal(config, mixtral_weights(), ARGUMENTS)
    assert "rotary_base=10000, and config.json says nothing of rope_theta" in text


def test_new_and_old_ways_to_write_the_rotary_embedding_agree() -> None:
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    arguments = ARGUMENTS | {"use_rope_scaling": True, "rope_scaling_factor": 8.0}
    old = {**LLAMA, "rope_scaling": llama3}
    new = {name: value for name, value in LLAMA.items() if name != "rope_theta"}
    new["rope_parameters"] = {**llama3, "rope_theta": 10000.0}
    for config in (old, new):
        export_map(config, llama_weights(), arguments)
        assert "rope_type of config.json is 'llama3'" in refusal(config, llama_weights(), ARGUMENTS)
        other = arguments | {"rope_scaling_factor": 32.0}
        assert "rope_scaling_factor=32.0, and factor is 8.0" in refusal(
            config, llama_weights(), other
        )
    other_band = {**LLAMA, "rope_scaling": {**llama3, "high_freq_factor": 2.0}}
    assert "high_freq_factor of the rotary embedding is 2.0" in refusal(
        other_band, llama_weights(), arguments
    )
    yarn = {**LLAMA, "rope_scaling": {"type": "yarn", "factor": 4.0}}
    assert "rope_type of config.json is 'yarn'" in refusal(yarn, llama_weights(), ARGUMENTS)


def test_a_window_of_some_layers_is_refused() -> None:
    qwen = {**LLAMA, "model_type": "qwen2"}
    weights = llama_weights() | {LAYER + "self_attention.linear_qkv.bias": (2, 24)}
    export_map(qwen | {"layer_types": ["full_attention"] * 2}, weights, ARGUMENTS)
    for field in (
        {"use_sliding_window": True, "sliding_window": 16},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": 3},
    ):
        assert next(iter(field)) in refusal(qwen | field, weights, ARGUMENTS)


def test_a_window_that_is_not_spoken_of_is_not_guessed() -> None:
    """Where Mistral's configuration has none, transformers takes one of 4096 tokens."""
    mistral = {**LLAMA, "model_type": "mistral"}
    assert "sliding_window is missing" in refusal(mistral, llama_weights(), ARGUMENTS)


def test_groups_of_experts_that_transformers_rates_otherwise_are_refused() -> None:
    config = {**DEEPSEEK, "topk_group": 2}
    assert "and Megatron by the best 4" in refusal(config, {})


def test_a_window_that_is_no_limit_is_none() -> None:
    short = {**LLAMA, "model_type": "mistral", "sliding_window": 16}
    assert "sliding_window of 16 tokens" in refusal(short, llama_weights(), ARGUMENTS)
    export_map(short, llama_weights(), ARGUMENTS | {"window_size": [15, 0]})
    export_map({**short, "sliding_window": 64}, llama_weights(), ARGUMENTS)


@pytest.mark.parametrize("model_type", KNOWN)
def test_an_empty_configuration_and_checkpoint_are_refused(model_type: str) -> None:
    assert "is missing" in refusal({"model_type": model_type}, {})
