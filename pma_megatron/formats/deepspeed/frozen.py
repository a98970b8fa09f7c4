"""Parameters that a tag of ZeRO-3 holds and its optimizer does not: those that were frozen.

Every rank's model states have its part of each, ceil(numel / ranks) elements, as
`frozen_param_fragments` (deepspeed/runtime/engine.py, `_get_zero_frozen_param_attributes`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pma_megatron.base.boxes import Piece
from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint
from pma_megatron.formats.items import payload_of
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.shares import Holders, RankItems, SharedPieces, share_of

_SHAPES, _FRAGMENTS = "frozen_param_shapes", "frozen_param_fragments"

_Fragment = tuple[TensorRef | None, tuple[int, ...]]
"""A rank's part of a parameter, None if it is no tensor, and the shape of that parameter."""


def frozen_fragments(checkpoint: DeepSpeedCheckpoint) -> dict[str, Tensor]:
    """Frozen parameters by model key, in the pieces that lie in the files of the ranks."""
    found: dict[str, Tensor] = {}
    for mp in range(checkpoint.model_parallel_size):
        files = {rank: file for (at, rank), file in checkpoint.model.items() if at == mp}
        ranks = sorted(files)
        contents = [checkpoint.state(files[rank]) for rank in ranks]
        known = {id(content): _fragments(content) for content in contents}  # many are one
        said = [known[id(content)] for content in contents]
        items = RankItems.of([checkpoint.item(files[rank]) for rank in ranks])
        whole = ranks == list(range(checkpoint.data_parallel_size))
        for name in dict.fromkeys(name for each in known.values() for name in each):
            held = [each.get(name) for each in said]
            key, world = checkpoint.key(name, mp), checkpoint.data_parallel_size
            tensor = _shared(key, items, held) if whole else None
            if tensor is None:
                by_rank = zip(ranks, items.items, held, strict=True)
                tensor = _alone(key, [each for each in by_rank if each[2] is not None], world)
            if tensor is not None:
                found[key] = tensor
    return found


def _fragments(content: Mapping[str, Any]) -> dict[str, _Fragment]:
    fragments = content.get(_FRAGMENTS) or {}
    parts = {name: fragments.get(name) for name in content.get(_SHAPES) or {}}
    return {
        name: (ref if isinstance(ref, TensorRef) else None, tuple(content[_SHAPES][name]))
        for name, ref in parts.items()
    }


def _shared(key: str, items: RankItems, held: Sequence[_Fragment | None]) -> Tensor | None:
    """A parameter of which every rank holds its share; None if one does not."""
    refs = [each[0] for each in held if each is not None and each[0] is not None]
    shapes = {each[1] for each in held if each is not None}
    if len(refs) != len(items.items) or len(shapes) != 1:
        return None
    (shape,) = shapes
    share = -(-math.prod(shape) // len(refs))
    if not share or len({ref.storage.dtype for ref in refs}) != 1:
        return None
    if any(math.prod(ref.size) < share for ref in refs):
        return None
    payloads = [payload_of(item, ref) for item, ref in zip(items.items, refs, strict=True)]
    pieces = SharedPieces(Holders.of(items, payloads, [ref.offset for ref in refs]), shape, 0)
    return Tensor(key, pieces.dtype, shape, pieces)


def _alone(key: str, held: Sequence[tuple[int, Item, Any]], world: int) -> Tensor | None:
    """What there is of a parameter, rank by rank."""
    pieces: list[Piece[Payload]] = []
    tensor = None
    for rank, item, (ref, shape) in held:
        _, boxes = share_of(shape, rank, world)
        if ref is None or math.prod(ref.size) < sum(box.numel for box, _ in boxes):
            continue  # then it is not whole, which is refused where it is wanted
        payload = payload_of(item, ref)
        pieces += [Piece(box, payload, ref.offset + first) for box, first in boxes]
        tensor = Tensor(key, ref.storage.dtype, shape, tuple(pieces))
    return tensor
