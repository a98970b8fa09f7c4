"""Names of a checkpoint against those of the model: what transformers itself builds is right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from exports import CONFIG

from pma_megatron.errors import PlanError
from pma_megatron.export.families import KNOWN
from pma_megatron.export.matching import export_map
from pma_megatron.export.own_names import compare_names

Shapes = dict[str, tuple[int, ...]]
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 4},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 4,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
        "head_dim": 4,
        "first_k_dense_replace": 1,
    },
}


def built(model_type: str, **changes: Any) -> tuple[dict[str, Any], Shapes]:
    """Configuration and state of a model of the library's, without memory for it."""
    transformers = pytest.importorskip("transformers")
    settings = {**SIZES, **OF_FAMILY.get(model_type, {}), **changes}
    config = transformers.AutoConfig.for_model(model_type, **settings)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return config.to_dict(), {k: tuple(v.shape) for k, v in model.state_dict().items()}


def llama() -> Shapes:
    config = {**CONFIG, "num_hidden_layers": 1}
    return built("llama", **{k: v for k, v in config.items() if k in SIZES})[1]


@pytest.mark.parametrize("model_type", sorted(KNOWN))
def test_the_librarys_own_names_are_those_of_the_family(model_type: str) -> None:
    config, found = built(model_type)
    compared, notes = compare_names(config, found)
    assert compared, notes
    assert any("stacked" in note for note in notes) == (model_type in OF_FAMILY)
    wrapped = {f"module.{name}": shape for name, shape in found.items()}
    with pytest.raises(PlanError, match=r"begin with 'module\.'"):
        compare_names(config, wrapped)


def renamed(change: Callable[[str], str]) -> Callable[[Shapes], Shapes]:
    return lambda found: {change(name): shape for name, shape in found.items()}


BAD: dict[str, tuple[Callable[[Shapes], Any], tuple[str, ...]]] = {
    "wrapped": (renamed(lambda n: f"model.{n}"), ("missing: model.embed", "begin with 'model.'")),
    "compiled": (renamed(lambda n: f"_orig_mod.{n}"), ("begin with '_orig_mod.'",)),
    "PEFT": (renamed(lambda n: f"base_model.model.{n}"), ("begin with 'base_model.model.'",)),
    "adapters": (lambda f: {**f, "model.norm.lora_A": (8, 2)}, ("not of the model: model.norm.l",)),
    "one too few": (lambda f: f.pop("model.norm.weight") and f, ("missing: model.norm.weight",)),
    "other shape": (
        lambda f: {**f, "model.layers.0.mlp.up_proj.weight": (31, 32)},
        ("model.layers.0.mlp.up_proj.weight is [31, 32] and should be [32, 32]",),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_what_the_model_would_not_find_is_refused(what: str) -> None:
    spoil, words = BAD[what]
    config = {**CONFIG, "num_hidden_layers": 1}
    with pytest.raises(PlanError) as caught:
        export_map(config, spoil(llama()), own_names=True)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_what_is_tied_or_computed_is_no_difference() -> None:
    config, found = {**CONFIG, "num_hidden_layers": 1}, llama()
    assert export_map(config, found, own_names=True).compared
    found["model.rotary_emb.inv_freq"] = (4,)
    assert export_map(config, found, own_names=True).compared
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    head = found.pop("lm_head.weight")
    assert export_map(config, found, own_names=True, aliases=tied).compared
    made = export_map(config, found, own_names=True)
    assert not made.compared and "random" in made.notes[0]
    config["tie_word_embeddings"] = True
    assert export_map(config, found, own_names=True).compared
    assert export_map(config, {**found, "lm_head.weight": head}, own_names=True).compared


def test_of_other_models_an_index_says_the_names() -> None:
    config, found = {"model_type": "own"}, {"a.weight": (2, 2), "b.weight": (3,)}
    made = export_map(config, found, own_names=True)
    assert not made.compared and "were not compared" in made.notes[0]
    assert export_map(config, found, own_names=True, listed=set(found)).compared
    for tied in ({"c.weight": "b.weight"}, {"d.weight": "a.weight", "c.weight": "b.weight"}):
        for listed in ({"a.weight", "b.weight"}, {"a.weight", "c.weight"}):
            assert export_map(config, found, own_names=True, aliases=tied, listed=listed).compared
    with pytest.raises(PlanError, match=r"missing: c\.weight\n  not of the model: b\.weight"):
        export_map(config, found, own_names=True, listed={"a.weight", "c.weight"})


def test_a_configuration_that_is_no_language_model_or_absurd_ends_soon() -> None:
    found = llama()
    config = {**CONFIG, "architectures": ["LlamaForSequenceClassification"]}
    assert not export_map(config, found, own_names=True).compared
    with pytest.raises(PlanError, match="missing"):
        export_map({**CONFIG, "num_hidden_layers": 1 << 39}, found, own_names=True)
    odd = export_map({**CONFIG, "hidden_act": "relu"}, found, own_names=True)
    assert not odd.compared and "hidden_act" in odd.notes[0]
