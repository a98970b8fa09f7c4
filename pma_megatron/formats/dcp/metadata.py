"""The `.metadata` pickle of torch.distributed.checkpoint: decoded, checked, in our own values.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py; Megatron adds the attribute
`mcore_data` (megatron/core/dist_checkpointing/strategies/torch.py) and, in some releases, keeps all
save plans in `all_local_plans`, which no reader needs. Nothing of the file itself is used before
every field that is read has been checked. What it says a hundred thousand times is read as columns
(`formats.alike`, `stored`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pma_megatron.base.memory import collector_at_rest, give_back
from pma_megatron.base.once import once
from pma_megatron.base.openfiles import Content, read_source_once
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.alike import Alike
from pma_megatron.formats.base import Item, Tensor
from pma_megatron.formats.dcp.stored import (
    CHUNK,
    INDEX,
    INFO,
    Storage,
    boxes_of,
    refuse_shared,
    refuse_too_long,
)
from pma_megatron.formats.inert import Name, Record, brief, fields_of
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE
from pma_megatron.formats.pickles import load_inert
from pma_megatron.formats.pieces import StoredPieces
from pma_megatron.formats.schema import dictionary, is_shape, record_fields, wrong

METADATA_FILE = ".metadata"
CONFIG_FILE = "metadata.json"
COMMON_FILE = "common.pt"
_RESERVED = {METADATA_FILE, CONFIG_FILE, COMMON_FILE, MARKER_FILE, SEAL_FILE}
_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_METADATA = {Name(f"{_DCP}.metadata", "Metadata"), Name(_MCORE, "MCoreMetadata")}
_TENSOR = Name(f"{_DCP}.metadata", "TensorStorageMetadata")
_BYTES = Name(f"{_DCP}.metadata", "BytesStorageMetadata")
_PROPERTIES = Name(f"{_DCP}.metadata", "TensorProperties")
_FORMATS = Name(f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING")
_PASSED = frozenset({Name(f"{_DCP}.planner", "WriteItem")})
"""Of the plans of a save, which no reader needs."""
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
_LARGE = 10_000
"""Entries of which more memory is used to read them than to keep them."""
ORIGINAL_SHAPE = "nd_reformulated_orig_global_shape"


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

    def read() -> DcpMetadata:
        said = parse(lambda: read_source_once(path), str(path), below)
        if len(said.order) > _LARGE:
            give_back()
        return said

    return once(f"metadata {below}", path, read)


def parse(data: bytes | Callable[[], Content], what: str, below: str = "") -> DcpMetadata:
    """The content of a `.metadata`.

    Args:
        data: the file's bytes, or what reads them.
        what: the file, for messages.
        below: goes before the names of files that it says.

    Raises:
        CheckpointError: an entry is not of the kind or type that it has to be, has no storage, is
            stored compressed, or names a file outside the folder; chunks of a tensor overlap or do
            not cover it; two entries share bytes.
    """
    alike = Alike({CHUNK: None, INDEX: INFO}, _PASSED)
    read = data if callable(data) else lambda: data
    with collector_at_rest():
        try:
            return _checked(_decoded(read(), what, alike), what, below)
        except CheckpointError:
            if not alike.used:
                raise
        # Record by record: it is said of the very one what is wrong with it.
        return _checked(_decoded(read(), what, None), what, below)


def _decoded(data: Content, what: str, alike: Alike | None) -> Any:
    return load_inert(data, what=what, known=_ALLOWED, walked=False, alike=alike)


def _checked(value: Any, what: str, below: str) -> DcpMetadata:
    fields = fields_of(value)
    if fields is None or value.name not in _METADATA:
        raise CheckpointError(
            f"{what} holds {brief(value)}, expected torch.distributed.checkpoint Metadata: not a "
            "checkpoint of torch, or damaged"
        )
    entries = dictionary(fields.get("state_dict_metadata"), f"{what}: state_dict_metadata")
    storage = Storage(fields.get("storage_data"), what, below, _RESERVED)
    tensors, objects, properties = {}, {}, {}
    of_tensors: list[StoredPieces] = []
    for key, entry in entries.items():
        if len(key) > _MAX_KEY or not key.isprintable():
            raise wrong(f"{what}: state_dict_metadata", "names of parameters", key)
        where = f"{what}: {key}"
        kind = entry.name if type(entry) is Record else None
        if kind == _BYTES:
            objects[key] = storage.object(key)
        elif kind == _TENSOR:
            said = record_fields(entry, where)
            properties[key], shape, pieces = _tensor(key, said, storage, what)
            tensors[key] = Tensor(key, pieces.dtype, shape, pieces)
            of_tensors.append(pieces)
        else:
            raise wrong(where, "a tensor or an object of DCP", entry)
    refuse_shared(of_tensors, [*objects.values()], what)
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


# Parts of the file.


def _tensor(
    key: str, said: Mapping[str, Any], storage: Storage, what: str
) -> tuple[Properties, tuple[int, ...], StoredPieces]:
    where = f"{what}: {key}"
    properties = _properties(said.get("properties"), f"{where}: properties")
    shape = _shape(said.get("size"), f"{where}: size", properties.dtype)
    offsets, sizes = boxes_of(said.get("chunks"), shape, where)
    pieces = storage.pieces(key, properties.dtype, offsets, sizes)
    refuse_too_long(pieces, where)
    return properties, shape, pieces


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
        if type(path) is not tuple or not all(map(_is_part, path)):
            raise wrong(f"{what} of {brief(key)}", "a path of names and numbers", path)
    return found


def _is_part(part: Any) -> bool:
    """A NUL byte is in no name, and stands for something else where `.metadata` is written."""
    return type(part) is int or (type(part) is str and "\0" not in part)


def _original_shapes(value: Any, what: str) -> dict[str, tuple[int, ...] | None] | None:
    if value is None:
        return None
    result: dict[str, tuple[int, ...] | None] = {}
    for key, said in dictionary(value, what).items():
        shape = dictionary(said, f"{what} of {brief(key)}").get(ORIGINAL_SHAPE)
        if shape is not None and not is_shape(shape):
            raise wrong(f"{what} of {brief(key)}", "a shape", shape)
        result[key] = None if shape is None else tuple(shape)
    return result


def _shape(value: Any, what: str, dtype: torch.dtype) -> tuple[int, ...]:
    if not isinstance(value, tuple) or not is_shape((*value, dtype.itemsize)):
        raise wrong(what, "a shape", value)
    return tuple(value)
