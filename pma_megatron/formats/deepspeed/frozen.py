"""Parameters that a tag of ZeRO-3 holds and its optimizer does not: those that were frozen.

Every rank's model states have its part of each, ceil(numel / ranks) elements, as
`frozen_param_fragments` (deepspeed/runtime/engine.py, `_get_zero_frozen_param_attributes`).
"""

from __future__ import annotations

import math

import torch

from pma_megatron.base.boxes import Piece
from pma_megatron.formats.base import Payload, Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.items import payload_of
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.shares import share_of

_SHAPES, _FRAGMENTS = "frozen_param_shapes", "frozen_param_fragments"


def frozen_fragments(checkpoint: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    """Frozen parameters by model key, in the pieces that lie in the files of the ranks."""
    pieces: dict[str, list[Piece[Payload]]] = {}
    like: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for (mp, rank), file in checkpoint.model.items():
        state = checkpoint.state(file)
        fragments = state.get(_FRAGMENTS) or {}
        for name, saved in (state.get(_SHAPES) or {}).items():
            ref, shape = fragments.get(name), tuple(saved)
            _, boxes = share_of(shape, rank, checkpoint.data_parallel_size)
            held = sum(box.numel for box, _ in boxes)
            if not isinstance(ref, TensorRef) or math.prod(ref.size) < held:
                continue  # then it is not whole, which is refused where it is wanted
            key, payload = checkpoint.key(name, mp), payload_of(checkpoint.item(file), ref)
            own = [Piece(box, payload, ref.offset + first) for box, first in boxes]
            pieces.setdefault(key, []).extend(own)
            like[key] = ref.storage.dtype, shape
    return {key: Tensor(key, *like[key], tuple(each)) for key, each in pieces.items()}
