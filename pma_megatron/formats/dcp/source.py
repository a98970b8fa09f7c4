"""Open one checkpoint of DCP as a source of a merge."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from pma_megatron.errors import CheckpointError, PlanError
from pma_megatron.formats.base import MAIN_PARAM, ModelSpace, Schedule, Tensor, least_decay
from pma_megatron.formats.contract import Common
from pma_megatron.formats.dcp import keys
from pma_megatron.formats.dcp.checkpoint import FORMAT_NAME, DcpCheckpoint, named_iteration
from pma_megatron.formats.dcp.completeness import completeness
from pma_megatron.formats.dcp.main_params import ROUNDED, alike, with_main_params
from pma_megatron.formats.flat import FlatMap
from pma_megatron.formats.source import Source, stamps_of
from pma_megatron.storage.paths import path_of

_RANK = re.compile(r"__(\d+)_\d+\.distcp$")


def read_source(path: str, ranges: FlatMap, main_params: bool, peers: Sequence[str] = ()) -> Source:
    """Open the checkpoint at `path` and express it in model space.

    Parameters that are float32 are their own main params: FSDP2 computes with 16-bit copies of them
    (`MixedPrecisionPolicy`), which are never saved.

    Args:
        path: its folder.
        ranges: not needed: every tensor has a name.
        main_params: False reads no optimizer (weights alone are averaged).
        peers: not needed.

    Raises:
        CheckpointError: incomplete, damaged or hostile.
        PlanError: it keeps main params of 16-bit weights that do not say whose they are.
    """
    reason = completeness(path_of(path))
    if reason:
        raise CheckpointError(f"{path} is not complete: {reason}. Exclude it, or restore it.")
    checkpoint = DcpCheckpoint(path_of(path))
    names = checkpoint.names
    weights = {name: checkpoint.tensors[key] for name, key in names.weights.items()}
    rounded = sorted(name for name, tensor in weights.items() if tensor.dtype in ROUNDED)
    states = _states(checkpoint, weights)
    if main_params and rounded:
        _refuse_unnamed(checkpoint, rounded)
        states = with_main_params(checkpoint, weights, states)
    elif MAIN_PARAM in states:
        states[MAIN_PARAM] = alike(states[MAIN_PARAM], weights)
    placed = {tensor.key for tensors in (weights, *states.values()) for tensor in tensors.values()}
    kind = "by number" if names.numbered else "by name" if names.optimizer else "none"
    source = Source(
        path=path,
        format=FORMAT_NAME,
        space=ModelSpace(weights, states, kind),
        objects=tuple(key for key in checkpoint.paths if key not in placed),
        optimizer_keys=names.optimizer,
        metadata_digest=checkpoint.metadata_digest(),
        ranges={},
        topology=_topology(checkpoint),
        stamps=stamps_of(checkpoint.path),
        counted_steps=checkpoint.counted,
    )
    exact = states.get(MAIN_PARAM, {})
    told = [_second_model(checkpoint)]
    if main_params:
        told.append(_note(path, [name for name in rounded if name not in exact]))
    return replace(source, notes=tuple(note for note in told if note))


def _second_model(checkpoint: DcpCheckpoint) -> str | None:
    """Of tensors that keep the name of their dictionary, for another has such names too."""
    weights, paths = checkpoint.names.weights, checkpoint.paths
    second = [name for name, key in weights.items() if name == key and len(paths[key]) > 1]
    if not second:
        return None
    return (
        f"{checkpoint.path} holds a second model ({second[0]}, {len(second)} in all): it is "
        "averaged as the first is, under its own name"
    )


def _states(
    checkpoint: DcpCheckpoint, weights: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Moments and main params. What has but one element of every parameter is a counter, as `step`
    is: where parameters have numbers, nothing else tells those from moments."""
    states: dict[str, dict[str, Tensor]] = {}
    for state, stored in checkpoint.names.states.items():
        tensors = {name: checkpoint.tensors[key] for name, key in stored.items()}
        alone = checkpoint.is_counted(stored.values())
        if state != keys.STEP and not (alone and state in keys.COUNTED):
            states[state] = alike(tensors, weights) if alone else tensors
    return {state: tensors for state, tensors in states.items() if tensors}


def _refuse_unnamed(checkpoint: DcpCheckpoint, rounded: Sequence[str]) -> None:
    """16-bit weights beside an optimizer's own tensors: those may be main params, of the newest."""
    tensors = (checkpoint.tensors[key] for key in checkpoint.names.unnamed)
    unnamed = [t.key for t in tensors if t.dtype == torch.float32 and t.shape not in ((), (1,))]
    if unnamed:
        raise PlanError(
            f"{checkpoint.path}: {rounded[0]} ({len(rounded)} in all) is rounded to 16 bits, and "
            f"its optimizer keeps float32 tensors that do not say which parameter they are of "
            f"({unnamed[0]}, {len(unnamed)} in all): averaged weights would be undone by them at "
            "the first step. What works: average what a model is made of with average='weights', "
            "or train with float32 parameters and a mixed-precision policy"
        )


def _note(path: str, rounded: Sequence[str]) -> str | None:
    if not rounded:
        return None
    return (
        f"{path} stores {rounded[0]} ({len(rounded)} in all) in 16 bits and no main params: the "
        "average is of rounded values, and is rounded once more. Training keeps nothing better"
    )


def _topology(checkpoint: DcpCheckpoint) -> str:
    ranks = {m[1] for item in checkpoint.items() if (m := _RANK.search(item.file))}
    return f"{len(ranks)} rank{'s' if len(ranks) != 1 else ''}" if ranks else "unknown ranks"


def read_common(path: Path) -> Common:
    """Iteration, tokens and, where Megatron wrote it, training arguments.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = DcpCheckpoint(path)
    iteration = checkpoint.saved_iteration
    if iteration is None:
        iteration = _iteration(checkpoint)
    found: Common = {
        "iteration": iteration,
        "args": dict(checkpoint.args),
        "weights_only": not checkpoint.names.optimizer,
    }
    if checkpoint.tokens is not None:
        found["tokens"] = checkpoint.tokens
    return found


def iteration_of(path: Path) -> int | None:
    """By the folder's name; else by what is in it, and by what its optimizer has counted."""
    try:
        named = named_iteration(path)
        return read_common(path)["iteration"] if named is None else named
    except (CheckpointError, OSError):
        return None


def _iteration(checkpoint: DcpCheckpoint) -> int | None:
    named = named_iteration(checkpoint.path)
    return max(checkpoint.counted_steps(), default=None) if named is None else named


def read_schedule(path: Path) -> Schedule:
    """Learning rate and optimizer steps.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    checkpoint = DcpCheckpoint(path)
    rates = [rate for _, rate in checkpoint.settings("lr")]
    return Schedule(
        learning_rate=max(
            (float(r) for r in rates if isinstance(r, (int, float)) and r == r), default=None
        ),
        second_moment_decay=least_decay({"betas": b} for _, b in checkpoint.settings("betas")),
        optimizer_steps=max(checkpoint.counted_steps(), default=None),
    )
