"""Lay out a merged checkpoint of DCP: the newest source's files, with new payloads in them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

from pma_megatron.base.spelling import named
from pma_megatron.errors import UsageError
from pma_megatron.formats.dcp.building import Shards, lay_out_shards, saved
from pma_megatron.formats.dcp.checkpoint import DcpCheckpoint
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.dcp.metadata_writer import dump_metadata
from pma_megatron.formats.output import Changes, OutputLayout
from pma_megatron.formats.pickles import TensorRef
from pma_megatron.formats.rates import scale_groups, scale_schedule
from pma_megatron.storage.paths import path_of

T = TypeVar("T")

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")


def output_layout(path: str, changes: Changes) -> OutputLayout:
    """Lay out a merged checkpoint after the one at `path`.

    Raises:
        UsageError: rates are to be scaled, and it stores none; its optimizer cannot begin anew.
    """
    base = DcpCheckpoint(path_of(path))
    edits = _edits(base, changes)
    shards = lay_out_shards(base, base.tensors, base.objects, changes, edits.get)
    small = _small_files(base, changes, shards)
    return OutputLayout(
        files=shards.sizes,
        items=shards.items,
        places=shards.places,
        base_shards=shards.of_base,
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


def _small_files(base: DcpCheckpoint, changes: Changes, shards: Shards) -> OrderedDict[str, bytes]:
    """What a save writes last, part by part."""
    small: OrderedDict[str, bytes] = OrderedDict()
    for part, metadata in base.parts.items():

        def inside(values: Mapping[str, T], part: str = part) -> dict[str, T]:
            return {k.removeprefix(part): v for k, v in values.items() if k.startswith(part)}

        stored = inside(shards.stored)
        if part and not stored:
            continue  # nothing is left of it: an optimizer that was dropped
        drop = {key.removeprefix(part) for key in changes.drop if key.startswith(part)}
        dtypes = inside(shards.dtypes)
        small[f"{part}{METADATA_FILE}"] = dump_metadata(metadata, stored, drop, dtypes, part)
    return small
