"""Real models of transformers that were trained a few steps and saved, several times in a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerState, TrainingArguments

from pma_megatron import MergeRequest, SelectionRequest, merge

NAMES = ("step2-tokens16K", "step4-tokens32K", "step6-tokens48K")
INDEX, ONE = "model.safetensors.index.json", "model.safetensors"
GATE = "model.layers.0.mlp.gate_proj.weight"
VOCABULARY, LENGTH = 64, 8
STEPS = 2
"""Between two saves."""


def model(**changes: Any) -> LlamaForCausalLM:
    """A tiny model with random weights; `changes` are of its configuration."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY}
    torch.manual_seed(5)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **changes}))


class Text(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """Rows of tokens, the same ones each time."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, number: int) -> dict[str, torch.Tensor]:
        draw = torch.Generator().manual_seed(number)
        row = torch.randint(0, VOCABULARY, (LENGTH,), generator=draw)
        return {"input_ids": row, "labels": row}


def train_with_trainer(root: Path, saves: int) -> Path:
    """`checkpoint-N` of transformers' Trainer, with tied embeddings, in float32."""
    arguments = TrainingArguments(
        output_dir=str(root),
        max_steps=saves * STEPS,
        save_steps=STEPS,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        include_num_input_tokens_seen=True,
    )
    Trainer(model=model(tie_word_embeddings=True), args=arguments, train_dataset=Text()).train()
    return root


def train_and_save(root: Path, names: Sequence[str], shards: Sequence[str], **changes: Any) -> Path:
    """Folders of one bfloat16 model, one after each few steps, in files of up to `shards`.

    The Trainer's own state says the step; what would say it otherwise is the name.
    """
    trained = model(**changes).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
    for number, (name, size) in enumerate(zip(names, shards, strict=True), 1):
        for step in range(STEPS):
            rows = torch.stack([Text()[4 * step + n]["input_ids"] for n in range(4)])
            trained(input_ids=rows, labels=rows).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        trained.save_pretrained(root / name, max_shard_size=size)
        TrainerState(global_step=number * STEPS).save_to_json(root / name / "trainer_state.json")
    return root


def tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of a folder, as the library reads it."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (it is no mapping)
                yield name, opened.get_tensor(name)


def revisions(root: Path) -> Path:
    """Three revisions in other numbers of files, the newest with what goes with a model."""
    train_and_save(root, NAMES, ("5KB", "1GB", "8KB"))
    newest = root / NAMES[-1]
    (newest / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    (newest / "LICENSE").write_text("free\n")
    (newest / "README.md").write_text("of one revision\n")
    (newest / "optimizer.pt").write_bytes(b"of the trainer")
    return root


def averaged(root: Path, save: Path, **settings: object) -> Path:
    """The output of a merge, of all three revisions unless `settings` say otherwise."""
    settings.setdefault("selection", SelectionRequest(last=3))
    report = merge(MergeRequest(load=str(root), save=str(save), **settings))  # type: ignore[arg-type]
    return Path(report.outputs[0])
