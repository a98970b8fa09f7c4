"""Tiny models of each family: how Megatron trains one, and the configuration it has elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.testing import TinyConfig, TinyTrainer, corpus
from pma_megatron.testing.core_api import evaluating, unwrap

TOLERANCE = 1e-4
"""Between two float32 implementations of one model: of a logit, and of a loss."""
VOCABULARY, PADDED = 96, 128
DENSE = TinyConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    seq_length=32,
    vocab_size=PADDED,
    bf16=False,
    use_distributed_optimizer=False,
    micro_batch_size=2,
    global_batch_size=4,
)
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
EXPERTS = {"moe_router_score_function": "softmax", "moe_router_dtype": "fp32"}
SOFTMAX_MOE = replace(DENSE, num_experts=4, expert_bias=False, core=EXPERTS)
LATENT = {
    "multi_latent_attention": True,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_head_dim": 16,
    "qk_pos_emb_head_dim": 8,
    "v_head_dim": 12,
    "kv_channels": 12,
    "rope_type": "rope",
    "rotary_scaling_factor": 1.0,
    "mscale_all_dim": 0.0,
    "layernorm_epsilon": 1e-6,
}


ROTARY = {"rotary_base": 10000, "rotary_percent": 1.0, "use_rope_scaling": False}
"""What `GPTModel` is told, and no field of its TransformerConfig; TinyTrainer leaves them so."""


@dataclass(frozen=True)
class Case:
    """A run of Megatron, and the `config.json` of the same model."""

    run: TinyConfig
    model_type: str
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, Any]:
        return {"model_type": self.model_type, **SIZES, **self.fields}


DEEPSEEK = Case(
    replace(
        DENSE,
        num_layers=3,
        num_query_groups=None,
        num_experts=8,
        moe_router_topk=4,
        qk_layernorm=True,
        core={
            **LATENT,
            "moe_layer_freq": [0, 1, 1],
            "moe_ffn_hidden_size": 32,
            "moe_shared_expert_intermediate_size": 64,
            "moe_router_dtype": "fp32",
            "moe_router_num_groups": 4,
            "moe_router_group_topk": 2,
            "moe_router_topk_scaling_factor": 2.5,
        },
    ),
    "deepseek_v3",
    {
        "num_hidden_layers": 3,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "rms_norm_eps": 1e-6,
        "q_lora_rank": 24,
        "kv_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 12,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
)
YARN = {
    "rope_type": "yarn",
    "rotary_scaling_factor": 4.0,
    "mscale": 0.7,
    "mscale_all_dim": 0.9,
    "original_max_position_embeddings": 16,
}

CASES = {
    "llama": Case(DENSE, "llama"),
    "llama with biases": Case(
        replace(DENSE, core={"add_bias_linear": True}),
        "llama",
        {"attention_bias": True, "mlp_bias": True},
    ),
    "llama, tied": Case(
        replace(DENSE, tie_embeddings=True), "llama", {"tie_word_embeddings": True}
    ),
    "mistral": Case(
        replace(DENSE, vocab_size=VOCABULARY, mtp_num_layers=1, core={"kv_channels": 8}),
        "mistral",
        {"head_dim": 8, "sliding_window": None},
    ),
    "qwen2": Case(replace(DENSE, core={"add_qkv_bias": True}), "qwen2"),
    "qwen2_moe": Case(
        replace(
            SOFTMAX_MOE,
            core={
                **EXPERTS,
                "add_qkv_bias": True,
                "moe_ffn_hidden_size": 32,
                "moe_shared_expert_intermediate_size": 48,
                "moe_shared_expert_gate": True,
                "moe_router_pre_softmax": True,
            },
        ),
        "qwen2_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
        },
    ),
    "qwen3": Case(
        replace(DENSE, qk_layernorm=True, num_layers=3), "qwen3", {"num_hidden_layers": 3}
    ),
    "qwen3_moe": Case(
        replace(SOFTMAX_MOE, qk_layernorm=True, ffn_hidden_size=32),
        "qwen3_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe, dense first": Case(
        replace(
            SOFTMAX_MOE,
            qk_layernorm=True,
            core={
                **EXPERTS,
                "moe_layer_freq": [0, 1],
                "moe_ffn_hidden_size": 32,
                "moe_router_pre_softmax": True,
            },
        ),
        "qwen3_moe",
        {
            "num_experts": 4,
            "moe_intermediate_size": 32,
            "norm_topk_prob": False,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [0],
        },
    ),
    "mixtral": Case(SOFTMAX_MOE, "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3 with yarn": replace(
        DEEPSEEK,
        run=replace(DEEPSEEK.run, core={**DEEPSEEK.run.core, **YARN, "q_lora_rank": None}),
        fields={
            **DEEPSEEK.fields,
            "q_lora_rank": None,
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.9,
                "beta_fast": 32,
                "beta_slow": 1,
                "original_max_position_embeddings": 16,
            },
        },
    ),
}


@dataclass(frozen=True)
class Computed:
    """What Megatron says of one case.

    Attributes:
        logits: `[2, 32, vocabulary]` float32, of its own model with the averaged weights.
        settings: its TransformerConfig, which Megatron-LM fills from arguments of the same names.
    """

    logits: torch.Tensor
    settings: dict[str, Any]


def trained(rank: int, world_size: int, folder: str, names: list[str]) -> dict[str, Computed]:
    """Train each case below `folder`; its two checkpoints become an average and an export."""
    computed = {}
    for name in names:
        run = CASES[name].run
        root, save = str(Path(folder) / name), str(Path(folder) / f"{name} merged")
        trainer = TinyTrainer(run)
        _shake(trainer)
        for _ in range(2):
            trainer.train(1)
            trainer.save(root)
        merge(
            MergeRequest(
                load=root,
                save=save,
                export=str(Path(folder) / f"{name} exported"),
                like=str(_template(Path(folder) / f"{name} template", CASES[name])),
                dtype="fp32",
                selection=SelectionRequest(last=2),
            )
        )
        _shake(trainer)
        trainer.load(save)
        settings = {
            name: value
            for name, value in vars(trainer.models[0].config).items()
            if value is None or isinstance(value, (bool, int, float, str, list))
        }
        computed[name] = Computed(_logits(trainer), settings)
        trainer.close()
    return computed


PARALLEL = {
    "qwen2": {"tensor_model_parallel_size": 2},
    "llama, tied": {"pipeline_model_parallel_size": 2},
    "qwen3_moe, dense first": {"expert_model_parallel_size": 2},
}
"""Cases that two ranks train in parts."""


def trained_in_parts(rank: int, world_size: int, folder: str) -> dict[str, float]:
    """Train and save `PARALLEL` once; the loss of each on one held-out global batch."""
    losses = {}
    for name, sizes in PARALLEL.items():
        trainer = TinyTrainer(replace(CASES[name].run, **sizes))
        trainer.train(2)
        trainer.save(Path(folder) / name)
        losses[name] = trainer.evaluate(1)
        trainer.close()
    return losses


def held_out_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """What `evaluate(1)` takes the loss of: inputs and labels, each `[4, 32]`."""
    return corpus.batch(
        list(range(DENSE.global_batch_size)),
        seq_length=DENSE.seq_length,
        seed=DENSE.seed,
        vocab_size=PADDED,
        held_out=True,
    )


def tokens() -> torch.Tensor:
    """Two held-out samples, `[2, 33]`: inputs, and labels one further."""
    inputs, labels = corpus.batch(
        [0, 1], seq_length=32, seed=1, vocab_size=VOCABULARY, held_out=True
    )
    return torch.cat([inputs, labels[:, -1:]], dim=1)


def loss_of(logits: torch.Tensor) -> float:
    """Mean cross-entropy of `tokens()` over the vocabulary without its padding."""
    labels = tokens()[:, 1:]
    return float(functional.cross_entropy(logits[..., :VOCABULARY].flatten(0, 1), labels.flatten()))


def _template(folder: Path, case: Case) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(case.config))
    return folder


def _shake(trainer: TinyTrainer) -> None:
    """Move every weight far from where it starts, so that none equals another by accident."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, value in (
            *trainer.models[0].named_parameters(),
            *trainer.models[0].named_buffers(),
        ):
            noise = torch.randn(value.shape, generator=generator)
            value.add_(
                (0.02 if "expert_bias" in name else 0.2 if value.dim() == 1 else 0.1) * noise
            )


def _logits(trainer: TinyTrainer) -> torch.Tensor:
    """What the output layer gives last: with MTP, Megatron's model gives losses alone."""
    model, given = unwrap(trainer.models[0]), []
    inputs, labels = tokens()[:, :-1], tokens()[:, 1:].contiguous()
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    keep = lambda *args: given.append(args[-1][0].clone())  # noqa: E731 (the loss overwrites it)
    hook = model.output_layer.register_forward_hook(keep)
    with evaluating(trainer.models):
        model(inputs, positions, None, labels=labels)
    hook.remove()
    return given[-1].transpose(0, 1).contiguous().float()
