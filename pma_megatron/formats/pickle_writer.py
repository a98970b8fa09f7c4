"""Write what was decoded from a pickle as a pickle again: names, objects and tensors as they were.

Protocol 2, and of it only what `torch.load(weights_only=True)` reads too.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Iterable
from typing import Any

import torch

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.inert import (
    CALL,
    Defaulting,
    Name,
    Ordered,
    Record,
    Size,
    StorageRef,
    TensorRef,
)

_BATCH = 1000
_ORDERED = Name("collections", "OrderedDict")
_DEFAULTING = Name("collections", "defaultdict")
_SIZE = Name("torch", "Size")
_ENCODE = Name("_codecs", "encode")
_BYTEARRAY, _SET, _FROZENSET = (
    Name("__builtin__", name) for name in ("bytearray", "set", "frozenset")
)
_REBUILD = Name("torch._utils", "_rebuild_tensor_v2")
_REBUILD_TYPE = Name("torch._tensor", "_rebuild_from_type_v2")


def dump_inert(value: Any) -> bytes:
    """Pickle what `load_inert` returned (and plain changes to it), names and tensors as before.

    Raises:
        CheckpointError: it holds something else.
    """
    writer = _Writer()
    writer.save(value)
    return b"".join([b"\x80\x02", *writer.parts, pickle.STOP])


def add_entry(data: bytes, key: str, value: Any) -> bytes:
    """The pickle of a dictionary with one entry more; what it said before stays byte for byte.

    Args:
        data: made by `torch.save`, that is without frames (protocol 2); any other stays as it is.
        key: replaces an entry of that name.
        value: plain values alone.
    """
    if data[:2] != b"\x80\x02" or data[-1:] != pickle.STOP:
        return data
    bare = [pickle.dumps(each, protocol=2)[2:-1] for each in (key, value)]
    return b"".join([data[:-1], *bare, pickle.SETITEM, pickle.STOP])


class _Writer:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._memo: dict[Any, int] = {}
        self._kept: list[Any] = []  # so that no id is used twice

    def save(self, value: Any) -> None:
        kind = type(value)
        simple = _SIMPLE.get(kind)
        if simple is not None:
            self.parts.append(simple(value))
            return
        key = value if kind in (str, Name) else ("at", id(value))
        index = self._memo.get(key)
        if index is not None:
            self.parts.append(_indexed(b"h", b"j", index))
            return
        if kind is StorageRef:
            self._storage(value)
        elif kind is tuple and not value:
            self.parts.append(b")")
        else:
            self._kept.append(value)
            self._object(value, kind, key)

    def _object(self, value: Any, kind: type, key: Any) -> None:
        """Objects that a second place may refer to; what may hold itself is noted before."""
        if kind is str:
            data = value.encode()
            self.parts.append(b"X" + struct.pack("<I", len(data)) + data)
        elif kind is Name:
            self.parts.append(f"c{value.module}\n{value.name}\n".encode())
        elif kind is TensorRef:
            self._tensor(value)
        elif isinstance(value, tuple):
            self._tuple(value, kind)
        elif kind is list:
            self.parts.append(b"]")
            self._note(key)
            self._appends(value)
            return
        elif isinstance(value, dict):
            self._dict(value, kind, key)
            return
        elif kind is Record:
            self._record(value, key)
            return
        else:
            self._call(*_as_call(value, kind))
        self._note(key)

    def _note(self, key: Any) -> None:
        index = self._memo[key] = len(self._memo)
        self.parts.append(_indexed(b"q", b"r", index))

    def _call(self, name: Name, *args: Any) -> None:
        self.save(name)
        self._plain_tuple(args)
        self.parts.append(b"R")

    def _plain_tuple(self, args: Iterable[Any]) -> None:
        self.parts.append(b"(")
        for arg in args:
            self.save(arg)
        self.parts.append(b"t")

    def _tuple(self, value: tuple[Any, ...], kind: type) -> None:
        if kind is Size:
            self._call(_SIZE, tuple(value))
        elif kind is tuple:
            self._plain_tuple(value)
        else:
            raise _not_inert(value)

    def _dict(self, value: dict[Any, Any], kind: type, key: Any) -> None:
        state = None
        if kind is dict:
            self.parts.append(b"}")
        elif kind is Ordered:
            state = value.state  # type: ignore[attr-defined]
            self._call(_ORDERED)
        elif kind is Defaulting:
            self._call(_DEFAULTING, *value.factory)  # type: ignore[attr-defined]
        else:
            raise _not_inert(value)
        self._note(key)
        self._setitems(list(value.items()))
        if state is not None:
            self.save(state)
            self.parts.append(b"b")

    def _record(self, value: Record, key: Any) -> None:
        if value.kwargs:
            raise CheckpointError(
                f"{value} is built with arguments by name, which torch.load cannot read: it was "
                "not saved by torch.save as Megatron and DeepSpeed call it"
            )
        self.save(value.name)
        self.save(value.args)
        self.parts.append(b"R" if value.how == CALL else b"\x81")
        self._note(key)
        self._appends(value.items or ())
        self._setitems(value.pairs or ())
        if value.state is not None:
            self.save(value.state)
            self.parts.append(b"b")

    def _appends(self, items: Any) -> None:
        for first in range(0, len(items), _BATCH):
            self.parts.append(b"(")
            for item in items[first : first + _BATCH]:
                self.save(item)
            self.parts.append(b"e")

    def _setitems(self, pairs: Any) -> None:
        for first in range(0, len(pairs), _BATCH):
            self.parts.append(b"(")
            for name, item in pairs[first : first + _BATCH]:
                self.save(name)
                self.save(item)
            self.parts.append(b"u")

    def _tensor(self, ref: TensorRef) -> None:
        rest = ref.rest or (False, Ordered())
        args = (ref.storage, ref.offset, tuple(ref.size), tuple(ref.stride), *rest)
        if ref.outer is None:
            self._call(_REBUILD, *args)
        else:
            self._call(_REBUILD_TYPE, _REBUILD, ref.outer[0], args, ref.outer[1])

    def _storage(self, ref: StorageRef) -> None:
        self._plain_tuple(("storage", ref.type_name, ref.key, ref.location, ref.numel))
        self.parts.append(b"Q")


def _as_call(value: Any, kind: type) -> tuple[Any, ...]:
    """What protocol 2 has no opcode for, as Python writes it."""
    if kind is bytes:
        return _ENCODE, value.decode("latin-1"), "latin1"
    if kind is bytearray:
        return _BYTEARRAY, bytes(value).decode("latin-1"), "latin-1"
    if kind in (set, frozenset):
        return _SET if kind is set else _FROZENSET, list(value)
    raise _not_inert(value)


def _not_inert(value: Any) -> CheckpointError:
    return CheckpointError(f"cannot write a {type(value).__name__} into a checkpoint's pickle")


def _indexed(short: bytes, long: bytes, index: int) -> bytes:
    return short + bytes([index]) if index < 256 else long + struct.pack("<I", index)


def _int(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K" + bytes([value])
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


_SIMPLE: dict[type, Callable[[Any], bytes]] = {
    type(None): lambda value: b"N",
    bool: lambda value: b"\x88" if value else b"\x89",
    int: _int,
    float: lambda value: b"G" + struct.pack(">d", value),
    torch.dtype: lambda value: f"ctorch\n{str(value).removeprefix('torch.')}\n".encode(),
}
