"""What every file of one tag says of the run, and says alike: files of two saves do not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import base_state

# deepspeed/runtime/engine.py, `_common_checkpoint_state`; `iteration` is Megatron-DeepSpeed's.
_OF_MODEL = (
    "global_steps",
    "global_samples",
    "skipped_steps",
    "dp_world_size",
    "mp_world_size",
    "iteration",
)
_OF_CONFIG = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
)


def refuse_mixed_saves(checkpoint: DeepSpeedCheckpoint) -> None:
    """Every rank's file is of one run, at one place in it, at one learning rate.

    Raises:
        CheckpointError: two files contradict each other; names both.
    """
    first: dict[str, tuple[str, Any]] = {}
    for file, name, value in _said(checkpoint):
        before, expected = first.setdefault(name, (file, value))
        if value != expected:
            raise CheckpointError(
                f"{checkpoint.path}: {before} says {name} {expected}, {file} says {value}: files "
                "of two saves, or of two runs, in one folder. Restore the files of one save, or "
                f"{left_out('this checkpoint')}"
            )


def _said(checkpoint: DeepSpeedCheckpoint) -> Iterator[tuple[str, str, Any]]:
    """(file, name, value) of what all files, or all those of one kind, say alike."""
    for file in checkpoint.client_states:
        state = checkpoint.state(file)
        yield from ((file, name, state[name]) for name in _OF_MODEL if name in state)
    for file in (*checkpoint.client_states, *checkpoint.optim.values()):
        state = checkpoint.state(file)
        if "ds_version" in state:
            yield file, "ds_version", state["ds_version"]
        config = state.get("ds_config")
        if isinstance(config, Mapping):
            yield from ((file, f"ds_config {n}", config[n]) for n in _OF_CONFIG if n in config)
    for (mp, dp), file in checkpoint.optim.items():
        base = base_state(checkpoint.optimizer(dp, mp))
        groups = base.get("param_groups") if isinstance(base, Mapping) else None
        if groups:
            rates = [group.get("lr") for group in groups if isinstance(group, Mapping)]
            yield file, f"learning rates of model-parallel rank {mp}", rates
