"""The `.metadata` pickle of torch.distributed.checkpoint: read with a closed list of classes.

Source: torch/distributed/checkpoint/metadata.py and filesystem.py; Megatron adds the attribute
`mcore_data` (megatron/core/dist_checkpointing/strategies/torch.py) and, in some releases, keeps all
save plans in `all_local_plans`, which no reader needs.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.base import Item, Payload, Tensor
from pma_megatron.formats.pickles import load_strict
from pma_megatron.geometry import Box, Piece

METADATA_FILE = ".metadata"
_DCP = "torch.distributed.checkpoint"
_ALLOWED = frozenset(
    {(f"{_DCP}.metadata", name) for name in (
        "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
        "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
    )}
    | {(f"{_DCP}.planner", name) for name in (
        "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData",
    )}
    | {(f"{_DCP}.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")}
    | {("torch.serialization", "_get_layout")}
    | {("pathlib", name) for name in ("PosixPath", "PurePosixPath", "Path")}
)  # fmt: skip


class _MCoreMetadata(Metadata):
    """Megatron-core 0.15's own subclass; the base class and an attribute say the same."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class _SavePlan:
    """Megatron-core <= 0.15 keeps its save plans in the metadata; they are not used."""


_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_STAND_INS: dict[tuple[str, str], type] = {
    (_MCORE, "MCoreMetadata"): _MCoreMetadata,
    (_MCORE, "MCoreSavePlan"): _SavePlan,
}


def read_metadata(folder: Path) -> Metadata:
    """Read `.metadata` of a checkpoint folder.

    Raises:
        CheckpointError: missing, damaged, hostile, or not a DCP `Metadata`.
    """
    path = folder / METADATA_FILE
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    metadata = load_strict(data, allowed=_ALLOWED, stand_ins=_STAND_INS, what=str(path))
    storage = getattr(metadata, "storage_data", None)
    if not isinstance(metadata, Metadata) or not isinstance(storage, dict):
        raise CheckpointError(
            f"{path} holds {type(metadata).__name__}, expected torch.distributed.checkpoint "
            "Metadata with storage_data: not a torch_dist checkpoint, or damaged"
        )
    return metadata


def parse(metadata: Metadata, what: str) -> tuple[dict[str, Tensor], dict[str, Item]]:
    """Tensors and opaque objects by key, in the order of the file (the order of the model).

    Raises:
        CheckpointError: an entry has no storage, is stored compressed, or lies outside its tensor.
    """
    tensors, objects = {}, {}
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            objects[key] = _item(metadata.storage_data, MetadataIndex(key), what)
        elif isinstance(entry, TensorStorageMetadata):
            tensors[key] = _tensor(key, entry, metadata.storage_data, what)
        else:
            raise CheckpointError(f"{what}: {key} is a {type(entry).__name__}, expected a tensor")
    return tensors, objects


def original_shape(metadata: Metadata, key: str) -> tuple[int, ...] | None:
    """Shape before Megatron <= 0.14 reformulated a flattened shard, or None."""
    data: Mapping[str, Any] = getattr(metadata, "mcore_data", None) or {}
    shape = data.get(key, {}).get("nd_reformulated_orig_global_shape")
    return None if shape is None else tuple(shape)


def dump_metadata(base: Metadata, places: Mapping[MetadataIndex, Item], drop: set[str],
                  dtypes: Mapping[str, Any]) -> bytes:  # fmt: skip
    """`.metadata` of an output: `base` with other places, without `drop`, with other `dtypes`."""
    kept: dict[str, Any] = {}
    for key, entry in base.state_dict_metadata.items():
        if key in drop:
            continue
        if key in dtypes and isinstance(entry, TensorStorageMetadata):
            properties = type(entry.properties)(**{**vars(entry.properties), "dtype": dtypes[key]})
            entry = TensorStorageMetadata(properties, entry.size, entry.chunks)
        kept[key] = entry
    output = Metadata(kept)
    for name, value in vars(base).items():
        if name not in ("state_dict_metadata", "storage_data", "all_local_plans"):
            setattr(output, name, value)
    if isinstance(base.planner_data, dict):
        output.planner_data = {k: v for k, v in base.planner_data.items() if k not in drop}
    if isinstance(getattr(base, "mcore_data", None), dict):
        output.mcore_data = {k: v for k, v in base.mcore_data.items() if k not in drop}  # type: ignore[attr-defined]
    output.storage_data = {
        index: _StorageInfo(item.file, item.offset, item.length) for index, item in places.items()
    }
    return pickle.dumps(output)


def _item(storage: Mapping[MetadataIndex, Any], index: MetadataIndex, what: str) -> Item:
    info = storage.get(index)
    if info is None:
        raise CheckpointError(f"{what}: {index.fqn} at {index.offset} has no storage: damaged")
    if getattr(info, "transform_descriptors", None):
        raise CheckpointError(
            f"{what}: {index.fqn} is stored through {info.transform_descriptors}; only plain "
            "torch.save items are supported: re-save the checkpoint without compression"
        )
    name = Path(info.relative_path)
    if name.is_absolute() or ".." in name.parts:
        raise CheckpointError(
            f"{what}: {index.fqn} points to {info.relative_path!r}, outside the checkpoint: refused"
        )
    return Item(str(info.relative_path), int(info.offset), int(info.length))


def _tensor(key: str, entry: TensorStorageMetadata, storage: Mapping[MetadataIndex, Any],
            what: str) -> Tensor:  # fmt: skip
    shape, dtype = tuple(entry.size), entry.properties.dtype
    pieces = []
    for chunk in entry.chunks:
        box = Box(tuple(chunk.offsets), tuple(chunk.sizes))
        inside = all(
            o >= 0 and o + n <= d for o, n, d in zip(box.offsets, box.sizes, shape, strict=True)
        )
        if not inside:
            raise CheckpointError(f"{what}: {key} has a chunk {box} outside its shape {shape}")
        item = _item(storage, MetadataIndex(key, chunk.offsets), what)
        pieces.append(Piece(box, Payload(item, dtype, box.numel)))
    return Tensor(key, dtype, shape, tuple(pieces))
