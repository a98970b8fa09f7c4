"""The tensors of a live FSDP2 model: which part of each this rank holds, and its moments.

A parameter is a DTensor (torch/distributed/fsdp/_fully_shard): what a rank holds of it is one box,
uneven where no number of ranks divides the tensor, and empty on ranks beyond the last row.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from pma_megatron.base.boxes import Box
from pma_megatron.errors import UsageError
from pma_megatron.live.param import Place
from pma_megatron.merging.policy import MAIN

_ROUNDED = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False, slots=True)
class FsdpTensor:
    """One parameter or floating buffer that a checkpoint holds (`live.param.LiveTensor`).

    Attributes:
        name: the model's own.
        places: its part of this rank.
        local: what the rank holds of it.
        moments: state -> what the rank holds of that; empty for what no optimizer trains.
    """

    name: str
    places: tuple[Place, ...]
    local: torch.Tensor
    moments: Mapping[str, torch.Tensor]
    trained: bool
    expert: bool = False
    sharded: bool = True
    by_copy: bool = False
    first: int = 0

    @property
    def numel(self) -> int:
        """Elements that this rank holds."""
        return self.local.numel()

    def states(self) -> dict[str, torch.Tensor]:
        """`param` and moments, as stored."""
        return {MAIN: self.local, **self.moments}

    def set_states(self, states: Mapping[str, torch.Tensor]) -> None:
        """Nothing: `states` are views."""


def live_tensors(model: Any, optimizer: Any) -> list[FsdpTensor]:
    """Every floating parameter and buffer that a checkpoint holds, in the order of the model.

    Args:
        model: after `fully_shard`.
        optimizer: of its parameters, with a state.

    Raises:
        UsageError: parameters of 16 bits, or what a rank holds is not one part of a tensor.
    """
    states: Any = get_optimizer_state_dict(model, optimizer)["state"]
    found = []
    for name, value in get_model_state_dict(model).items():
        if not isinstance(value, torch.Tensor) or not value.is_floating_point():
            continue
        own = states.get(name, {}) if isinstance(states, dict) else {}
        if own and value.dtype in _ROUNDED:
            raise UsageError(
                f"{name} is trained in {value.dtype}: an average in place would round every "
                "source. Keep parameters in float32 (MixedPrecisionPolicy), or merge offline"
            )
        moments = {
            state: _local(held, f"{state} of {name}")
            for state, held in own.items()
            if isinstance(held, torch.Tensor) and held.shape == value.shape and state != "step"
        }
        local = _local(value, name)
        place = Place(name, tuple(value.shape), _box(value), 0, first_replica=True)
        found.append(FsdpTensor(name, (place,), local, moments, bool(own)))
    return found


def _local(value: torch.Tensor, name: str) -> torch.Tensor:
    local = (value.to_local() if isinstance(value, DTensor) else value).detach()
    if not local.is_contiguous():
        raise UsageError(
            f"{name}: this rank's part does not lie in one piece ({tuple(local.stride())}), and "
            "an average is made in place: merge offline, and load the result"
        )
    return local


def _box(value: torch.Tensor) -> Box:
    """The part of the tensor that this rank holds, as DCP would save it."""
    if not isinstance(value, DTensor):
        return Box.whole(value.shape)
    chunks = value.__create_chunk_list__()
    held = [chunk for chunk in chunks if 0 not in chunk.sizes]
    if len(held) > 1:
        raise UsageError(
            f"a tensor of shape {tuple(value.shape)} lies on this rank in {len(held)} parts: merge "
            "offline, and load the result"
        )
    sizes = tuple(value.to_local().shape)
    return Box(tuple(held[0].offsets), sizes) if held else Box((0,) * value.ndim, sizes)
