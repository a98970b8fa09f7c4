"""Parameters that a tag of ZeRO-3 holds and its optimizer does not: those that were frozen.

Every rank's model states have its part of each, ceil(numel / ranks) elements, as
`frozen_param_fragments` (deepspeed/runtime/engine.py, `_get_zero_frozen_param_attributes`).
"""

from __future__ import annotations

import math

from pma_megatron.base.boxes import Box, Piece, flat_range
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.partitions import payload_of
from pma_megatron.formats.pickles import TensorRef

_SHAPES, _FRAGMENTS = "frozen_param_shapes", "frozen_param_fragments"


def frozen_fragments(checkpoint: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    """Frozen parameters by model key, in the pieces that lie in the files of the ranks."""
    found: dict[str, Tensor] = {}
    for (mp, rank), file in checkpoint.model.items():
        state = checkpoint.state(file)
        fragments = state.get(_FRAGMENTS) or {}
        for name, saved in (state.get(_SHAPES) or {}).items():
            ref, shape = fragments.get(name), tuple(saved)
            numel = math.prod(shape)
            share = -(-numel // checkpoint.data_parallel_size)
            low, high = min(rank * share, numel), min((rank + 1) * share, numel)
            if not isinstance(ref, TensorRef) or math.prod(ref.size) < high - low:
                continue  # then it is not whole, which is refused where it is wanted
            key, payload = checkpoint.key(name, mp), payload_of(checkpoint.item(file), ref)
            parts = flat_range(Box((0,) * len(shape), shape), low, high)
            pieces = [Piece(box, payload, ref.offset + first - low) for box, first in parts]
            there = found[key].pieces if key in found else ()
            found[key] = Tensor(key, ref.storage.dtype, shape, (*there, *pieces))
    return found
