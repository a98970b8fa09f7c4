"""Lay out a merged checkpoint of DCP: the newest source's files, with new payloads in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from pma_megatron.base.spelling import named
from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Item
from pma_megatron.formats.dcp.building import Build, Entry, entries_of, new_dtypes, saved
from pma_megatron.formats.dcp.checkpoint import DcpCheckpoint
from pma_megatron.formats.dcp.metadata import METADATA_FILE, dump_metadata
from pma_megatron.formats.output import Changes, OutputLayout
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.rates import scale_groups, scale_schedule
from pma_megatron.storage.paths import path_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def output_layout(path: str, changes: Changes) -> OutputLayout:
    """Lay out a merged checkpoint after the one at `path`.

    Raises:
        UsageError: rates are to be scaled, and it stores none; its optimizer cannot begin anew.
    """
    base = DcpCheckpoint(path_of(path))
    build = Build(base, changes)
    edits = _edits(base, changes)
    entries = [e for e in entries_of(base.tensors, base.objects) if e.key not in changes.drop]
    build.place(entries, lambda entry: edits.get(entry.key))
    small = _small_files(build, base, entries)
    return OutputLayout(
        files=dict(build.sizes),
        items=tuple(build.items),
        places=build.places,
        small_files=small,
        last_file=next(reversed(small)),
    )


def _edits(base: DcpCheckpoint, changes: Changes) -> dict[str, bytes]:
    """Small entries of the optimizer that the policy changes -> their new bytes."""
    edits: dict[str, bytes] = {}
    if changes.optimizer == "reset":
        base.refuse_reset()
        for key, first in base.begun.items():
            edits |= _restarted(base, key, first)
    if changes.lr_factor is not None:
        edits |= _scaled(base, changes.lr_factor)
    return edits


def _restarted(base: DcpCheckpoint, key: str, first: float) -> dict[str, bytes]:
    """A counter where it begins."""
    if key in base.objects:
        step, item = base.value(key), base.objects[key]
        number = isinstance(step, (int, float))
        return {key: saved(base, item, type(step)(first), set())} if number else {}
    edits = {}
    for piece in base.tensors[key].pieces:
        ref = base.decode(piece.payload.item, f"{base.path}: {key}")
        element = torch.tensor([first], dtype=base.tensors[key].dtype)
        content = element.view(torch.uint8).numpy().tobytes()
        filled = {ref.storage.key: content} if isinstance(ref, TensorRef) else {}
        edits[key] = saved(base, piece.payload.item, ref, set(), filled)
    return edits


def _scaled(base: DcpCheckpoint, factor: float) -> dict[str, bytes]:
    """Rates of param groups and of schedulers, which flattening has made entries of their own."""
    edits: dict[str, bytes] = {}
    groups = 0
    for name in _RATES:
        for key, rate in base.settings(name):
            value: Any = {"param_groups": [{name: rate}]}
            groups += scale_groups(value, factor, f"{base.path}: {key}")
            scaled = value["param_groups"][0][name]
            edits[key] = saved(base, base.objects[key], scaled, set())
    for key, item in base.objects.items():
        path = base.paths[key]
        if key not in base.names.optimizer and any("sched" in str(part) for part in path):
            last = next((part for part in reversed(path) if isinstance(part, str)), "")
            value = {last: base.value(key)}
            if scale_schedule(value, factor, f"{base.path}: {key}"):
                edits[key] = saved(base, item, value[last], set())
    if not groups:
        raise UsageError(
            f"{named('lr_factor')}: {base.path} stores no learning rates of param groups. Leave it "
            "out, and lower the rate in the run's own command"
        )
    return edits


def _small_files(
    build: Build, base: DcpCheckpoint, entries: list[Entry]
) -> OrderedDict[str, bytes]:
    """What a save writes last, part by part."""
    from torch.distributed.checkpoint.metadata import MetadataIndex  # as slow as torch to import

    small: OrderedDict[str, bytes] = OrderedDict()
    dtypes = new_dtypes(base.tensors, build.changes)
    for part, metadata in base.parts.items():
        written = {
            MetadataIndex(e.key.removeprefix(part), e.index.offset): build.moved[e.item]
            for e in entries
            if e.key.startswith(part)
        }
        if part and not written:
            continue  # nothing is left of it: an optimizer that was dropped
        small[f"{part}{METADATA_FILE}"] = _metadata(part, metadata, written, build, dtypes)
    return small


def _metadata(
    part: str, metadata: Any, written: Mapping[MetadataIndex, Item], build: Build, dtypes: Any
) -> bytes:
    inside = {key.removeprefix(part): dtype for key, dtype in dtypes.items()}
    drop = {key.removeprefix(part) for key in build.changes.drop if key.startswith(part)}
    return dump_metadata(metadata, written, drop, inside, part)
