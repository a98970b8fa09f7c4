"""Open one Universal checkpoint as a source of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.formats.base import MAIN_PARAM, ModelSpace, Payload, Schedule, Tensor
from pma_megatron.formats.deepspeed.saves import refuse_mixed_saves
from pma_megatron.formats.deepspeed.source import (
    refuse_incomplete,
    schedule_of,
    source_of,
    weights_of,
)
from pma_megatron.formats.deepspeed.steps import most_steps
from pma_megatron.formats.deepspeed.universal import (
    FORMAT_NAME,
    GLOBAL_STATE,
    MASTER,
    STEP,
    UniversalCheckpoint,
    completeness,
    refuse_other_shapes,
)
from pma_megatron.formats.flat import FlatMap
from pma_megatron.formats.items import piece_of
from pma_megatron.formats.source import Source
from pma_megatron.storage.paths import path_of


def read_source(path: str, ranges: FlatMap, main_params: bool, peers: Sequence[str] = ()) -> Source:
    """Open the Universal checkpoint at `path` and express it in model space.

    Args:
        path: its folder.
        ranges: not needed: every tensor has a file of its own.
        main_params: not needed: they are found without reading payloads.
        peers: not needed.

    Raises:
        CheckpointError: incomplete, damaged, or of a kind that is not supported.
    """
    refuse_incomplete(path, completeness(path_of(path)))
    checkpoint = UniversalCheckpoint(path_of(path))
    refuse_other_shapes(checkpoint)
    refuse_mixed_saves(checkpoint)
    states = _states(checkpoint)
    weights = {
        name: _without_padding(weight, states[MAIN_PARAM].get(name))
        for name, weight in weights_of(checkpoint, checkpoint.shapes).items()
    }
    frozen: dict[str, Tensor] = {}
    for name, piece in _copies(checkpoint):
        if name not in checkpoint.aliases and name not in weights:
            frozen[name] = Tensor(name, piece.payload.dtype, piece.box.sizes, (piece,))
        owner = checkpoint.aliases.get(name, name)
        for tensors in (states[MAIN_PARAM], weights):
            found = tensors.get(owner)
            if found is not None and _alike(found, piece):
                tensors[owner] = replace(found, replicas=(*found.replicas, piece))
                break
    zero3 = "ZeRO-3" if checkpoint.partitioned else "ZeRO-1, ZeRO-2 or BF16_Optimizer"
    return source_of(
        checkpoint,
        FORMAT_NAME,
        ModelSpace(weights, states, f"Universal, from {zero3}"),
        optimizer_keys=frozenset({GLOBAL_STATE}),
        topology=f"Universal, from DP{checkpoint.head.get('dp_world_size')}",
        frozen=frozen,
        ranges={},
    )


def _states(checkpoint: UniversalCheckpoint) -> dict[str, dict[str, Tensor]]:
    states: dict[str, dict[str, Tensor]] = {MAIN_PARAM: {}}
    for name, shape in checkpoint.shapes.items():
        for state, file in checkpoint.states[name].items():
            if state == STEP:
                continue
            piece = _piece(checkpoint, file)
            if not checkpoint.vocabulary_cut(name):  # ZeRO-3 stores them flat
                piece = replace(piece, box=Box.whole(shape))
            key = MAIN_PARAM if state == MASTER else state
            tensor = Tensor(name, piece.payload.dtype, piece.box.sizes, (piece,))
            states.setdefault(key, {})[name] = tensor
    return states


def _piece(checkpoint: UniversalCheckpoint, file: str) -> Piece[Payload]:
    return piece_of(checkpoint.item(file), checkpoint.tensor(file))


def _without_padding(weight: Tensor, main: Tensor | None) -> Tensor:
    """The rows of a weight that have main params; what pads the vocabulary stays as it is."""
    if main is None or main.shape == weight.shape:
        return weight
    pieces = tuple(replace(piece, box=Box.whole(main.shape)) for piece in weight.pieces)
    return replace(weight, shape=main.shape, pieces=pieces)


def _copies(checkpoint: UniversalCheckpoint) -> Iterator[tuple[str, Piece[Payload]]]:
    """Float32 copies of what is not trained under that name."""
    for name, states in checkpoint.states.items():
        if name not in checkpoint.shapes and MASTER in states:
            yield name, _piece(checkpoint, states[MASTER])


def _alike(tensor: Tensor, piece: Piece[Payload]) -> bool:
    return tensor.dtype == piece.payload.dtype and tensor.shape == piece.box.sizes


def read_schedule(path: Path) -> Schedule:
    """The learning rate and the samples.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = UniversalCheckpoint(path)
    state = checkpoint.state(GLOBAL_STATE)
    steps = most_steps(checkpoint, GLOBAL_STATE, state)  # ZeRO-3 counts there
    for file in (states[STEP] for states in checkpoint.states.values() if STEP in states):
        steps = most_steps(checkpoint, file, {STEP: checkpoint.content(file)})
        break
    return schedule_of(state.get("param_groups"), checkpoint.head, steps)
