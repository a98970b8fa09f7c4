"""Open one DeepSpeed tag as a source of a merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.boxes import Piece
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Incomplete, ModelSpace, Payload, Schedule, Tensor, least_decay
from pma_megatron.formats.contract import Common
from pma_megatron.formats.deepspeed.checkpoint import FORMAT_NAME, TIED, DeepSpeedCheckpoint
from pma_megatron.formats.deepspeed.completeness import completeness
from pma_megatron.formats.deepspeed.frozen import frozen_fragments
from pma_megatron.formats.deepspeed.layers import layer_names
from pma_megatron.formats.deepspeed.partitions import base_state, groups_of, kind
from pma_megatron.formats.deepspeed.partitions import main_params as main_params_of
from pma_megatron.formats.deepspeed.saves import refuse_mixed_saves
from pma_megatron.formats.deepspeed.steps import most_steps, refuse_mixed_steps
from pma_megatron.formats.deepspeed.unsharded import name_main_params, trained_shapes
from pma_megatron.formats.flat import FlatMap, FlatSpace, states_from_flat
from pma_megatron.formats.items import piece_of
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.schema import is_count
from pma_megatron.formats.source import Source, stamps_of
from pma_megatron.storage.paths import path_of


def read_source(path: str, ranges: FlatMap, main_params: bool, peers: Sequence[str] = ()) -> Source:
    """Open the tag at `path` and express it in model space.

    Args:
        path: the tag's folder.
        ranges: not needed: every tag says itself where its parameters lie.
        main_params: not needed: they are found without reading payloads.
        peers: not needed.

    Raises:
        CheckpointError: incomplete, damaged, or of a kind that is not supported.
    """
    refuse_incomplete(path, completeness(path_of(path)))
    checkpoint = DeepSpeedCheckpoint(path_of(path))
    refuse_mixed_steps(checkpoint, checkpoint.optimizers())
    refuse_mixed_saves(checkpoint)
    if not checkpoint.is_whole:
        weights = weights_of(checkpoint, shapes_of(checkpoint))
        states, found = main_params_of(checkpoint, weights)
        frozen = _frozen(checkpoint, set(weights))
    else:
        weights, frozen, spaces, found = _without_zero(checkpoint, ranges)
        states = states_from_flat(spaces, found, weights)
    return source_of(
        checkpoint,
        FORMAT_NAME,
        ModelSpace(weights, states, kind(checkpoint)),
        # float32 without ZeRO: moments have no names, so they stay the newest's in any case.
        optimizer_keys=frozenset(checkpoint.optimizers() if found else ()),
        topology=checkpoint.topology,
        frozen=frozen,
        ranges=found,
    )


def refuse_incomplete(path: str, reason: Incomplete | None) -> None:
    """Raise CheckpointError where there is a `reason` why the tag at `path` is not whole."""
    if reason is not None:
        raise CheckpointError(f"{path} cannot be a source: {reason}. Exclude it, or restore it.")


def source_of(
    checkpoint: DeepSpeedCheckpoint,
    format_name: str,
    space: ModelSpace,
    *,
    optimizer_keys: frozenset[str],
    topology: str,
    frozen: Mapping[str, Tensor],
    ranges: FlatMap,
) -> Source:
    """The source that an opened tag is, native or Universal: neither has opaque entries."""
    return Source(
        path=str(checkpoint.path),
        format=format_name,
        space=space,
        objects=(),
        optimizer_keys=optimizer_keys,
        metadata_digest=checkpoint.metadata_digest(),
        ranges=ranges,
        topology=topology,
        stamps=stamps_of(checkpoint.path),
        frozen=frozen,
        aliases=checkpoint.aliases,
    )


def _without_zero(
    checkpoint: DeepSpeedCheckpoint, known: FlatMap
) -> tuple[dict[str, Tensor], dict[str, Tensor], list[FlatSpace], FlatMap]:
    """Weights, frozen parameters, and the main params by name."""
    shapes = _stored_shapes(checkpoint)
    weights = weights_of(checkpoint, shapes)
    parameters = {key: tensor for key, tensor in weights.items() if key in shapes}
    named = name_main_params(checkpoint, parameters, known)
    for copy, owner in named.copies.items():
        replicas = (*weights[owner].replicas, *weights[copy].pieces)
        weights[owner] = replace(weights[owner], replicas=replicas)
    if named.ranges:
        trained = {found.key for space in named.ranges.values() for found in space}
    else:
        sizes = trained_shapes(checkpoint)
        trained = {key for key, tensor in parameters.items() if tensor.shape in sizes}
    kept = {key: t for key, t in weights.items() if key in trained or key not in parameters}
    frozen = {key: t for key, t in parameters.items() if key not in kept} if named.ranges else {}
    return kept, frozen, named.spaces, named.ranges


def _stored_shapes(checkpoint: DeepSpeedCheckpoint) -> dict[str, tuple[int, ...]]:
    """Floating parameter -> shape, trained or not, where no optimizer says names."""
    shapes: dict[str, tuple[int, ...]] = {}
    buffers = _buffers(checkpoint)
    for _, module, names in _modules(checkpoint, {}):
        for key, name in names.items():
            ref = module[name]
            floating = isinstance(ref, TensorRef) and ref.storage.dtype.is_floating_point
            if floating and key not in buffers:
                shapes[key] = ref.size
    return shapes


def shapes_of(checkpoint: DeepSpeedCheckpoint) -> dict[str, tuple[int, ...]]:
    """Trained parameter -> shape, experts by their global number."""
    return {k: shape for group in groups_of(checkpoint) for k, shape in group.shapes.items()}


def weights_of(
    checkpoint: DeepSpeedCheckpoint, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """Trained parameters (`shapes`) and buffers as the model states hold them.

    ZeRO-3 stores no weights beside its main params, nor does a Universal pipeline: they have no
    pieces here. What is neither trained nor a buffer (frozen parameters) is left out: it stays as
    the newest source has it. A second name of a tied parameter is no weight of its own, and where
    it has a storage of its own (MoE, pipelines) it is a replica. A buffer of rank R > 0 under
    ZeRO-3 is called `name@R`.

    Raises:
        CheckpointError: the model states lack a trained parameter, or hold it in another shape.
    """
    weights: dict[str, Tensor] = {}
    partitioned = _is_partitioned(checkpoint)
    if partitioned:
        for name, shape in shapes.items():
            weights[name] = Tensor(name, torch.float32, shape, ())
    buffers = _buffers(checkpoint) - set(shapes)
    if partitioned and not buffers:  # so that of each rank no file is gone through for them
        return weights
    ranks = {file: dp for (_, dp), file in checkpoint.model.items()}
    for file, module, names in _modules(checkpoint, shapes):
        wanted = [key for key in names if key in shapes and not partitioned]
        wanted += [key for key in names if key in buffers]
        stored = _stored(checkpoint, file, module, {key: names[key] for key in wanted}, shapes)
        for key, tensor in stored:
            name = f"{key}@{ranks[file]}" if ranks.get(file) else key
            there = weights.get(name)
            if there is None:
                weights[name] = replace(tensor, key=name)
            else:  # a tied layer's, for the second time on its stage
                weights[name] = replace(there, replicas=(*there.replicas, *tensor.pieces))
    for key in shapes:  # a tied layer that is only called by a function has no file
        if checkpoint.layers and key.startswith(TIED):
            weights.setdefault(key, Tensor(key, torch.float32, shapes[key], ()))
    missing = next((key for key in shapes if key not in weights), None)
    if missing is not None and not checkpoint.is_whole:
        raise CheckpointError(
            f"{checkpoint.path} holds no weight {missing} of shape {shapes[missing]}: it is not "
            "what ZeRO saves, or incomplete. Exclude this checkpoint"
        )
    for alias, owner in checkpoint.aliases.items():
        for replica in _replicas(checkpoint, alias, weights.get(owner)):
            weights[owner] = replace(weights[owner], replicas=(*weights[owner].replicas, replica))
    return weights


def _frozen(checkpoint: DeepSpeedCheckpoint, known: set[str]) -> dict[str, Tensor]:
    """Parameters that are stored and not trained."""
    if _is_partitioned(checkpoint):
        return frozen_fragments(checkpoint)
    found: dict[str, Tensor] = {}
    known = known | _buffers(checkpoint) | set(checkpoint.aliases)
    for file, module, names in _modules(checkpoint, {}):
        others = {key: name for key, name in names.items() if key not in known}
        for key, tensor in _stored(checkpoint, file, module, others, {}):
            if tensor.dtype.is_floating_point:
                found.setdefault(key, tensor)
    return found


def _is_partitioned(checkpoint: DeepSpeedCheckpoint) -> bool:
    """True where model states hold no weights, and no files of layers do."""
    of_layers = checkpoint.head["module"] is None
    return checkpoint.model[0, 0].startswith("zero_pp_rank_") or (
        of_layers and not checkpoint.layers
    )


def _buffers(checkpoint: DeepSpeedCheckpoint) -> set[str]:
    return {
        checkpoint.key(name, mp)
        for mp in range(checkpoint.model_parallel_size)
        for name in checkpoint.head_of(mp).get("buffer_names") or ()
    }


def _modules(
    checkpoint: DeepSpeedCheckpoint, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, dict[str, Any], dict[str, str]]]:
    """Each file with weights, its tensors by name, and model key -> name."""
    for file in checkpoint.experts.values():
        module = checkpoint.state(file)
        yield file, module, {name: name for name in module}
    for (mp, _), file in checkpoint.model.items():
        module = dict(_flat(checkpoint.state(file)["module"] or {}))
        yield file, module, {checkpoint.key(name, mp): name for name in module}
    for file, names in layer_names(checkpoint, shapes).items():
        yield file, checkpoint.state(file), names


def _flat(module: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Megatron-DeepSpeed without pipelines nests its modules (`state_dict_for_save_checkpoint`)."""
    for name, value in module.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _replicas(
    checkpoint: DeepSpeedCheckpoint, alias: str, owner: Tensor | None
) -> Iterator[Piece[Payload]]:
    """Where the second name of a tied parameter is stored again: its optimizer knows one copy."""
    file = checkpoint.model[0, 0]
    if owner is None or not owner.pieces or owner.pieces[0].payload.item.file != file:
        return
    module = dict(_flat(checkpoint.head["module"]))
    for _, tensor in _stored(checkpoint, file, module, {alias: alias}, {}):
        (piece,) = tensor.pieces
        if tensor.shape == owner.shape and piece not in (*owner.pieces, *owner.replicas):
            yield piece


