"""Every optimizer layout of megatron-core 0.12 to 0.19, re-expressed in model space.

After this module no layout is special: state `param` of model key K is a global tensor of K's
shape, made of pieces, wherever its bytes lie. Sources: `sharded_param_state_*` in
megatron/core/optimizer/distrib_optimizer.py, and optimizer.py (Float16, FP32).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from pma_megatron.base.boxes import Box, Piece, flat_range
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import MAIN_PARAM, ModelSpace, Tensor
from pma_megatron.formats.dcp.metadata import original_shape
from pma_megatron.formats.flat import FlatMap, FlatSpace, states_from_flat
from pma_megatron.formats.items import piece_of
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.schema import is_count, pairs_of, wrong
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint

_NAMED = re.compile(r"^(?:chained_\d+\.)?optimizer\.state\.(?P<state>[^.]+)\.(?P<key>.+)$")
_BUCKET = re.compile(
    r"^(?P<group>(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+)"
    r"\.(?P<space>gbuf_idx_\d+\.dtype_.+\.bucket_idx_\d+)\.(?P<state>[^.]+)$"
)
_GATHERED = re.compile(
    r"^(?P<group>(?:chained_\d+\.)?optimizer\.distributed\.dp_group_idx_\d+)\.param_state/shard_"
)
_OPTIMIZER = re.compile(r"^(?:chained_\d+\.)?optimizer\.")


def is_optimizer_key(key: str) -> bool:
    """True for entries that belong to the optimizer, whatever its layout."""
    return _OPTIMIZER.match(key) is not None


def weights_of(checkpoint: TorchDistCheckpoint) -> dict[str, Tensor]:
    """The model tensors of a checkpoint."""
    return {k: t for k, t in checkpoint.tensors.items() if not is_optimizer_key(k)}


def named_states(checkpoint: TorchDistCheckpoint) -> dict[str, dict[str, Tensor]]:
    """States stored under their model key: state -> model key -> tensor in the model's shape."""
    states: dict[str, dict[str, Tensor]] = {}
    for stored, tensor in checkpoint.tensors.items():
        match = _NAMED.match(stored)
        if match is None:
            continue
        state = MAIN_PARAM if match["state"] == "fp32_param" else match["state"]
        shape = original_shape(checkpoint.metadata, stored)
        if shape is not None and shape != tensor.shape:
            tensor = _from_fragments(tensor, shape, stored)
        states.setdefault(state, {})[match["key"]] = tensor
    return states


