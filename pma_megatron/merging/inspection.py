"""What is in one checkpoint, from its metadata alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import is_folder
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.errors import CheckpointError, PlanError, VerifyError
from pma_megatron.export.files import stored_in
from pma_megatron.formats import registry
from pma_megatron.formats.base import Tensor
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import EXPORT, MARKER_FILE
from pma_megatron.formats.trainers.saves import checkpoint_in, save_of
from pma_megatron.merging.folder_checksums import listing
from pma_megatron.merging.provenance import checked_provenance, read_provenance
from pma_megatron.merging.saved_over import saved_over
from pma_megatron.runs.describe import describe
from pma_megatron.runs.discover import list_checkpoints, pointed
from pma_megatron.runs.folders import is_checkpoint, what_is
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of


@dataclass(frozen=True, slots=True)
class TensorGroup:
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
        files: how many files it has.
        bytes: in them.
        topology: parallel sizes it was saved with; "" if it cannot be opened.
        optimizer_layout: how optimizer state is stored; "" if it cannot be opened.
        groups: tensors by kind.
        objects: number of opaque entries.
        provenance: how it was merged, or what a saved running average is of; None for a trainer's
            checkpoint or a snapshot.
        saved_over: files that are not what `pma.json` lists, where training has saved this
            checkpoint over an average.
        problem: why it is not whole, or cannot be opened; None if all is well.
    """

    ref: CheckpointRef
    files: int
    bytes: int
    topology: str = ""
    optimizer_layout: str = ""
    groups: tuple[TensorGroup, ...] = ()
    objects: int = 0
    provenance: Mapping[str, Any] | None = None
    saved_over: tuple[str, ...] = ()
    problem: str | None = None


def inspect(path: str | Path) -> Inspection:
    """Describe the checkpoint in folder `path` (`.../iter_0000100`), or the newest of a root.

    Raises:
        CheckpointError: not a whole checkpoint of a supported format; says why.
    """
    found = look(path)
    if found.problem is not None:
        raise CheckpointError(found.problem)
    return found


def look(path: str | Path) -> Inspection:
    """The same, with what can be said of a damaged or foreign folder instead of an error.

    Raises:
        CheckpointError: there is no such folder, or it is not clear which checkpoint is meant.
    """
    refuse_remote("", path, stores=True)
    folder = pointed(path_of(path)).absolute()
    if not is_folder(folder):
        raise CheckpointError(what_is(folder))
    exported = _is_export(folder)
    inside = None if exported else checkpoint_in(folder)
    if not (is_checkpoint(folder) or exported or inside):
        _refuse_root(folder)
    folder = inside or folder
    around = save_of(folder, registry.detect(folder)).folder
    sizes = listing(around)
    if exported:
        return _export(folder, sizes)
    found = Inspection(ref=describe(folder), files=len(sizes), bytes=sum(sizes.values()))
    if not found.ref.complete:
        why = found.ref.incomplete_because
        return replace(found, problem=f"{folder} is not a whole checkpoint: {why}")
    try:
        return _opened(around, found)
    except (CheckpointError, PlanError, VerifyError) as error:
        return replace(found, problem=f"{folder} cannot be opened: {error}")


def _is_export(folder: Path) -> bool:
    try:
        return read_json(folder / MARKER_FILE).get("kind") == EXPORT
    except CheckpointError:
        return False


def _export(folder: Path, sizes: Mapping[str, int]) -> Inspection:
    """A Hugging Face model that this package wrote."""
    ref = CheckpointRef(
        path=str(folder),
        format="safetensors",
        iteration=None,
        tokens_unknown_because="an export keeps no training arguments",
        complete=True,
        weights_only=True,
    )
    found = Inspection(ref=ref, files=len(sizes), bytes=sum(sizes.values()))
    try:
        marker = read_marker(folder)
        made = checked_provenance(folder, marker.value)
        entries = [stored.entry for stored in stored_in(folder, marker.sums).values()]
    except (CheckpointError, VerifyError) as error:
        return replace(found, problem=str(error))
    newest = made["plan"]["sources"][-1]
    said = {name: newest.get(name) for name in ("iteration", "consumed_tokens", "consumed_samples")}
    dtypes = sorted({str(entry.dtype).removeprefix("torch.") for entry in entries})
    elements = sum(entry.numel for entry in entries)
    nbytes = sum(entry.nbytes for entry in entries)
    group = TensorGroup("weight", len(entries), elements, nbytes, tuple(dtypes))
    return replace(
        found, ref=replace(ref, **said), groups=(group,), provenance=made, optimizer_layout="none"
    )


def _refuse_root(folder: Path) -> None:
    below = [ref.folder for ref in list_checkpoints(folder)]
    if below:
        raise CheckpointError(
            f"{folder} is a root of {len(below)} checkpoints without a tracker: inspect one of "
            f"them, for instance {below[-1]} (`pma list {folder}` has all)"
        )
    if registry.detect(folder) in ("unknown", registry.PICKLED):
        raise CheckpointError(what_is(folder))


def _opened(folder: Path, found: Inspection) -> Inspection:
    ref = found.ref
    source = registry.get(ref.format, ref.path).read_source(ref.path, {}, True)
    groups = [_group("weight", source.space.weights)]
    for state, tensors in source.space.states.items():
        groups.append(_group("main params" if state == "param" else state, tensors))
    opened = replace(
        found,
        topology=source.topology,
        optimizer_layout=source.space.kind,
        groups=tuple(groups),
        objects=len(source.objects),
    )
    if not (folder / MARKER_FILE).is_file() or ref.snapshot:
        return opened
    if changed := saved_over(folder):
        return replace(opened, saved_over=changed)
    try:
        return replace(opened, provenance=read_provenance(folder))
    except (CheckpointError, VerifyError) as error:
        return replace(opened, problem=str(error))


def _group(name: str, tensors: Mapping[str, Tensor]) -> TensorGroup:
    elements = [sum(p.box.numel for p in t.pieces) for t in tensors.values()]
    nbytes = sum(n * t.dtype.itemsize for n, t in zip(elements, tensors.values(), strict=True))
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values()})
    return TensorGroup(name, len(tensors), sum(elements), nbytes, tuple(dtypes))
