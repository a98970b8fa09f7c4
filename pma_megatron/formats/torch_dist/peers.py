"""What other checkpoints of the run say of a flat map: by the same buffers, or by names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch

from pma_megatron.base.boxes import Box, Piece, overlaps
from pma_megatron.errors import PlanError
from pma_megatron.formats.base import MAIN_PARAM, Tensor
from pma_megatron.formats.fingerprints import holds
from pma_megatron.formats.flat import FlatMap, FlatSpace, read_elements, read_flat, rounds_to
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.torch_dist.assignment import WeightChunk
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.optimizer import flat_spaces, named_states, weights_of
from pma_megatron.formats.torch_dist.ties import MayLie, Placed
from pma_megatron.storage.paths import path_of

_CLEARLY = 4  # times nearer, in squared distance: what chance does not bring about
_FEW_ELEMENTS = 16  # of which fewer may be near each other by chance
_COMPARE_ELEMENTS = 1 << 16


def agreeing(
    peers: Sequence[str], spaces: Sequence[FlatSpace], known: FlatMap, chunks: Sequence[WeightChunk]
) -> list[MayLie]:
    """What those of `peers` say whose buffers are the same.

    Args:
        peers: folders.
        spaces: the buffers.
        known: what is known of them.
        chunks: weights by number.
    """
    sizes = {(s.group, s.name): s.numel for s in spaces}
    result = []
    for path in peers:
        peer = TorchDistCheckpoint(path_of(path))
        theirs = {(s.group, s.name): s for s in flat_spaces(peer) if MAIN_PARAM in s.states}
        weights = weights_of(peer)
        same = {place: space.numel for place, space in theirs.items()} == sizes
        if same and holds(peer, list(theirs.values()), weights, known):
            result.append(_says(peer, theirs, weights, chunks))
    return result


def _says(
    peer: TorchDistCheckpoint,
    spaces: Mapping[tuple[str, str], FlatSpace],
    weights: Mapping[str, Tensor],
    chunks: Sequence[WeightChunk],
) -> MayLie:
    pieces = {(key, p.box): p for key, tensor in weights.items() for p in tensor.pieces}
    known: dict[tuple[int, str, str, int], bool] = {}

    def may_lie(number: int, space: FlatSpace, start: int) -> bool:
        place = (number, space.group, space.name, start)
        if place not in known:
            chunk = chunks[number]
            piece = pieces.get((chunk.key, chunk.piece.box))
            known[place] = piece is not None and rounds_to(
                read_flat(
                    peer, spaces[space.group, space.name].states[MAIN_PARAM], start, piece.box.numel
                ),
                read_elements(peer, piece, 0, piece.box.numel),
            )
        return known[place]

    return may_lie


def refuse_nearer(
    checkpoint: ItemFiles,
    placed: Sequence[Placed],
    peers: Sequence[str],
    chunks: Sequence[WeightChunk],
    may_lie: MayLie,
) -> None:
    """Refuse weights that the order alone has placed, if names elsewhere speak against it.

    A main parameter differs less from itself at another step than from another one. That is no
    proof, so it decides nothing; but two that are clearly nearer to each other's are not passed.

    Args:
        checkpoint: in whose buffers they lie.
        placed: weights that values alone do not tell apart.
        peers: folders of other checkpoints.
        chunks: weights by number.
        may_lie: what values say.

    Raises:
        PlanError: another checkpoint has names, and by them two weights lie the other way round.
    """
    alike: dict[tuple[str, int], list[Placed]] = defaultdict(list)
    for one in placed:
        numel = chunks[one.number].piece.box.numel
        if numel >= _FEW_ELEMENTS:
            alike[one.space.group, numel].append(one)
    for path in peers if any(len(ones) > 1 for ones in alike.values()) else ():
        peer = TorchDistCheckpoint(path_of(path))
        named = named_states(peer).get(MAIN_PARAM, {})
        for ones in alike.values() if named else ():
            ours = torch.stack([_flat(checkpoint, one, chunks) for one in ones])
            theirs = torch.stack([_named(peer, named, chunks[one.number]) for one in ones])
            squared = torch.cdist(ours, theirs, compute_mode="donot_use_mm_for_euclid_dist") ** 2
            own = squared.diagonal()
            nearer = _CLEARLY * (squared + squared.T) < own[:, None] + own[None, :]
            for i, j in nearer.nonzero().tolist():
                a, b = ones[i], ones[j]
                if may_lie(a.number, b.space, b.start) and may_lie(b.number, a.space, a.start):
                    raise PlanError(_against(chunks[a.number], chunks[b.number], path))


def _against(a: WeightChunk, b: WeightChunk, path: str) -> str:
    return (
        f"{a.key} at {a.piece.box.offsets} and {b.key} at {b.piece.box.offsets} are bit-identical "
        "as weights. The order in which Megatron registers parameters puts their main params one "
        f"way round, and those of {path}, which have names, are nearer to the other: they cannot "
        "be told apart"
    )


def _flat(files: ItemFiles, placed: Placed, chunks: Sequence[WeightChunk]) -> torch.Tensor:
    count = min(_COMPARE_ELEMENTS, chunks[placed.number].piece.box.numel)
    return read_flat(files, placed.space.states[MAIN_PARAM], placed.start, count).double()


def _named(files: ItemFiles, named: Mapping[str, Tensor], chunk: WeightChunk) -> torch.Tensor:
    """The main params that another checkpoint stores under the chunk's name, flat; else NaN."""
    tensor, box = named.get(chunk.key), chunk.piece.box
    count = min(_COMPARE_ELEMENTS, box.numel)
    result = torch.full((count,), torch.nan, dtype=torch.float64)
    if tensor is None or len(tensor.shape) != len(box.sizes):
        return result
    for part in overlaps(box, tensor.pieces):
        numel = min(part.numel, count - part.unit_start)
        if part.is_run and numel > 0:
            whole = Piece(Box((0,), (part.payload.numel,)), part.payload)
            data = read_elements(files, whole, part.start, numel)
            result[part.unit_start : part.unit_start + numel] = data.double()
    return result
