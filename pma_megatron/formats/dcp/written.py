"""What a `.metadata` is made of, pickled as torch's own classes without importing those.

torch.distributed.checkpoint takes as long to import as torch, and 27 MiB. Each class here has the
name, the fields and the pickled state of the one that it stands for, and `pickled` says that one's
name. Source: torch/distributed/checkpoint/metadata.py and filesystem.py.
"""

from __future__ import annotations

import io
import pickle
import re
from enum import Enum
from typing import Any

import torch

_DCP = "torch.distributed.checkpoint"
_NAMED = re.compile(rb"c%s\n(\w+)\n" % re.escape(__name__).encode())
"""The opcode that asks for a class of this file, in a pickle of protocol 3."""


class _MEM_FORMAT_ENCODING(Enum):  # noqa: N801 (torch's name)
    TORCH_CONTIGUOUS_FORMAT = 0
    TORCH_CHANNELS_LAST = 1
    TORCH_PRESERVE_FORMAT = 2


_FORMATS = {
    torch.contiguous_format: _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT,
    torch.channels_last: _MEM_FORMAT_ENCODING.TORCH_CHANNELS_LAST,
    torch.preserve_format: _MEM_FORMAT_ENCODING.TORCH_PRESERVE_FORMAT,
}


class TensorProperties:
    """What a tensor is like."""

    def __init__(
        self,
        dtype: torch.dtype,
        requires_grad: bool,
        memory_format: torch.memory_format,
        pin_memory: bool,
    ) -> None:
        self._state = dtype, torch.strided, requires_grad, _FORMATS[memory_format], pin_memory

    def __getstate__(self) -> tuple[Any, ...]:
        return self._state


class TensorStorageMetadata:
    """A tensor, and its chunks."""

    def __init__(self, properties: TensorProperties, size: torch.Size, chunks: Any) -> None:
        self.properties, self.size, self.chunks = properties, size, chunks


class ChunkStorageMetadata:
    """A chunk of a tensor."""

    def __init__(self, offsets: torch.Size, sizes: torch.Size) -> None:
        self.offsets, self.sizes = offsets, sizes


class BytesStorageMetadata:
    """An object that is no tensor."""


class Metadata:
    """All of it; `mcore_data` where Megatron has it."""

    mcore_data: dict[str, Any]

    def __init__(self, state_dict_metadata: dict[str, Any], storage_data: Any) -> None:
        self.state_dict_metadata = state_dict_metadata
        self.planner_data: Any = None
        self.storage_data = storage_data
        self.storage_meta = self.version = None


class MetadataIndex:
    """Says which chunk, or object, is meant; without `offset` it is an object."""

    def __init__(self, fqn: str, offset: torch.Size | None = None) -> None:
        self.fqn, self.index = fqn, None
        if offset is not None:
            self.offset = offset


class _StorageInfo:
    def __init__(self, relative_path: str, offset: int, length: int) -> None:
        self.relative_path, self.offset, self.length = relative_path, offset, length


def pickled(value: Any) -> bytes:
    """The opcodes of protocol 3 that make a value, and remember nothing of it; not its beginning.

    >>> b"ctorch.distributed.checkpoint.metadata\\nMetadata\\n" in pickled(Metadata({}, None))
    True
    """
    stream = io.BytesIO()
    pickler = pickle.Pickler(stream, protocol=3)  # one without frames, where names are as long
    pickler.fast = True
    pickler.dump(value)
    return _NAMED.sub(_said, stream.getvalue()[2:-1])


def _said(found: re.Match[bytes]) -> bytes:
    module = "filesystem" if found[1] == b"_StorageInfo" else "metadata"
    return b"c%s.%s\n%s\n" % (_DCP.encode(), module.encode(), found[1])
