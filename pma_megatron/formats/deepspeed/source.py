"""Open one DeepSpeed tag as a source of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import ModelSpace, Payload, Schedule, Tensor
from pma_megatron.formats.deepspeed.checkpoint import DeepSpeedCheckpoint, completeness
from pma_megatron.formats.deepspeed.partitions import base_state, flat_spaces, groups_of, kind
from pma_megatron.formats.flat import FlatMap, states_from_flat
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.source import Source, stamps_of
from pma_megatron.geometry import Box, Piece


def read_source(path: str, ranges: FlatMap, main_params: bool) -> Source:
    """Open the tag at `path` and express it in model space.

    Args:
        path: the tag's folder.
        ranges: not needed: every tag says itself where its parameters lie.
        main_params: not needed: they are found without reading payloads.

    Raises:
        CheckpointError: incomplete, damaged, or of a kind that is not supported.
    """
    folder = Path(path)
    reason = completeness(folder)
    if reason:
        raise CheckpointError(f"{path} cannot be a source: {reason}. Exclude it, or restore it.")
    checkpoint = DeepSpeedCheckpoint(folder)
    spaces, found = flat_spaces(checkpoint)
    weights = weights_of(checkpoint, shapes_of(checkpoint))
    return Source(
        path=path,
        format="deepspeed",
        space=ModelSpace(weights, states_from_flat(spaces, found, weights), kind(checkpoint)),
        objects=(),
        optimizer_keys=frozenset(checkpoint.optim.values()),
        metadata_digest=checkpoint.metadata_digest(),
        ranges=found,
        topology=f"DP{len(checkpoint.optim)}",
        stamps=stamps_of(folder),
    )


def shapes_of(checkpoint: DeepSpeedCheckpoint) -> dict[str, tuple[int, ...]]:
    """Trained parameter -> shape, experts by their global number."""
    return {k: shape for group in groups_of(checkpoint) for k, shape in group.shapes.items()}


def weights_of(
    checkpoint: DeepSpeedCheckpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Trained parameters (`shapes`) and buffers as the model states hold them.

    ZeRO-3 stores no weights beside its main params, and a pipeline none in its model states: they
    have no pieces here. What is neither
    trained nor a buffer (frozen parameters) is left out: it stays as the newest source has it. A
    second name of a tied parameter is no weight of its own, and where it has a storage of its own
    (MoE) it is a replica. A buffer of rank R > 0 under ZeRO-3 is called `name@R`.

    Raises:
        CheckpointError: the model states lack a trained parameter, or hold it in another shape.
    """
    partitioned = "zero_pp_rank_" in checkpoint.model[0] or checkpoint.head["module"] is None
    weights: dict[str, Tensor] = {}
    if partitioned:
        for name, shape in shapes.items():
            weights[name] = Tensor(name, torch.float32, shape, ())
    in_files: set[str] = set()
    for file in checkpoint.experts.values():
        module = checkpoint.state(file)
        names = [name for name in module if name in shapes]
        in_files.update(names)
        weights.update(_stored(checkpoint, file, module, names, shapes))
    for rank, file in checkpoint.model.items():
        state = checkpoint.state(file)
        buffers = set(state.get("buffer_names") or ()) - set(shapes)
        wanted = buffers if partitioned else {*shapes, *buffers} - in_files
        names = sorted(wanted, key=lambda name: name not in shapes)
        for name, tensor in _stored(checkpoint, file, state["module"], names, shapes):
            weights[name if rank == 0 else f"{name}@{rank}"] = tensor
    for alias, owner in checkpoint.aliases.items():
        for replica in _replicas(checkpoint, alias, weights.get(owner)):
            weights[owner] = replace(weights[owner], replicas=(*weights[owner].replicas, replica))
    return weights


def _replicas(checkpoint: DeepSpeedCheckpoint, alias: str, owner: Tensor | None
              ) -> Iterator[Piece[Payload]]:  # fmt: skip
    """Where the second name of a tied parameter is stored again: its optimizer knows one copy."""
    file, module = checkpoint.model[0], checkpoint.head["module"]
    if owner is None or not owner.pieces or owner.pieces[0].payload.item.file != file:
        return
    for _, tensor in _stored(checkpoint, file, module, [alias], {}):
        (piece,) = tensor.pieces
        if tensor.shape == owner.shape and piece not in (*owner.pieces, *owner.replicas):
            yield piece


def _stored(checkpoint: DeepSpeedCheckpoint, file: str, module: Any, names: list[str],
            shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    item = checkpoint.item(file)
    seen: set[tuple[str, int, tuple[int, ...]]] = set()
    for name in names:
        ref = module.get(name) if isinstance(module, dict) else None
        if name in shapes and not (
            isinstance(ref, TensorRef) and ref.size == shapes[name] and ref.is_contiguous()
        ):
            raise CheckpointError(
                f"{checkpoint.path / file} holds {ref!r} for {name}, expected a contiguous tensor "
                f"of shape {shapes[name]}: it is not what ZeRO saves. Exclude this checkpoint"
            )
        if not isinstance(ref, TensorRef) or not ref.is_contiguous():
            continue
        place = (ref.storage.key, ref.offset, ref.size)
        if place in seen:
            continue
        seen.add(place)
        payload = Payload(item, ref.storage.dtype, ref.storage.numel, f"data/{ref.storage.key}")
        box = Box((0,) * len(ref.size), ref.size)
        yield name, Tensor(name, ref.storage.dtype, ref.size, (Piece(box, payload, ref.offset),))


def read_common(path: Path) -> dict[str, Any]:
    """Iteration and training arguments.

    Raises:
        CheckpointError: the tag is damaged.
    """
    checkpoint = DeepSpeedCheckpoint(path)
    return {"iteration": int(checkpoint.head["global_steps"]), "args": dict(checkpoint.args())}


def read_schedule(path: Path) -> Schedule:
    """The learning rate and the samples; DeepSpeed says no more of a schedule.

    Raises:
        CheckpointError: the tag is damaged.
    """
    checkpoint = DeepSpeedCheckpoint(path)
    base = base_state(checkpoint.optimizer(0))
    groups = base.get("param_groups") if isinstance(base, dict) else None
    return schedule_of(groups, checkpoint.head.get("global_samples"))


def schedule_of(groups: Any, samples: Any) -> Schedule:
    """The largest learning rate of param groups, and the samples, where they are known."""
    rates = [float(g["lr"]) for g in groups or () if isinstance(g.get("lr"), (int, float))]
    return Schedule(
        learning_rate=max(rates, default=None),
        samples=samples if isinstance(samples, int) else None,
    )
