"""The average in place of the live weights, for a while, and then every bit as it was."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from pma_megatron.megatron.params import MegatronTensor
from pma_megatron.megatron.replicas import forward_hooks_off, gather_weights
from pma_megatron.merging.policy import MAIN
from pma_megatron.online.shard import Shard, VectorPart
from pma_megatron.online.swap import contents_restored, host_copy
from pma_megatron.online.window import WindowAverage


@contextlib.contextmanager
def averaged_weights(
    models: Sequence[Any],
    tensors: Sequence[MegatronTensor],
    shard: Shard[MegatronTensor],
    average: WindowAverage,
) -> Iterator[None]:
    """Forward passes inside the block use the average; main params are not touched. Collective.

    Args:
        models: the chunks, as Megatron's training passes them around.
        tensors: all of `live_tensors`, whether this rank owns a part or not.
        shard: their owned parts.
        average: of vectors of `shard`.
    """
    with weights_restored(models, tensors):
        _set_weights(models, shard, average)
        yield


@contextlib.contextmanager
def weights_restored(models: Sequence[Any], tensors: Sequence[MegatronTensor]) -> Iterator[None]:
    """Whatever the block writes into `tensors`, at its end every bit is as it was."""
    with forward_hooks_off(models), contents_restored(live.tensor for live in tensors):
        yield


@contextlib.contextmanager
def averaged_state(
    models: Sequence[Any],
    tensors: Sequence[MegatronTensor],
    shard: Shard[MegatronTensor],
    average: WindowAverage,
) -> Iterator[None]:
    """As `averaged_weights`, and main params are the average too: what is saved inside the block
    resumes from it. Moments, step counts and everything else stay the trainer's."""
    kept: list[tuple[VectorPart[MegatronTensor], torch.Tensor]] = []
    with weights_restored(models, tensors):
        try:
            for slot in shard.slots:
                values = average.made(slot)  # formed once, for both
                if slot.live.trained:
                    kept.append((slot, host_copy(slot.main())))
                _weights(slot).copy_(values)
                if slot.live.trained:
                    _set_main(slot, values)
            gather_weights(models)
            yield
        finally:
            for slot, before in kept:
                _set_main(slot, before)


def backup_bytes(tensors: Sequence[MegatronTensor], shard: Shard[MegatronTensor]) -> int:
    """Host memory that `averaged_state` takes, which is more than `averaged_weights` does."""
    weights = sum(live.tensor.numel() * live.tensor.element_size() for live in tensors)
    return weights + shard.nbytes


def _set_weights(
    models: Sequence[Any], shard: Shard[MegatronTensor], average: WindowAverage
) -> None:
    for slot in shard.slots:
        _weights(slot).copy_(average.made(slot))  # rounded once, as by an optimizer step
    gather_weights(models)


def _weights(slot: VectorPart[MegatronTensor]) -> torch.Tensor:
    """The elements of the tensor that the forward pass uses, 1-D, shared."""
    return slot.live.tensor.detach().view(-1)[slot.live.first :][: slot.live.numel]


def _set_main(slot: VectorPart[MegatronTensor], values: torch.Tensor) -> None:
    live = slot.live
    main = live.states()[MAIN].detach()
    main.copy_(values.view_as(main))
    if live.by_copy and main.data_ptr() != live.states()[MAIN].data_ptr():
        # Without the moments: setting those again would quantize them again.
        live.part._set_main_param_and_optimizer_states(live.tensor, {MAIN: main})
