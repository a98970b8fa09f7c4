"""The end of the quickstart: the average as a Hugging Face model, opened by `transformers`."""

from __future__ import annotations

from pathlib import Path

import torch

from pma_megatron.testing import TinyConfig, corpus


def write_template(folder: Path, config: TinyConfig) -> None:
    """What `--like` names: the configuration of the model that was trained, as Mixtral's.

    A real run has the folder of the model whose tokenizer it uses. This one reads bytes.
    """
    from transformers import MixtralConfig

    MixtralConfig(
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_query_groups or config.num_attention_heads,
        head_dim=config.hidden_size // config.num_attention_heads,
        num_local_experts=config.num_experts,
        num_experts_per_tok=config.moe_router_topk,
        vocab_size=config.vocab_size,
        max_position_embeddings=config.seq_length,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        sliding_window=None,
        dtype="bfloat16",
    ).save_pretrained(folder)


def held_out_loss(folder: Path, config: TinyConfig, batches: int) -> float:
    """Loss of an exported model, nats per byte, on the text that `TinyTrainer.evaluate` reads."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
    losses = []
    for number in range(batches):
        first = number * config.global_batch_size
        numbers = list(range(first, first + config.global_batch_size))
        inputs, labels = corpus.batch(
            numbers,
            seq_length=config.seq_length,
            seed=config.seed,
            vocab_size=config.vocab_size,
            held_out=True,
        )
        with torch.no_grad():
            logits = model(inputs).logits.float()
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    return float(torch.stack(losses).mean())
