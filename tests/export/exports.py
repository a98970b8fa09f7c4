"""A run to export, the folder of a model like it, and what the model must hold, by other means."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from conftest import DENSE, folder_of
from pma_megatron import MergeReport, MergeRequest, SelectionRequest, merge
from pma_megatron.testing import TinyTrainer

HEADS, GROUPS, WIDTH = 4, 2, 8
RUN = replace(
    DENSE,
    hidden_size=HEADS * WIDTH,
    num_attention_heads=HEADS,
    num_query_groups=GROUPS,
    tensor_model_parallel_size=2,
)
"""Rows of one tensor lie on two ranks, or halves of each row; queries share keys and values."""
VOCABULARY = 250  # of 256 rows, as Megatron pads them
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HEADS * WIDTH,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": WIDTH,
    "vocab_size": VOCABULARY,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}, "added_tokens": []}
MODEL = "model.safetensors"
SHARD_BYTES = 20_000


def template(folder: Path, **changes: Any) -> Path:
    """The folder of a model that the run could be of; `changes` to its configuration, None for a
    field that is to be left out."""
    folder.mkdir()
    config = {k: v for k, v in {**CONFIG, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    (folder / "LICENSE").write_text("do as you please\n")
    (folder / "README.md").write_text("of the template\n")
    (folder / "model.safetensors").write_bytes(b"weights of the template")
    return folder


def train(
    rank: int, world_size: int, root: str, saves: int, like: str, model: str
) -> list[dict[str, Any]]:
    """Train `RUN`, save every second iteration; what this rank held at each save.

    Then both ranks export the average together, into several files, and once more from disks of
    their own, the newest on the second rank's.
    """
    trainer, held = TinyTrainer(RUN), []
    for _ in range(saves):
        trainer.train(2)
        trainer.save(root)
        held.append(trainer.snapshot())
    trainer.close()
    averaged(Path(root), Path(model), Path(like), max_shard_bytes=SHARD_BYTES)
    node, here = Path(model).parent / f"node{rank}", Path.cwd()
    folders = [folder_of(Path(root), 2 * number) for number in range(1, saves + 1)]
    for folder in folders[-1:] if rank else folders[:-1]:
        shutil.copytree(folder, node / "run" / folder.name)
    os.chdir(node)
    save = Path(model).parent / "local"
    averaged(Path("run"), save, Path(like), merge_parallel_size=world_size, dtype="fp32")
    os.chdir(here)
    return held


def averaged(run: Path, save: Path, like: Path | None, **settings: Any) -> MergeReport:
    """An average of the last three as a model alone."""
    settings.setdefault("selection", SelectionRequest(last=3))
    template = None if like is None else str(like)
    return merge(MergeRequest(load=str(run), export=str(save), like=template, **settings))


def as_llama(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Megatron's global tensors as `transformers` calls and divides them, in plain numpy."""
    named = {
        "model.embed_tokens.weight": tensors["embedding.word_embeddings.weight"][:VOCABULARY],
        "lm_head.weight": tensors["output_layer.weight"][:VOCABULARY],
        "model.norm.weight": tensors["decoder.final_layernorm.weight"],
    }
    for number in range(2):

        def of(key: str, number: int = number) -> np.ndarray:
            return tensors[f"decoder.layers.{key}"][number]

        qkv = of("self_attention.linear_qkv.weight")
        grouped = qkv.reshape(GROUPS, HEADS // GROUPS + 2, WIDTH, HEADS * WIDTH)
        gate, up = np.split(of("mlp.linear_fc1.weight"), 2)
        layer = {
            "self_attn.q_proj": grouped[:, :-2].reshape(-1, HEADS * WIDTH),
            "self_attn.k_proj": grouped[:, -2].reshape(-1, HEADS * WIDTH),
            "self_attn.v_proj": grouped[:, -1].reshape(-1, HEADS * WIDTH),
            "self_attn.o_proj": of("self_attention.linear_proj.weight"),
            "mlp.gate_proj": gate,
            "mlp.up_proj": up,
            "mlp.down_proj": of("mlp.linear_fc2.weight"),
            "input_layernorm": of("self_attention.linear_qkv.layer_norm_weight"),
            "post_attention_layernorm": of("mlp.linear_fc1.layer_norm_weight"),
        }
        named |= {f"model.layers.{number}.{key}.weight": value for key, value in layer.items()}
    return named


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of an export, by the library."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                assert name not in found
                found[name] = opened.get_tensor(name)
    return found