def _stored(
    checkpoint: DeepSpeedCheckpoint,
    file: str,
    module: Mapping[str, Any],
    names: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of `module`, which is in `file`, by model key; `names` says what it calls them."""
    item = checkpoint.item(file)
    seen: set[tuple[str, int, tuple[int, ...]]] = set()
    for key, name in names.items():
        ref = module.get(name)
        if key in shapes and not (
            isinstance(ref, TensorRef) and ref.size == shapes[key] and ref.is_contiguous()
        ):
            raise CheckpointError(
                f"{checkpoint.path / file} holds {ref!r} for {name}, expected a contiguous tensor "
                f"of shape {shapes[key]}: it is not what ZeRO saves. Exclude this checkpoint"
            )
        if not isinstance(ref, TensorRef) or not ref.is_contiguous():
            continue
        place = (ref.storage.key, ref.offset, ref.size)
        if place in seen:
            continue
        seen.add(place)
        yield key, Tensor(key, ref.storage.dtype, ref.size, (piece_of(item, ref),))


def common_of(checkpoint: DeepSpeedCheckpoint) -> Common:
    """Iteration, samples and training arguments.

    Raises:
        CheckpointError: the tag is damaged.
    """
    head = checkpoint.head
    return {
        "iteration": int(head["global_steps"]),
        "samples": head.get("global_samples"),
        "args": dict(checkpoint.args()),
    }


def read_schedule(path: Path) -> Schedule:
    """The learning rate and the samples; DeepSpeed says no more of a schedule.

    Raises:
        CheckpointError: the tag is damaged.
    """
    checkpoint = DeepSpeedCheckpoint(path)
    base = base_state(checkpoint.optimizer(0))
    groups = base.get("param_groups") if isinstance(base, dict) else None
    file, state = next(iter(checkpoint.optimizers().items()), ("", {}))
    return schedule_of(groups, checkpoint.head, most_steps(checkpoint, file, state))


def schedule_of(groups: Any, head: Mapping[str, Any], steps: int | None) -> Schedule:
    """The largest learning rate of param groups, the samples and limits, where they are known."""
    samples, saved = head.get("global_samples"), head.get("lr_scheduler")
    limits = saved if isinstance(saved, dict) else {}
    rates = [float(g["lr"]) for g in groups or () if isinstance(g.get("lr"), (int, float))]
    return Schedule(
        learning_rate=max(rates, default=None),
        second_moment_decay=least_decay(groups or ()),
        optimizer_steps=steps,
        samples=samples if is_count(samples) else None,
        max_lr=_rate(limits.get("max_lr")),
        min_lr=_rate(limits.get("min_lr")),
    )


def _rate(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) else None
