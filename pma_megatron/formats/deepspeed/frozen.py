"""Parameters that a tag holds and its optimizer does not: those that were frozen.

ZeRO keeps them in the model states as `frozen_param_fragments` (deepspeed/runtime/engine.py,
`_get_zero_frozen_param_attributes`), whole, or under ZeRO-3 each rank's part of
ceil(numel / ranks) elements.
"""

from __future__ import annotations

import math

from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import payload_of
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.geometry import Box, Piece, flat_range

_SHAPES, _FRAGMENTS = "frozen_param_shapes", "frozen_param_fragments"


def frozen_of(checkpoint: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    """Frozen parameters by model key, as far as a ZeRO tag holds them."""
    found: dict[str, Tensor] = {}
    for (mp, dp), file in checkpoint.model.items():
        state = checkpoint.state(file)
        shapes, fragments = state.get(_SHAPES) or {}, state.get(_FRAGMENTS) or {}
        for name, saved in shapes.items():
            ref, shape = fragments.get(name), tuple(saved)
            if not isinstance(ref, TensorRef) or not ref.is_contiguous():
                continue
            key, payload = checkpoint.key(name, mp), payload_of(checkpoint.item(file), ref)
            pieces = _pieces(shape, ref, payload, dp, checkpoint.data_parallel_size)
            there = found[key].pieces if key in found else ()
            found[key] = Tensor(key, ref.storage.dtype, shape, (*there, *pieces))
    return found


def _pieces(
    shape: tuple[int, ...], ref: TensorRef, payload: Payload, rank: int, ranks: int
) -> tuple[Piece[Payload], ...]:
    whole, numel = Box((0,) * len(shape), shape), math.prod(shape)
    if ref.size == shape:
        return (Piece(whole, payload, ref.offset),) if rank == 0 else ()
    share = -(-numel // ranks)
    low, high = min(rank * share, numel), min((rank + 1) * share, numel)
    if math.prod(ref.size) < high - low:
        return ()
    parts = flat_range(whole, low, high)
    return tuple(Piece(box, payload, ref.offset + first - low) for box, first in parts)
