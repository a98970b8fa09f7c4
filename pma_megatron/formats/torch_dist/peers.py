"""What other checkpoints of the run say of a flat map: by the same buffers, or by names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from pma_megatron.errors import PlanError
from pma_megatron.formats.base import MAIN_PARAM, Tensor
from pma_megatron.formats.fingerprints import holds
from pma_megatron.formats.flat import FlatMap, FlatSpace, read_elements, read_flat, rounds_to
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.torch_dist.assignment import Chunk
from pma_megatron.formats.torch_dist.checkpoint import TorchDistCheckpoint
from pma_megatron.formats.torch_dist.optimizer import flat_spaces, named_states, weights_of
from pma_megatron.formats.torch_dist.ties import MayLie, Placed
from pma_megatron.geometry import Box, Piece, overlaps

_CLEARLY = 4  # times nearer, in squared distance: what chance does not bring about


def agreeing(
    peers: Sequence[str], spaces: Sequence[FlatSpace], known: FlatMap, chunks: Sequence[Chunk]
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
        peer = TorchDistCheckpoint(Path(path))
        theirs = {(s.group, s.name): s for s in flat_spaces(peer) if MAIN_PARAM in s.states}
        weights = weights_of(peer)
        same = {place: space.numel for place, space in theirs.items()} == sizes
        if same and holds(peer, list(theirs.values()), weights, known):
            result.append(_says(peer, theirs, weights, chunks))
    return result


def _says(
    peer: TorchDistCheckpoint, spaces: Mapping[tuple[str, str], FlatSpace],
    weights: Mapping[str, Tensor], chunks: Sequence[Chunk],
) -> MayLie:  # fmt: skip
    pieces = {(key, p.box): p for key, tensor in weights.items() for p in tensor.pieces}
    known: dict[tuple[int, str, str, int], bool] = {}

    def may_lie(number: int, space: FlatSpace, start: int) -> bool:
        place = (number, space.group, space.name, start)
        if place not in known:
            chunk = chunks[number]
            piece = pieces.get((chunk.key, chunk.piece.box))
            known[place] = piece is not None and rounds_to(
                read_flat(peer, spaces[space.group, space.name].states[MAIN_PARAM], start,
                          piece.box.numel),
                read_elements(peer, piece, 0, piece.box.numel),
            )  # fmt: skip
        return known[place]

    return may_lie


def refuse_nearer(
    checkpoint: ItemFiles, gaps: Sequence[Sequence[Placed]], peers: Sequence[str],
    chunks: Sequence[Chunk], may_lie: MayLie,
) -> None:  # fmt: skip
    """Refuse weights that the order alone put beside each other, if names elsewhere speak against.

    A main parameter differs less from itself at another step than from another one. That is no
    proof, so it decides nothing; but two that are clearly nearer to each other's are not passed.

    Raises:
        PlanError: another checkpoint has names, and by them two weights lie the other way round.
    """
    pairs = [
        (a, b)
        for placed in gaps
        for a, b in itertools.combinations(placed, 2)
        if chunks[a.number].piece.box.numel == chunks[b.number].piece.box.numel
        and may_lie(a.number, b.space, b.start)
        and may_lie(b.number, a.space, a.start)
    ]
    for path in peers if pairs else ():
        peer = TorchDistCheckpoint(Path(path))
        named = named_states(peer).get(MAIN_PARAM, {})
        for a, b in pairs if named else ():
            ours = [_flat(checkpoint, placed, chunks) for placed in (a, b)]
            theirs = [_named(peer, named, chunks[placed.number]) for placed in (a, b)]
            if _CLEARLY * _squared(ours, theirs[::-1]) < _squared(ours, theirs):
                names = [
                    f"{chunk.key} at {chunk.piece.box.offsets}"
                    for chunk in (chunks[a.number], chunks[b.number])
                ]
                raise PlanError(
                    f"{names[0]} and {names[1]} are bit-identical as weights. The order in which "
                    f"Megatron registers parameters puts their main params one way round, and "
                    f"those of {path}, which have names, are nearer to the other: they cannot be "
                    "told apart"
                )


def _flat(files: ItemFiles, placed: Placed, chunks: Sequence[Chunk]) -> torch.Tensor:
    numel = chunks[placed.number].piece.box.numel
    return read_flat(files, placed.space.states[MAIN_PARAM], placed.start, numel).double()


def _squared(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Sum of squared distances; NaN if something is not there."""
    return sum(float(((x - y) ** 2).sum()) for x, y in zip(ours, theirs, strict=True))


def _named(files: ItemFiles, named: Mapping[str, Tensor], chunk: Chunk) -> torch.Tensor:
    """The main params that another checkpoint stores under the chunk's name, flat; else NaN."""
    tensor, box = named.get(chunk.key), chunk.piece.box
    result = torch.full((box.numel,), torch.nan, dtype=torch.float64)
    if tensor is None or len(tensor.shape) != len(box.sizes):
        return result
    for part in overlaps(box, tensor.pieces):
        if part.is_run:
            whole = Piece(Box((0,), (part.payload.numel,)), part.payload)
            data = read_elements(files, whole, part.start, part.numel)
            result[part.unit_start : part.unit_start + part.numel] = data.double()
    return result
