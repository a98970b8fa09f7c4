"""Every element is exported once, in its place, of layouts that no run of the tests has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from family_shapes import (
    DEEPSEEK,
    LAYER,
    LLAMA,
    MIXTRAL,
    SMALL_DEEPSEEK,
    Shapes,
    arrays,
    deepseek_weights,
    exported,
    llama_weights,
    mixtral_weights,
    per_layer,
)

from pma_megatron.export.families import export_map


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
