"""What a map refuses, and what it does with names and shapes that no run of the tests has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from family_shapes import (
    DEEPSEEK,
    LAYER,
    LLAMA,
    MIXTRAL,
    Shapes,
    exported,
    llama_weights,
    mixtral_weights,
    per_layer,
)

from pma_megatron.errors import PlanError
from pma_megatron.export.families import KNOWN, export_map

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
