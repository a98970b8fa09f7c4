"""What is in one checkpoint, from its metadata alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.discover import describe
from pma_megatron.errors import CheckpointError
from pma_megatron.folders import is_checkpoint, what_is
from pma_megatron.formats import registry
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.marker import MARKER_FILE
from pma_megatron.locations import refuse_remote
from pma_megatron.refs import CheckpointRef
from pma_megatron.report import read_provenance


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one kind: `weight`, main params, or another optimizer state."""

    name: str
    tensors: int
    elements: int
    nbytes: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """One checkpoint.

    Attributes:
        ref: path, format, iteration, tokens, whether it is whole.
        topology: parallel sizes it was saved with.
        optimizer_layout: how optimizer state is stored.
        groups: tensors by kind.
        objects: number of opaque entries.
        provenance: how it was merged, None for a trainer's checkpoint or a snapshot.
    """

    ref: CheckpointRef
    topology: str
    optimizer_layout: str
    groups: tuple[Group, ...]
    objects: int
    provenance: Mapping[str, Any] | None


def inspect(path: str | Path) -> Inspection:
    """Describe the checkpoint in folder `path` (`.../iter_0000100`).

    Raises:
        CheckpointError: not a whole checkpoint of a supported format; says why.
    """
    refuse_remote("", path)
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(what_is(path))
    if not is_checkpoint(path) and registry.detect(path) == "unknown":
        raise CheckpointError(what_is(path))
    ref = describe(path)
    if not ref.complete:
        raise CheckpointError(f"{path} is not a whole checkpoint: {ref.incomplete_because}")
    source = registry.get(ref.format, ref.path).read_source(ref.path, {}, True)
    groups = [_group("weight", source.space.weights)]
    for state, tensors in source.space.states.items():
        groups.append(_group("main params" if state == "param" else state, tensors))
    merged = (path / MARKER_FILE).is_file() and not ref.snapshot
    return Inspection(
        ref=ref,
        topology=source.topology,
        optimizer_layout=source.space.kind,
        groups=tuple(groups),
        objects=len(source.objects),
        provenance=read_provenance(path) if merged else None,
    )


def _group(name: str, tensors: Mapping[str, Tensor]) -> Group:
    elements = [sum(p.box.numel for p in t.pieces) for t in tensors.values()]
    nbytes = sum(n * t.dtype.itemsize for n, t in zip(elements, tensors.values(), strict=True))
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return Group(name, len(tensors), sum(elements), nbytes, tuple(dtypes))
