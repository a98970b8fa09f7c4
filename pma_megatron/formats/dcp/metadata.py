"""The `.metadata` pickle of torch.distributed.checkpoint: decoded, checked, in our own values.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py; Megatron adds the attribute
`mcore_data` (megatron/core/dist_checkpointing/strategies/torch.py) and, in some releases, keeps all
save plans in `all_local_plans`, which no reader needs. Nothing of the file itself is used before
every field that is read has been checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pma_megatron.base.boxes import Box, Piece
from pma_megatron.base.memory import collector_at_rest
from pma_megatron.base.once import once
from pma_megatron.base.openfiles import read_source_file
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.dcp.cover import cover, refuse_shared
from pma_megatron.formats.inert import Name, Record, brief, fields_of
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE
from pma_megatron.formats.names import plain_name
from pma_megatron.formats.pickles import load_inert
from pma_megatron.formats.schema import (
    LIMIT,
    a_list,
    dictionary,
    is_count,
    is_shape,
    pairs_of,
    record_fields,
    wrong,
)

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import MetadataIndex

METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_RESERVED = {METADATA_FILE, CONFIG_FILE, COMMON_FILE, MARKER_FILE, SEAL_FILE}
_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_METADATA = {Name(f"{_DCP}.metadata", "Metadata"), Name(_MCORE, "MCoreMetadata")}
_TENSOR = Name(f"{_DCP}.metadata", "TensorStorageMetadata")
_BYTES = Name(f"{_DCP}.metadata", "BytesStorageMetadata")
_CHUNK = Name(f"{_DCP}.metadata", "ChunkStorageMetadata")
_PROPERTIES = Name(f"{_DCP}.metadata", "TensorProperties")
_INDEX = Name(f"{_DCP}.metadata", "MetadataIndex")
_FORMATS = Name(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING")
_INFO = Name(f"{_DCP}.filesystem", "_StorageInfo")
_LAYOUT = Name("torch.serialization", "_get_layout")
_ALLOWED = frozenset(
    {
        (f"{_DCP}.metadata", name)
        for name in (
            "Metadata",
            "TensorStorageMetadata",
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "MetadataIndex",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        )
    }
    | {
        (f"{_DCP}.planner", name)
        for name in (
            "SavePlan",
            "WriteItem",
            "WriteItemType",
            "TensorWriteData",
            "BytesIOWriteData",
        )
    }
    | {(f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch.serialization", "_get_layout")}
    | {(_MCORE, name) for name in ("MCoreMetadata", "MCoreSavePlan")}
    | {("pathlib", name) for name in ("PosixPath", "PurePosixPath", "Path")}
)
_MEMORY_FORMATS = (
    ("TORCH_CONTIGUOUS_FORMAT", torch.contiguous_format),
    ("TORCH_CHANNELS_LAST", torch.channels_last),
    ("TORCH_PRESERVE_FORMAT", torch.preserve_format),
)
"""Members of `_MEM_FORMAT_ENCODING`, by their value."""
_MAX_KEY = 4096
_ORIGINAL_SHAPE = "nd_reformulated_orig_global_shape"
_Index = tuple[str, "tuple[int, ...] | None"]
"""Key of an entry and offsets of a chunk of it, as `MetadataIndex`; None for an object."""


@dataclass(frozen=True, slots=True)
class Properties:
    """`TensorProperties` of a tensor."""

    dtype: torch.dtype
    requires_grad: bool
    memory_format: torch.memory_format
    pin_memory: bool


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """What a `.metadata` says, checked.

    Attributes:
        tensors: tensors by key, in the order of the file (the order of the model).
        objects: opaque entries by key, likewise.
        order: all keys, in the order of the file.
        properties: of each tensor.
        planner_data: key -> path in the state dict that it was flattened from; None if it is not
            said.
        original_shapes: key -> shape before Megatron <= 0.14 reformulated a flattened shard, None
            for keys that it left alone; None if it is not Megatron's.
    """

    tensors: Mapping[str, Tensor]
    objects: Mapping[str, Item]
    order: tuple[str, ...]
    properties: Mapping[str, Properties]
    planner_data: Mapping[str, tuple[str | int, ...]] | None
    original_shapes: Mapping[str, tuple[int, ...] | None] | None


def read_metadata(folder: Path, below: str = "") -> DcpMetadata:
    """Read `.metadata` of a checkpoint folder, or of a part of one; once a job (`base.once`).

    Args:
        folder: of the checkpoint.
        below: folder of the part in it, with a `/` at its end.

    Raises:
        CheckpointError: missing, damaged, hostile, or not a DCP `Metadata`.
    """
    path = folder / below / METADATA_FILE
    return once(f"metadata {below}", path, lambda: parse(read_source_file(path), str(path), below))


def parse(data: bytes, what: str, below: str = "") -> DcpMetadata:
    """The content of a `.metadata`.

    Args:
        data: the file's bytes.
        what: the file, for messages.
        below: goes before the names of files that it says.

    Raises:
        CheckpointError: an entry is not of the kind or type that it has to be, has no storage, is
            stored compressed, or names a file outside the folder; chunks of a tensor overlap or do
            not cover it; two entries share bytes.
    """
    with collector_at_rest():
        return _checked(load_inert(data, what=what, known=_ALLOWED, walked=False), what, below)


def _checked(value: Any, what: str, below: str) -> DcpMetadata:
    fields = fields_of(value)
    if fields is None or value.name not in _METADATA:
        raise CheckpointError(
            f"{what} holds {brief(value)}, expected torch.distributed.checkpoint Metadata: not a "
            "checkpoint of torch, or damaged"
        )
    entries = dictionary(fields.get("state_dict_metadata"), f"{what}: state_dict_metadata")
    storage = _storage(fields.get("storage_data"), what, below)
    tensors, objects, properties = {}, {}, {}
    for key, entry in entries.items():
        if len(key) > _MAX_KEY or not key.isprintable():
            raise wrong(f"{what}: state_dict_metadata", "names of parameters", key)
        where = f"{what}: {key}"
        kind = entry.name if type(entry) is Record else None
        if kind == _BYTES:
            objects[key] = _stored(storage, (key, None), what)
        elif kind == _TENSOR:
            properties[key], tensors[key] = _tensor(key, record_fields(entry, where), storage, what)
        else:
            raise wrong(where, "a tensor or an object of DCP", entry)
    refuse_shared([p.payload.item for t in tensors.values() for p in t.pieces], objects, what)
    return DcpMetadata(
        tensors,
        objects,
        tuple(entries),
        properties,
        _planner_data(fields.get("planner_data"), f"{what}: planner_data"),
        _original_shapes(fields.get("mcore_data"), f"{what}: mcore_data"),
    )


def original_shape(metadata: DcpMetadata, key: str) -> tuple[int, ...] | None:
    """Shape before Megatron <= 0.14 reformulated a flattened shard, or None."""
    return (metadata.original_shapes or {}).get(key)


def dump_metadata(
    base: DcpMetadata,
    places: Mapping[MetadataIndex, Item],
    drop: Collection[str],
    dtypes: Mapping[str, torch.dtype],
    below: str = "",
) -> bytes:
    """`.metadata` of an output: `base` with other places, without `drop`, with other `dtypes`.

    `below` is what goes before the names of files in `places`, and is not said here.
    """
    # Not above: they take as long to import as torch, and who only reads needs none of them.
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import (
        BytesStorageMetadata,
        ChunkStorageMetadata,
        Metadata,
        TensorProperties,
        TensorStorageMetadata,
    )

    entries: dict[str, Any] = {}
    for key in base.order:
        if key in drop:
            continue
        entries[key] = BytesStorageMetadata()
        if key in base.tensors:
            tensor, said = base.tensors[key], base.properties[key]
            properties = TensorProperties(
                dtype=dtypes.get(key, said.dtype),
                requires_grad=said.requires_grad,
                memory_format=said.memory_format,
                pin_memory=said.pin_memory,
            )
            boxes = [piece.box for piece in tensor.pieces]
            chunks = [
                ChunkStorageMetadata(torch.Size(b.offsets), torch.Size(b.sizes)) for b in boxes
            ]
            entries[key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
    output = Metadata(entries)
    if base.planner_data is not None:
        output.planner_data = {k: v for k, v in base.planner_data.items() if k not in drop}
    if base.original_shapes is not None:
        output.mcore_data = {  # type: ignore[attr-defined]
            key: {} if shape is None else {_ORIGINAL_SHAPE: shape}
            for key, shape in base.original_shapes.items()
            if key not in drop
        }
    output.storage_data = {
        index: _StorageInfo(item.file.removeprefix(below), item.offset, item.length)
        for index, item in places.items()
    }
    return pickle.dumps(output)


# Parts of the file.


def _storage(value: Any, what: str, below: str) -> dict[_Index, Item]:
    """Where entries are stored, as far as anything can ask for them: the file may list others."""
    found: dict[_Index, Item] = {}
    names: dict[str, str] = {}
    where = f"{what}: storage_data"
    if type(value) is Record:  # an index is a record, so the keys of a dictionary are its own
        raise wrong(where, "a dictionary", value)
    for index, info in pairs_of(value, where):
        said = record_fields(index, f"{where} has a key that is no MetadataIndex;", _INDEX)
        key, offset = said.get("fqn"), said.get("offset")
        if type(key) is not str or not (offset is None or is_shape(offset)):
            raise wrong(f"{where}: an index", "a name and offsets", (key, offset))
        at = f"{where} of {brief(key)}"
        said = record_fields(info, at, _INFO)
        if said.get("transform_descriptors"):
            raise CheckpointError(
                f"{at} goes through {brief(said['transform_descriptors'])}; only plain torch.save "
                "items are supported: re-save the checkpoint without compression"
            )
        path: Any = said.get("relative_path")
        start: Any = said.get("offset")
        length: Any = said.get("length")
        if type(path) is not str or path not in names:
            name = plain_name(path, f"{at}: relative_path")
            if name in _RESERVED:
                raise wrong(f"{at}: relative_path", "a file of payload", path)
            names[name] = below + name
        if not (is_count(start) and is_count(length) and start + length < LIMIT):
            raise wrong(f"{at}: offset and length", "bytes of a file", (start, length))
        found[key, None if offset is None else tuple(offset)] = Item(names[path], start, length)
    return found


def _stored(storage: Mapping[_Index, Item], index: _Index, what: str) -> Item:
    item = storage.get(index)
    if item is None:
        raise CheckpointError(f"{what}: {index[0]} at {index[1]} has no storage: damaged")
    return item


def _tensor(
    key: str, said: Mapping[str, Any], storage: Mapping[_Index, Item], what: str
) -> tuple[Properties, Tensor]:
    where = f"{what}: {key}"
    properties = _properties(said.get("properties"), f"{where}: properties")
    shape = _shape(said.get("size"), f"{where}: size", properties.dtype)
    pieces = []
    for chunk in a_list(said.get("chunks"), f"{where}: chunks"):
        parts = record_fields(chunk, f"{where}: a chunk", _CHUNK)
        offsets: Any = parts.get("offsets")
        sizes: Any = parts.get("sizes")
        inside = (
            is_shape(sizes)
            and isinstance(offsets, tuple)
            and len(sizes) == len(offsets) == len(shape)
            and all(map(is_count, offsets))
            and all(o + n <= d for o, n, d in zip(offsets, sizes, shape, strict=True))
        )
        if not inside:
            found = f"offsets {brief(offsets)} and sizes {brief(sizes)}"
            raise CheckpointError(
                f"{where} has a chunk with {found}, expected a part of its shape {shape}: damaged"
            )
        box = Box(tuple(offsets), tuple(sizes))
        item = _stored(storage, (key, box.offsets), what)
        if box.numel * properties.dtype.itemsize > item.length:
            raise wrong(f"{where}: {brief(sizes)}", f"at most {item.length} bytes, as stored", box)
        pieces.append(Piece(box, Payload(item, properties.dtype, box.numel)))
    if not cover([piece.box for piece in pieces], shape):
        raise CheckpointError(
            f"{where} has {len(pieces)} chunks that do not cover each element of its shape {shape} "
            "exactly once: damaged. Exclude this checkpoint"
        )
    return properties, Tensor(key, properties.dtype, shape, tuple(pieces))


def _properties(value: Any, what: str) -> Properties:
    """`TensorProperties.__getstate__`: dtype, layout, requires_grad, memory format, pin_memory."""
    state = value.state if type(value) is Record and value.name == _PROPERTIES else None
    if type(state) is not tuple or len(state) != 5:
        raise wrong(what, "TensorProperties", value)
    dtype, layout, requires_grad, memory_format, pin_memory = state
    if type(dtype) is not torch.dtype:
        raise wrong(f"{what}: dtype", "a dtype of torch", dtype)
    dense = type(layout) is Record and layout.name == _LAYOUT and layout.args == ("torch.strided",)
    if not dense:
        raise wrong(f"{what}: layout", "torch.strided", getattr(layout, "args", layout))
    if type(requires_grad) is not bool or type(pin_memory) is not bool:
        raise wrong(f"{what}: flags", "True or False", (requires_grad, pin_memory))
    return Properties(dtype, requires_grad, _memory_format(memory_format, what), pin_memory)


def _memory_format(value: Any, what: str) -> torch.memory_format:
    """A member of an enum: by value, and of some Pythons by name (`pickles`)."""
    if type(value) is Record:
        for number, (name, found) in enumerate(_MEMORY_FORMATS):
            by_value = value.name == _FORMATS and value.args == (number,)
            if (by_value and type(value.args[0]) is int) or value.args == (_FORMATS, name):
                return found
    raise wrong(f"{what}: memory_format", "one that torch stores", getattr(value, "args", value))


def _planner_data(value: Any, what: str) -> dict[str, tuple[str | int, ...]] | None:
    if value is None:
        return None
    found = dictionary(value, what)
    for key, path in found.items():
        if type(path) is not tuple or not all(type(part) in (str, int) for part in path):
            raise wrong(f"{what} of {brief(key)}", "a path of names and numbers", path)
    return found


def _original_shapes(value: Any, what: str) -> dict[str, tuple[int, ...] | None] | None:
    if value is None:
        return None
    result: dict[str, tuple[int, ...] | None] = {}
    for key, said in dictionary(value, what).items():
        shape = dictionary(said, f"{what} of {brief(key)}").get(_ORIGINAL_SHAPE)
        if shape is not None and not is_shape(shape):
            raise wrong(f"{what} of {brief(key)}", "a shape", shape)
        result[key] = None if shape is None else tuple(shape)
    return result


def _shape(value: Any, what: str, dtype: torch.dtype) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not is_shape((*value, dtype.itemsize)):
        raise wrong(what, "a shape", value)
    return tuple(value)
