"""What must happen around a change of a live model's weights, and who else holds the same ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pma_megatron.megatron.params import parts


def replica_group(expert: bool) -> Any:
    """The process group of the ranks that hold the same part of the model as this one."""
    from megatron.core import parallel_state

    if expert:
        return parallel_state.get_expert_data_parallel_group()
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


@contextlib.contextmanager
def forward_hooks_off(models: Sequence[Any]) -> Iterator[None]:
    """No parameter all-gather in flight, and none started by a forward pass, inside the block.

    For `overlap_param_gather`: Megatron does the same around evaluation (training.py, `train`).
    """
    hooked = [m for m in models if getattr(m, "remove_forward_pre_hook_handles", None)]
    for model in hooked:
        model.disable_forward_pre_hook()
    try:
        yield
    finally:
        for model in hooked:
            model.enable_forward_pre_hook()


@contextlib.contextmanager
def rates_kept(optimizer: Any) -> Iterator[None]:
    """Learning rates, weight decay and the like of the param groups outlast a load in the block."""
    own = ("params", "step")
    before = [
        {name: value for name, value in group.items() if name not in own}
        for group in optimizer.param_groups
    ]
    yield
    for group, kept in zip(optimizer.param_groups, before, strict=True):
        group.update(kept)


def refresh_weights(models: Sequence[Any], optimizer: Any) -> None:
    """Weights of the forward pass from the main params, as after an optimizer step. Collective."""
    with torch.no_grad():
        for part in parts(optimizer):
            if hasattr(part, "_copy_main_params_to_model_params"):
                part._copy_main_params_to_model_params()
    gather_weights(models)


def gather_weights(models: Sequence[Any]) -> None:
    """Each replica's part of the weights to all, where main params are sharded. Collective."""
    with torch.no_grad():
        for model in models:
            if getattr(getattr(model, "ddp_config", None), "use_distributed_optimizer", False):
                model.start_param_sync(force_sync=True)