def _from_fragments(tensor: Tensor, shape: tuple[int, ...], stored: str) -> Tensor:
    """Undo `fully_sharded_model_space`: stored shape is (shards per axis..., numel of a shard)."""
    shards, local_numel = tensor.shape[:-1], math.prod(tensor.shape[-1:])
    if (
        len(shards) != len(shape)
        or 0 in shards
        or any(d % n for d, n in zip(shape, shards, strict=True))
    ):
        raise CheckpointError(
            f"{stored} has stored shape {tensor.shape} for model shape {shape}: expected one "
            "leading axis per model axis. This layout is not known; please report it."
        )
    local = tuple(d // n for d, n in zip(shape, shards, strict=True))
    pieces = []
    for piece in tensor.pieces:
        index, start = piece.box.offsets[:-1], piece.box.offsets[-1]
        whole = Box(tuple(i * n for i, n in zip(index, local, strict=True)), local)
        if whole.numel != local_numel or any(n != 1 for n in piece.box.sizes[:-1]):
            raise CheckpointError(f"{stored} has an unexpected chunk {piece.box}")
        for box, first in flat_range(whole, start, start + piece.box.sizes[-1]):
            pieces.append(Piece(box, piece.payload, piece.start + first - start))
    return Tensor(tensor.key, tensor.dtype, shape, tuple(pieces))


def flat_spaces(checkpoint: TorchDistCheckpoint) -> list[FlatSpace]:
    """The flat optimizer buffers of `dp_reshardable` and `dp_zero_gather_scatter` checkpoints."""
    spaces: dict[tuple[str, str], FlatSpace] = {}
    for stored, tensor in checkpoint.tensors.items():
        match = _BUCKET.match(stored)
        if match is not None:
            at = (match["group"], match["space"])
            if len(tensor.shape) != 1:
                raise wrong(f"{checkpoint.path}: {stored}", "a flat buffer", tensor.shape)
            space = spaces.setdefault(at, FlatSpace(*at, numel=tensor.shape[0], exact=True))
            if tensor.shape != (space.numel,):
                raise wrong(f"{checkpoint.path}: {stored}", f"{space.numel} elements", tensor.shape)
            pieces = sorted(tensor.pieces, key=lambda piece: piece.box.offsets)
            space.states[match["state"]] = tuple(pieces)
    for key in checkpoint.objects:
        match = _GATHERED.match(key)
        if match is not None:
            for space in _gathered_spaces(checkpoint, key, match["group"]):
                spaces[space.group, space.name] = space
    return list(spaces.values())


def _gathered_spaces(checkpoint: TorchDistCheckpoint, key: str, group: str) -> list[FlatSpace]:
    item = checkpoint.objects[key]
    what = f"{checkpoint.path}: {key}"
    value = checkpoint.decode(item, what)
    value = value[0] if isinstance(value, list) and value else value
    spaces = []
    for buffer, by_dtype in pairs_of(value, what):
        if not isinstance(by_dtype, dict):
            continue  # flags such as buckets_coalesced
        if not is_count(buffer):
            raise wrong(f"{what}: a buffer", "its number", buffer)
        for dtype, tensors in by_dtype.items():
            refs = {n: t for n, t in pairs_of(tensors, what) if isinstance(t, TensorRef)}
            if not str(dtype).isprintable():
                raise wrong(f"{what}: a buffer", "its dtypes", dtype)
            main = refs.get(MAIN_PARAM)
            if main is None or len(main.size) != 1:
                raise wrong(f"{what}: {MAIN_PARAM}", "one flat tensor", main)
            numel = main.size[0]
            space = FlatSpace(group, f"gbuf_idx_{buffer}.dtype_{dtype}", numel, exact=False)
            for name, ref in refs.items():
                if ref.size != (numel,) or not ref.is_contiguous():
                    continue  # a scalar step, or something that is not a flat state
                space.states[name] = (piece_of(item, ref),)
            spaces.append(space)
    return spaces


def buffers_of(checkpoint: TorchDistCheckpoint) -> dict[str, Tensor]:
    """The flat optimizer buffers as they are, one tensor per state of each."""
    return {
        key: Tensor(key, pieces[0].payload.dtype, (space.numel,), pieces)
        for space in flat_spaces(checkpoint)
        for state, pieces in space.states.items()
        for key in (f"{space.group}.{space.name}.{state}",)
    }


def layout_kind(checkpoint: TorchDistCheckpoint) -> str:
    """The optimizer layout by what is stored, never by what a configuration claims."""
    kinds = set()
    for key in checkpoint.tensors:
        if _BUCKET.match(key):
            kinds.add("dp_reshardable")
        elif (match := _NAMED.match(key)) is not None:
            if original_shape(checkpoint.metadata, key) is not None:
                kinds.add("fully_sharded_model_space")
            else:
                kinds.add("float16" if match["state"] == "fp32_param" else "named")
    if any(_GATHERED.match(key) for key in checkpoint.objects):
        kinds.add("dp_zero_gather_scatter")
    if "fully_sharded_model_space" in kinds:
        return "fully_sharded_model_space"
    if kinds == {"named"}:
        named = {m["state"] for m in map(_NAMED.match, checkpoint.tensors) if m}
        return "fully_reshardable" if MAIN_PARAM in named else "fp32"
    if kinds == {"named", "float16"}:
        return "float16"
    return "+".join(sorted(kinds)) or "none"


def model_space(
    checkpoint: TorchDistCheckpoint, ranges: FlatMap, spaces: Sequence[FlatSpace]
) -> ModelSpace:
    """The checkpoint in model space.

    Args:
        checkpoint: the opened checkpoint.
        ranges: where parameters lie in `spaces` (`buckets.derive`); empty without flat buffers.
        spaces: `flat_spaces(checkpoint)`.
    """
    weights = weights_of(checkpoint)
    states = named_states(checkpoint)
    for state, tensors in states_from_flat(spaces, ranges, weights).items():
        states.setdefault(state, {}).update(tensors)
    return ModelSpace(weights, states, layout_kind(checkpoint))
