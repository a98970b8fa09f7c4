"""The layout of a merged checkpoint: the newest source's files, with new payloads in them.

Items that keep all their bytes are copied as they are; items with new payloads are laid out afresh
(the same records, and the sizes that the new dtypes need). Nothing is written here: the result says
what goes where.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import MetadataIndex

from pma_megatron.base.openfiles import read_source_file
from pma_megatron.base.spelling import named
from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.output import Changes, Destination, OutputItem, OutputLayout
from pma_megatron.formats.pickles import dump_inert, new_tensor
from pma_megatron.formats.rates import scale_groups, scale_schedule
from pma_megatron.formats.relay import relay, reset_steps
from pma_megatron.formats.torch_dist.checkpoint import (
    COMMON_FILE,
    COMMON_KEY,
    CONFIG_FILE,
    TorchDistCheckpoint,
)
from pma_megatron.formats.torch_dist.integrity import INTEGRITY
from pma_megatron.formats.torch_dist.metadata import METADATA_FILE, dump_metadata
from pma_megatron.formats.torch_dist.optimizer import is_optimizer_key
from pma_megatron.formats.zips import Skeleton, lay_out

_SMALL_STATE = ".optimizer/shard"  # param groups and steps of `dp_reshardable`


@dataclass(slots=True)
class _Build:
    base: TorchDistCheckpoint
    changes: Changes
    sizes: dict[str, int] = field(default_factory=dict)
    items: list[OutputItem] = field(default_factory=list)
    places: dict[Payload, Destination] = field(default_factory=dict)
    moved: dict[Item, Item] = field(default_factory=dict)


def output_layout(base: TorchDistCheckpoint, changes: Changes) -> OutputLayout:
    """Lay out a merged checkpoint after `base`.

    Raises:
        UsageError: rates are to be scaled, and it stores none.
    """
    build = _Build(base, changes)
    by_item: dict[Item, list[Payload]] = {}
    for payload in changes.payloads:
        by_item.setdefault(payload.item, []).append(payload)
    dropped = {i.index for i in _entries(base) if i.key in changes.drop}
    entries = [e for e in _entries(base) if e.index not in dropped]
    for entry in sorted(entries, key=lambda e: (e.item.file, e.item.offset)):
        if entry.item in by_item:
            _relay(build, entry, by_item[entry.item])
        elif (edited := _edited(base, entry.key, changes)) is not None:
            _place_edited(build, entry.item, edited)
        else:
            _place_copy(build, entry.item)
    small = _small_files(build, {e.index: build.moved[e.item] for e in entries})
    return OutputLayout(
        files=dict(build.sizes),
        items=tuple(build.items),
        places=build.places,
        small_files=small,
        last_file=CONFIG_FILE,
        digests=INTEGRITY if (base.path / INTEGRITY.file).is_file() else None,
    )


@dataclass(frozen=True, slots=True)
class _Entry:
    key: str
    index: MetadataIndex
    item: Item


def _entries(base: TorchDistCheckpoint) -> list[_Entry]:
    result = []
    for key, tensor in base.tensors.items():
        for piece in tensor.pieces:
            index = MetadataIndex(key, torch.Size(piece.box.offsets))
            result.append(_Entry(key, index, piece.payload.item))
    for key, item in base.objects.items():
        result.append(_Entry(key, MetadataIndex(key), item))
    return result


def _reserve(build: _Build, base_item: Item, length: int) -> Item:
    offset = build.sizes.get(base_item.file, 0)
    build.sizes[base_item.file] = offset + length
    placed = Item(base_item.file, offset, length)
    build.moved[base_item] = placed
    return placed


def _place_copy(build: _Build, item: Item) -> None:
    placed = _reserve(build, item, item.length)
    build.items.append(OutputItem(placed, None, item, {}))


def _relay(build: _Build, entry: _Entry, payloads: list[Payload]) -> None:
    """An item with new payloads: a tensor of its own, or one object holding many."""
    if payloads[0].record is None:
        dtype = build.changes.payloads[payloads[0]]
        sizes = next(
            p.box.sizes for p in build.base.tensors[entry.key].pieces if p.payload == payloads[0]
        )
        skeleton = lay_out(
            dump_inert(new_tensor(sizes, dtype)), [("0", payloads[0].numel * dtype.itemsize)]
        )
        placed = _reserve(build, entry.item, skeleton.length)
        start = placed.offset + skeleton.payloads["data/0"][0]
        build.places[payloads[0]] = Destination(
            placed.file, start, dtype, payloads[0].numel, "data/0", len(build.items)
        )
        build.items.append(OutputItem(placed, skeleton, None, {}))
        return
    relaid = relay(
        build.base,
        entry.item,
        payloads,
        len(build.items),
        lambda length: _reserve(build, entry.item, length),
    )
    build.items.append(relaid.item)
    build.places.update(relaid.places)


def _place_edited(build: _Build, item: Item, edited: bytes) -> None:
    placed = _reserve(build, item, len(edited))
    build.items.append(OutputItem(placed, None, None, {}, literal=edited))


def _edited(base: TorchDistCheckpoint, key: str, changes: Changes) -> bytes | None:
    """New bytes of a small object that the optimizer policy changes, or None."""
    if key == COMMON_KEY:
        return _edited_common(base, changes)
    if not changes.edits_optimizer or not (is_optimizer_key(key) and _SMALL_STATE in key):
        return None
    item = base.objects[key]
    value = base.decode(item, f"{base.path}: {key}")
    zero = reset_steps(value) if changes.optimizer == "reset" else set()
    if changes.lr_factor is not None:
        scale_groups(value, changes.lr_factor, f"{base.path}: {key}")
    return _saved(base, item, value, zero)


def _edited_common(base: TorchDistCheckpoint, changes: Changes) -> bytes | None:
    if not (changes.edits_optimizer or changes.optimizer == "drop"):
        return None
    common = dict(base.common)  # what is taken out below stays in the base's
    value: Any = [common] if base.common_is_entry else common
    zero: set[str] = set()
    if changes.optimizer == "drop":
        for name in ("optimizer", "opt_param_scheduler"):
            common.pop(name, None)
    elif changes.optimizer == "reset":
        zero = reset_steps(common.get("optimizer"))
    if changes.lr_factor is not None:
        _scale_common(base, common, changes.lr_factor)
    return _saved(base, base.common_item, value, zero)


def _scale_common(base: TorchDistCheckpoint, common: Any, factor: float) -> None:
    what = str(base.path / COMMON_FILE)
    groups = scale_groups(common.get("optimizer"), factor, what)
    rates = scale_schedule(common.get("opt_param_scheduler"), factor, what)
    elsewhere = any(is_optimizer_key(key) and _SMALL_STATE in key for key in base.objects)
    if not rates or not (groups or elsewhere):
        missing = "scheduler" if groups or elsewhere else "param groups"
        raise UsageError(
            f"{named('lr_factor')}: {base.path} stores no learning rates of {missing}. Leave it "
            "out, and lower the rate in the run's own command"
        )


def _saved(base: TorchDistCheckpoint, item: Item, value: Any, zero: set[str]) -> bytes:
    """The whole zip of a small edited object."""
    records = base.records(item)
    data = {n: base.read_record(item, n) for n in records if n.startswith("data/")}
    data = {n: bytes(len(b)) if n.partition("/")[2] in zero else b for n, b in data.items()}
    skeleton = lay_out(dump_inert(value), [(n.partition("/")[2], len(b)) for n, b in data.items()])
    return fill(skeleton, data)


def fill(skeleton: Skeleton, data: Mapping[str, bytes]) -> bytes:
    """A zip in memory: `skeleton` with its payloads."""
    from isal import isal_zlib

    result = bytearray(skeleton.length)
    for name, content in data.items():
        start, nbytes = skeleton.payloads[name]
        result[start : start + nbytes] = content
    crcs = {name: isal_zlib.crc32(content) for name, content in data.items()}
    for offset, content in skeleton.structure(crcs):
        result[offset : offset + len(content)] = content
    return bytes(result)


def _small_files(build: _Build, places: Mapping[MetadataIndex, Item]) -> OrderedDict[str, bytes]:
    """Files beside the shards, in the order in which a save writes them: markers last."""
    base, changes = build.base, build.changes
    small: OrderedDict[str, bytes] = OrderedDict()
    if not base.common_is_entry:
        edited = _edited_common(base, changes)
        small[COMMON_FILE] = edited or base.read_small(COMMON_FILE)
    dtypes: dict[str, torch.dtype] = {}
    for key, tensor in base.tensors.items():
        changed = (changes.payloads.get(p.payload) for p in tensor.pieces)
        new = {dtype for dtype in changed if dtype is not None}
        if new and new != {tensor.dtype}:
            dtypes[key] = new.pop()
    small[METADATA_FILE] = dump_metadata(base.metadata, places, set(changes.drop), dtypes)
    small[CONFIG_FILE] = read_source_file(base.path / CONFIG_FILE)
    return small
