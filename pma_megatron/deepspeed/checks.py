"""What a live DeepSpeed engine cannot do, refused by name before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from pma_megatron.base.spelling import given
from pma_megatron.errors import PlanError, UsageError
from pma_megatron.formats.deepspeed.checkpoint import TIED, DeepSpeedCheckpoint
from pma_megatron.storage.paths import path_of

WAY_OUT = "Use the offline job, `pma merge`, and load its result"
WRAPPERS = (
    "DeepSpeedZeroOptimizer",
    "BF16_Optimizer",
    "DeepSpeedZeroOptimizer_Stage3",
    "FP16_Optimizer",
    "FP16_UnfusedOptimizer",
)
"""DeepSpeed's optimizers that are known."""

_KINDS: Mapping[str, tuple[str, ...]] = {
    "DeepSpeedZeroOptimizer": ("ZeRO-1", "ZeRO-2"),
    "DeepSpeedZeroOptimizer_Stage3": ("ZeRO-3",),
    "BF16_Optimizer": ("BF16_Optimizer",),
}


def supported(engine: Any) -> Any:
    """The engine's optimizer, if it and all it holds are in reach.

    Raises:
        UsageError: they are not.
    """
    optimizer = engine.optimizer
    kind = type(optimizer).__name__
    if kind not in WRAPPERS and not isinstance(optimizer, torch.optim.Optimizer):
        raise UsageError(
            f"optimizer {kind} of DeepSpeed cannot be averaged in place: known are "
            f"{', '.join(WRAPPERS)} and torch's. {WAY_OUT}"
        )
    if kind == "BF16_Optimizer" and not optimizer.using_real_optimizer:
        raise UsageError(
            "the engine has no optimizer, so it has no main params to average. Give "
            "deepspeed.initialize one"
        )
    on_nvme = ("swap_optimizer", "params_in_nvme_and_cpu")
    if any(getattr(optimizer, name, False) for name in on_nvme):
        raise UsageError(f"states on NVMe cannot be averaged in place. {WAY_OUT}")
    if is_pipeline(engine) and not engine.zero_optimization():
        tied = any(name.startswith(TIED) for name in engine.param_names.values())
        if tied or kind == "BF16_Optimizer":
            why = "its tied layers have no names in a tag" if tied else "DeepSpeed resumes no bf16"
            raise UsageError(
                f"a PipelineModule without ZeRO cannot be averaged in place: {why}. Use "
                "zero_optimization.stage 1"
            )
    if getattr(optimizer, "offloaded_states", None):
        raise UsageError(
            "states of the engine are offloaded (engine.offload_states) and cannot be averaged in "
            "place. Call engine.reload_states() first"
        )
    return optimizer


def refuse_other_dtype(name: str, main: torch.Tensor) -> None:
    """Main params must be float32.

    Raises:
        UsageError: they are not.
    """
    if main.dtype != torch.float32:
        raise UsageError(
            f"main params of {name} are {main.dtype}, expected float32: an average would be "
            "rounded. Turn bf16_master_weights_and_grads and fp16_master_weights_and_grads off, "
            "and enable bf16 or fp16 in DeepSpeed's configuration where the model has 16 bits"
        )


def refuse_universal(engine: Any) -> None:
    """An engine that loads Universal checkpoints loads no tag.

    Raises:
        UsageError: it does.
    """
    if engine.load_universal_checkpoint():
        raise UsageError(
            "checkpoint.load_universal is on, and Universal checkpoints are not averaged in a live "
            f"engine. {WAY_OUT}"
        )


def refuse_modes(call: Mapping[str, Any]) -> None:
    """Ways to load that leave a run's main params, moments or step behind.

    Raises:
        UsageError: `call`, arguments of `load_checkpoint` by name, asks for one.
    """
    for name, value, instead in (
        (
            "load_optimizer_states",
            False,
            f"For fresh moments use {given('optimizer_state', 'reset')}",
        ),
        ("load_module_only", True, "For weights alone load the offline job's result so"),
    ):
        if bool(call.get(name, not value)) == value:
            raise UsageError(
                f"load_checkpoint({name}={value}) does not resume a run, and PMA-init continues "
                f"one. Leave it out. {instead}"
            )


def saved_sizes(path: str) -> tuple[int, int]:
    """Model-parallel and data-parallel size that a tag was saved at, by one rank for all: it lists
    a folder of as many files as there were ranks."""
    saved = DeepSpeedCheckpoint(path_of(path))
    return saved.model_parallel_size, saved.data_parallel_size


def refuse_unresumable(engine: Any, path: str, kind: str, sizes: tuple[int, int]) -> None:
    """A tag that DeepSpeed's own load would refuse halfway, or take for another.

    Args:
        engine: that is to load it.
        path: the tag.
        kind: what it was saved by.
        sizes: of it, see `saved_sizes`.

    Raises:
        PlanError: it is of another stage or of other sizes.
    """
    kinds = _KINDS.get(type(engine.optimizer).__name__, ("ZeRO-0",))
    if kind not in kinds:
        raise PlanError(
            f"{path} was saved by {kind}, and the engine runs {' or '.join(kinds)}: DeepSpeed does "
            "not resume it. Keep zero_optimization.stage and data_types as they were"
        )
    for what, size, now in (
        ("model-parallel", sizes[0], engine.mp_world_size),
        ("data-parallel", sizes[1], engine.seq_dp_world_size),
    ):
        if size != now and (what == "model-parallel" or kind != "ZeRO-0"):
            raise PlanError(
                f"{path} was saved at {what} size {size}, and the engine has {now}: DeepSpeed "
                "resumes no other. Start as many ranks, or make a Universal checkpoint "
                "(ds_to_universal) of the offline merge"
            )


def is_pipeline(engine: Any) -> bool:
    """True for a model made of DeepSpeed's pipeline stages."""
    return any(base.__name__ == "PipelineModule" for base in type(engine.module).__mro__)
