"""What Megatron-LM's own training script stores fits a family: its keys and its arguments.

Skipped unless MEGATRON_LM_PATH names a Megatron-LM source tree (of any release that is supported).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from pma_megatron import export_model
from pma_megatron.errors import PlanError
from pma_megatron.export.families import export_map
from pma_megatron.formats.torch_dist.format import FORMAT
from pma_megatron.testing.megatron_lm import run_pretrain

TREE = os.environ.get("MEGATRON_LM_PATH", "")
pytestmark = [
    pytest.mark.skipif(not TREE, reason="MEGATRON_LM_PATH names no Megatron-LM source tree"),
    pytest.mark.slow,
]
MODEL = (
    *("--group-query-attention", "--num-query-groups", "2", "--qk-layernorm"),
    *("--num-experts", "4", "--moe-ffn-hidden-size", "16", "--moe-layer-freq", "[0,1]"),
    *("--moe-router-topk", "2", "--moe-router-load-balancing-type", "none"),
    *("--moe-token-dispatcher-type", "allgather", "--rotary-base", "50000"),
    *("--norm-epsilon", "1e-6"),
)
CONFIG = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 85,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
    "mlp_only_layers": [0],
    "vocab_size": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000,
    "max_position_embeddings": 32,
}


def test_keys_and_arguments_of_a_training_script(tmp_path: Path) -> None:
    run_pretrain(
        TREE,
        [*MODEL, "--train-iters", "1", "--save-interval", "1", "--save", str(tmp_path)],
        ranks=1,
    )
    folder = tmp_path / "iter_0000001"
    weights = FORMAT.read_source(str(folder), {}, True).space.weights
    shapes = {key: weight.shape for key, weight in weights.items()}
    config = {**CONFIG, "vocab_size": shapes["output_layer.weight"][0]}
    config["intermediate_size"] = shapes["decoder.layers.0.mlp.linear_fc1.weight"][0] // 2
    arguments = FORMAT.common(folder)["args"]
    assert export_map(config, shapes, arguments).notes == ()
    like = tmp_path / "like"
    like.mkdir()
    (like / "config.json").write_text(json.dumps(config))
    export_model(folder, save=tmp_path / "model", like=like)
    _, told = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(told.values()), told
    wrong = {
        "rope_theta": (10000, "rotary_base=50000, and rope_theta is 10000"),
        "rms_norm_eps": (1e-5, "epsilon=1e-06, and rms_norm_eps is 1e-05"),
        "num_experts_per_tok": (1, "moe_router_topk=2, and num_experts_per_tok is 1"),
        "norm_topk_prob": (False, "moe_router_pre_softmax=False"),
        "partial_rotary_factor": (0.5, "rotary_percent=1.0, and partial_rotary_factor is 0.5"),
        "rope_scaling": ({"type": "llama3", "factor": 8.0} | BAND, "use_rope_scaling=False"),
    }
    for field, (value, words) in wrong.items():
        with pytest.raises(PlanError) as caught:
            export_map({**config, field: value}, shapes, arguments)
        assert words in str(caught.value)


BAND = {"low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
