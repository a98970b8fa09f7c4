"""The average in place of an engine's main params and weights, and then every bit as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from pma_megatron.deepspeed.checks import WAY_OUT
from pma_megatron.deepspeed.params import EngineTensor, refresh_weights
from pma_megatron.errors import UsageError
from pma_megatron.online.shard import Shard
from pma_megatron.online.swap import contents_restored
from pma_megatron.online.window import WindowAverage


@contextlib.contextmanager
def averaged_state(
    engine: Any, shard: Shard[EngineTensor], average: WindowAverage
) -> Iterator[None]:
    """What runs and what is saved inside the block has the average. Collective.

    Main params become the average on each rank, and weights follow as after an optimizer step.
    Moments, step counts and everything else stay the engine's.

    Args:
        engine: what `deepspeed.initialize` returned first.
        shard: of its `live_tensors`.
        average: of vectors of `shard`.
    """
    main = [slot.main() for slot in shard.slots]
    held = [*main, *weights(engine), *engine.module.buffers()]
    with _gathered_afresh(engine), contents_restored(held):
        for slot in shard.slots:
            slot.main().copy_(average.made(slot))
        refresh_weights(engine)
        yield


def weights(engine: Any) -> list[torch.Tensor]:
    """What this rank stores of the weights of the forward pass; under ZeRO-3 its part of each.

    Raises:
        UsageError: weights were swapped to NVMe.
    """
    stored = getattr(engine.optimizer, "fp16_partitioned_groups_flat", ())
    if any(group is None for group in stored):
        raise UsageError(
            "weights of the engine are swapped to NVMe (offload_param) and cannot be averaged in "
            f"place. {WAY_OUT}"
        )
    return [
        getattr(parameter, "ds_tensor", parameter).detach()
        for parameter in engine.module.parameters()
        if parameter.requires_grad
    ]


@contextlib.contextmanager
def _gathered_afresh(engine: Any) -> Iterator[None]:
    """After the block nothing is left of weights that ZeRO-3 gathered inside it."""
    try:
        yield
    finally:
        if hasattr(engine.optimizer, "fp32_partitioned_groups_flat"):
            engine.optimizer.checkpoint_event_prologue()
            engine.optimizer.checkpoint_event_epilogue()
