"""A source's weights are its own main params, rounded once: what every optimizer step leaves.

Weights and main params of one parameter mostly lie in files of different ranks, so a file of
another save, or of another run, contradicts the others here.

These are samples. Where main params lie in flat buffers, the merge compares every element of
the newest source besides (`accumulate.prove`), since the map rests on it. Elsewhere a
merge reads none of the weights, so what samples miss cannot reach the result; to compare all of
them would cost a second read of the newest source's weights.
"""

from __future__ import annotations

import torch

from pma_megatron.base.boxes import Box, PieceIndex
from pma_megatron.base.spelling import left_out
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import MAIN_PARAM, Payload, Tensor
from pma_megatron.formats.flat import rounds_to
from pma_megatron.formats.source import Source
from pma_megatron.identity.samples import FLOATING, WEIGHT, Inventory, Wanted, file_of
from pma_megatron.transfer.blocks import BlockReader


def refuse_foreign_weights(source: Source, pieces: Inventory, reader: BlockReader) -> None:
    """Compare samples of the weights with those of the main params: of the `pieces` of a source, as
    its `reader` reads them.

    What has no main params (frozen layers, buffers, checkpoints of weights alone) proves nothing,
    nor do weights that a checkpoint keeps in 8 bits.

    Raises:
        CheckpointError: they differ; names the two files.
    """
    if source.quantized:
        return
    weights: dict[str, PieceIndex[Payload]] = {}
    mains: dict[str, PieceIndex[Payload]] = {}
    for each in pieces.chosen(comparable(source)):
        weight, main = source.space.weights[each.key], source.space.states[MAIN_PARAM][each.key]
        if each.key not in weights:
            weights[each.key] = PieceIndex(weight.pieces)
            mains[each.key] = PieceIndex(main.pieces)
        ours, theirs = weights[each.key], mains[each.key]
        for box in pieces.runs(each.piece, source.metadata_digest):
            stored = reader.whole(box, ours, weight.dtype)
            rounded = None if stored is None else reader.whole(box, theirs, main.dtype)
            if stored is None or rounded is None:
                continue  # the plan names what is missing
            if not _agree(rounded, stored):
                raise _mixed(source, each.key, box, theirs, ours)


def comparable(source: Source) -> Wanted:
    """Weights and main params of what has both, in one shape."""
    mains = source.space.states.get(MAIN_PARAM, {})

    def wanted(state: str, key: str, _: Tensor) -> bool:
        weight = source.space.weights.get(key)
        if weight is None or state not in (WEIGHT, MAIN_PARAM) or key not in mains:
            return False
        stored = bool(weight.pieces) and weight.dtype in FLOATING
        return stored and weight.shape == mains[key].shape

    return wanted


def _agree(main: torch.Tensor, weight: torch.Tensor) -> bool:
    """True if every finite main param rounds to its weight; the merge names those that are not."""
    if rounds_to(main, weight):
        return True
    finite = torch.isfinite(main)
    return rounds_to(main[finite], weight[finite])


def _mixed(
    source: Source, key: str, box: Box, mains: PieceIndex[Payload], weights: PieceIndex[Payload]
) -> CheckpointError:
    main, weight = (file_of(source, i.touching(box)[0].payload) for i in (mains, weights))
    return CheckpointError(
        f"{source.path}: main params of {key} in {main}, rounded, differ from the stored weights "
        f"in {weight} at {box.offsets}: one of the two is of another save or another run, or the "
        f"weights were edited. Restore its files, or {left_out('this checkpoint')}"
    )
