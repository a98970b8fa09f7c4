"""The part that exports what was trained, as a Hugging Face model, in the pass that merges it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch

from gpu.core import ITERATIONS, offline, resumed, trained
from gpu.findings import Finding, found, not_here
from gpu.job import Job
from gpu.oracle import Tensors, differing
from pma_megatron.testing import TinyConfig, corpus

_NEAR = 1e-4
"""Between two float32 implementations of one model, of a loss in nats."""


def merged(job: Job) -> Iterator[Finding]:
    """One merge that makes a checkpoint and a model: both hold the same weights.

    What the model should hold is what Megatron's own load of the merged checkpoint gives, with
    rows moved here by plain indexing.
    """
    base = job.config()
    base = replace(base, num_query_groups=base.num_attention_heads // 2)
    whole = replace(base, bf16=False, use_distributed_optimizer=False)
    for kind, config in {"distributed optimizer": base, "FP32 optimizer": whole}.items():
        with job.scratch(f"export {kind}") as folder:
            yield from _exported(kind, config, folder)


def _exported(kind: str, config: TinyConfig, folder: Path) -> Iterator[Finding]:
    from safetensors.torch import load_file

    run = trained(config, folder / "run")
    model, like = folder / "model", _like(folder / "like", config)
    dtype = "bf16" if config.bf16 else "fp32"
    checkpoint = offline(
        run.root, folder / "merged", export=str(model), like=str(like), dtype=dtype
    )
    held, loss = resumed(config, checkpoint)
    weights = {n[7:]: value for n, value in held.items() if n.startswith("weight ")}
    got = {
        name: value
        for path in sorted(model.glob("*.safetensors"))
        for name, value in load_file(path).items()
    }
    yield found(
        f"{kind}: the exported model is the resumed merge, bit for bit",
        differing(got, _as_llama(weights, config)),
        iteration=ITERATIONS[-1],
    )
    if config.bf16:  # there two implementations differ by roundings
        return
    name = f"{kind}: its held-out loss by transformers is that of the resumed merge"
    if find_spec("transformers") is None:
        yield not_here(name, "transformers is not installed")
        return
    other = _loss(model, config)
    wrong = [] if abs(other - loss) <= _NEAR else [f"loss {other} there, {loss} in Megatron"]
    yield found(name, wrong, loss=loss, by_transformers=other)


def _like(folder: Path, config: TinyConfig) -> Path:
    """The folder of a model like the one that was trained."""
    folder.mkdir()
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_query_groups,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": config.seq_length,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16" if config.bf16 else "float32",
        "hidden_act": "silu",
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _as_llama(weights: Tensors, config: TinyConfig) -> dict[str, torch.Tensor]:
    """Megatron's weights of one rank under the names of a Llama."""
    result = {
        "model.embed_tokens.weight": weights["embedding.word_embeddings.weight"],
        "model.norm.weight": weights["decoder.final_layernorm.weight"],
        "lm_head.weight": weights["output_layer.weight"],
    }
    groups = config.num_query_groups
    assert groups is not None
    width, heads = config.hidden_size // config.num_attention_heads, config.num_attention_heads
    for layer in range(config.num_layers):
        here, there = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        # Of each group of queries: the queries, their key, their value.
        rows = weights[f"{here}self_attention.linear_qkv.weight"]
        rows = rows.view(groups, heads // groups + 2, width, config.hidden_size)
        parts = {"q": rows[:, :-2], "k": rows[:, -2], "v": rows[:, -1]}
        for name, part in parts.items():
            result[f"{there}self_attn.{name}_proj.weight"] = part.reshape(-1, config.hidden_size)
        gate, up = weights[f"{here}mlp.linear_fc1.weight"].chunk(2)
        result |= {
            f"{there}self_attn.o_proj.weight": weights[f"{here}self_attention.linear_proj.weight"],
            f"{there}mlp.gate_proj.weight": gate,
            f"{there}mlp.up_proj.weight": up,
            f"{there}mlp.down_proj.weight": weights[f"{here}mlp.linear_fc2.weight"],
            f"{there}input_layernorm.weight": weights[f"{here}input_layernorm.weight"],
            f"{there}post_attention_layernorm.weight": weights[f"{here}pre_mlp_layernorm.weight"],
        }
    return result


def _loss(folder: Path, config: TinyConfig) -> float:
    """Of the text that `TinyTrainer.evaluate(1)` reads, in float32 on the CPU."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).float().eval()
    inputs, labels = corpus.batch(
        list(range(config.global_batch_size)),
        seq_length=config.seq_length,
        seed=config.seed,
        vocab_size=config.vocab_size,
        held_out=True,
    )
    with torch.no_grad():
        scores = model(inputs).logits.float()
    return float(torch.nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten()))
