"""Exported tensors put together again as Megatron's: a family's map backwards, by hand."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from family_models import Case


def megatron_weights(case: Case, exported: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The checkpoint's tensors put together again, as Megatron's modules would be filled."""
    numbers = sorted({int(name.split(".")[2]) for name in exported if ".layers." in name})
    layers = [
        _megatron_layer(
            {
                name.removeprefix(f"model.layers.{number}."): value
                for name, value in exported.items()
                if name.startswith(f"model.layers.{number}.")
            }
        )
        for number in numbers
    ]
    whole = {
        "embedding.word_embeddings.weight": exported["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": exported["model.norm.weight"],
    }
    if "lm_head.weight" in exported:
        whole["output_layer.weight"] = exported["lm_head.weight"]
    if "moe_layer_freq" in case.run.core:
        for number, layer in enumerate(layers):
            whole |= {f"decoder.layers.{number}.{key}": value for key, value in layer.items()}
        return whole
    stacked = {key: torch.stack([layer[key] for layer in layers]) for key in layers[0]}
    return whole | {f"decoder.layers.{key}": value for key, value in stacked.items()}


def _megatron_layer(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    attention = {name: value for name, value in hf.items() if name.startswith("self_attn.")}
    latent = any("kv_a" in name for name in attention)
    found = _latent(attention) if latent else _grouped(attention)
    before, after = hf["input_layernorm.weight"], hf["post_attention_layernorm.weight"]
    if latent:
        found |= {"input_layernorm.weight": before, "pre_mlp_layernorm.weight": after}
    else:
        found["self_attention.linear_qkv.layer_norm_weight"] = before
        found["mlp.linear_fc1.layer_norm_weight"] = after
    mlp = {
        name.replace("block_sparse_moe", "mlp")
        .replace("mlp.shared_expert.", "mlp.shared_experts.")
        .replace(".w1.", ".gate_proj.")
        .replace(".w3.", ".up_proj.")
        .replace(".w2.", ".down_proj."): value
        for name, value in hf.items()
        if name.startswith(("mlp.", "block_sparse_moe."))
    }
    for name, value in mlp.items():
        module, leaf = name.rsplit(".", 1)
        if module.endswith("up_proj") and ".experts." not in module:
            gate = mlp[f"{module.removesuffix('up_proj')}gate_proj.{leaf}"]
            found[name.replace("up_proj", "linear_fc1")] = torch.cat([gate, value])
        elif module.endswith("down_proj") and ".experts." not in module:
            found[name.replace("down_proj", "linear_fc2")] = value
    if "mlp.gate.weight" in mlp:
        found |= _experts(mlp)
    return found


def _experts(mlp: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    count = len(mlp["mlp.gate.weight"])
    gate, up, down = (
        torch.stack([mlp[f"mlp.experts.{i}.{name}_proj.weight"] for i in range(count)])
        for name in ("gate", "up", "down")
    )
    found = {
        "mlp.router.weight": mlp["mlp.gate.weight"],
        "mlp.experts.experts.linear_fc1.weight": torch.cat([gate, up], dim=1),
        "mlp.experts.experts.linear_fc2.weight": down,
    }
    if "mlp.shared_expert_gate.weight" in mlp:
        found["mlp.shared_experts.gate_weight"] = mlp["mlp.shared_expert_gate.weight"]
    if "mlp.gate.e_score_correction_bias" in mlp:
        found["mlp.router.expert_bias"] = mlp["mlp.gate.e_score_correction_bias"]
    return found


def _grouped(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values of each of the two groups, one group after the other."""
    found = {}
    for leaf in ("weight", "bias"):
        if f"self_attn.q_proj.{leaf}" in hf:
            parts = [hf[f"self_attn.{name}_proj.{leaf}"].chunk(2) for name in "qkv"]
            grouped = torch.cat([torch.cat(group) for group in zip(*parts, strict=True)])
            found[f"self_attention.linear_qkv.{leaf}"] = grouped
        if f"self_attn.o_proj.{leaf}" in hf:
            found[f"self_attention.linear_proj.{leaf}"] = hf[f"self_attn.o_proj.{leaf}"]
    for name in "qk":
        if f"self_attn.{name}_norm.weight" in hf:
            found[f"self_attention.{name}_layernorm.weight"] = hf[f"self_attn.{name}_norm.weight"]
    return found


def _latent(hf: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = {
        "q_proj": "linear_q_proj",
        "q_a_proj": "linear_q_down_proj",
        "q_a_layernorm": "q_layernorm",
        "q_b_proj": "linear_q_up_proj",
        "kv_a_proj_with_mqa": "linear_kv_down_proj",
        "kv_a_layernorm": "kv_layernorm",
        "kv_b_proj": "linear_kv_up_proj",
        "o_proj": "linear_proj",
    }
    return {
        f"self_attention.{ours}.weight": hf[f"self_attn.{theirs}.weight"]
        for theirs, ours in names.items()
        if f"self_attn.{theirs}.weight" in hf
    }
