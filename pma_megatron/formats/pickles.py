"""Read and write the pickles inside checkpoints without ever running what they name.

A checkpoint's pickle may name any callable, so nothing outside a short allowlist of plain
containers is resolved. Two ways to treat the rest:

* `load_strict` refuses it (a `.metadata` file has a closed set of classes);
* `load_inert` turns it into an `Inert` placeholder that remembers how it was built and is written
  back as it was (a Megatron `args` namespace may hold enums of any library). Tensors become
  `TensorRef`: where their bytes lie, never the bytes.
"""

from __future__ import annotations

import copyreg
import functools
import importlib
import io
import pickle
from collections import OrderedDict
from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from enum import Enum, EnumMeta
from typing import Any

import torch

from pma_megatron.errors import CheckpointError

_PLAIN = {
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("collections", "deque"),
    ("builtins", "set"),
    ("builtins", "frozenset"),
    ("builtins", "dict"),
    ("builtins", "list"),
    ("builtins", "tuple"),
    ("builtins", "int"),
    ("builtins", "float"),
    ("builtins", "bool"),
    ("builtins", "str"),
    ("builtins", "complex"),
    ("builtins", "bytearray"),
    ("builtins", "slice"),
    ("builtins", "range"),
    ("argparse", "Namespace"),
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
}
_GETATTR = {("builtins", "getattr"), ("__builtin__", "getattr")}
"""How Python 3.11.0 to 3.11.3 pickle a member of an enum: `getattr(class, name)`."""
_OTHER_NAMES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
"""Modules as protocol 2 and Python 3.13 call them."""


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A tensor storage inside a `.pt` zip: record `data/<key>`, `numel` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int
    location: str
    type_name: str


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A tensor inside a `.pt` zip; `offset` and `stride` count elements of its storage.

    `outer` holds the type and the attributes of a tensor that has some (ZeRO-3 masters do).
    """

    storage: StorageRef
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    rest: tuple[Any, ...] = ()
    outer: tuple[Any, Any] | None = None

    def is_contiguous(self) -> bool:
        """True if the elements lie in row-major order without gaps."""
        expected = 1
        for size, stride in zip(reversed(self.size), reversed(self.stride), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True


class InertType(type):
    """The class of placeholders for names that were not resolved."""

    def __repr__(cls) -> str:
        return f"<{cls.__module__}.{cls.__qualname__}>"


class Inert(metaclass=InertType):
    """What an unresolved callable returned: its arguments and state, and no behaviour."""

    pma_args: tuple[Any, ...]
    pma_kwargs: dict[str, Any]
    pma_called: bool
    pma_state: Any
    pma_items: list[Any]
    pma_pairs: list[tuple[Any, Any]]

    def __new__(cls, *args: Any, **kwargs: Any) -> Inert:
        self = super().__new__(cls)
        self.pma_args, self.pma_kwargs = args, kwargs
        self.pma_called, self.pma_state = False, None
        self.pma_items, self.pma_pairs = [], []
        return self

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.pma_called = True

    def __setstate__(self, state: Any) -> None:
        self.pma_state = state

    def append(self, item: Any) -> None:
        self.pma_items.append(item)

    def extend(self, items: list[Any]) -> None:
        self.pma_items.extend(items)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.pma_pairs.append((key, value))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        cls = type(self)
        build: tuple[Any, ...] = (cls, self.pma_args)
        if not self.pma_called:
            build = (copyreg.__newobj__, (cls, *self.pma_args))  # type: ignore[attr-defined]
        items = iter(self.pma_items) if self.pma_items else None
        pairs = iter(self.pma_pairs) if self.pma_pairs else None
        return (*build, self.pma_state, items, pairs)

    def __repr__(self) -> str:
        return f"{type(self)!r}{self.pma_args!r}"


def load_strict(
    data: bytes,
    *,
    allowed: Set[tuple[str, str]],
    stand_ins: Mapping[tuple[str, str], type],
    what: str,
) -> Any:
    """Unpickle `data`, resolving only plain containers, torch dtypes, and `allowed` names; of
    classes among them that are enums, members too.

    Args:
        data: the pickle.
        allowed: further `(module, name)` pairs that may be imported and called.
        stand_ins: classes used in place of ones whose library need not be installed.
        what: the file, for messages.

    Raises:
        CheckpointError: the pickle is damaged or names anything else.
    """

    def member(kind: Any, name: Any) -> Enum:
        if not isinstance(kind, EnumMeta) or name not in kind.__members__:
            raise _attribute_refused(what, kind, name)
        found: Enum = kind[name]
        return found

    class Strict(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _GETATTR:
                return member
            found = stand_ins.get((module, name)) or _resolve(module, name, allowed)
            if found is None:
                raise CheckpointError(
                    f"{what} names {module}.{name}, which no checkpoint of this format needs: "
                    "refused, nothing was run. Expected only checkpoint metadata classes. If you "
                    "trust the file, re-save the checkpoint with an unmodified trainer."
                )
            return found

    return _unpickle(Strict(io.BytesIO(data)), what)


def load_inert(
    data: bytes,
    *,
    what: str,
    known: Set[tuple[str, str]] | None = None,
) -> Any:
    """Unpickle `data`; names that are not plain become `Inert`, tensors become `TensorRef`.

    Args:
        data: the pickle.
        what: the file, for messages.
        known: the only names that may become `Inert`, beside public attributes of classes among
            them; None for any.

    Raises:
        CheckpointError: the pickle is damaged, or names something that is not `known`.
    """
    placeholders: dict[tuple[str, str], InertType] = {}

    def placeholder(module: str, name: str) -> InertType:
        if (module, name) not in placeholders:
            body = {"__module__": module, "__qualname__": name}
            placeholders[module, name] = InertType(name.rpartition(".")[2], (Inert,), body)
        return placeholders[module, name]

    def member(taken: InertType, kind: Any, name: Any) -> Any:
        if not isinstance(kind, InertType) or not isinstance(name, str) or name.startswith("_"):
            raise _attribute_refused(what, kind, name)
        return taken(kind, name)

    class Lenient(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if (module, name) in _REBUILDERS:
                return _REBUILDERS[module, name]
            if module == "torch" and name.endswith("Storage"):
                return _StorageType(name)
            found = _resolve(module, name, frozenset())
            if found is not None:
                return found
            if known is None or (module, name) in known:
                return placeholder(module, name)
            if (module, name) in _GETATTR:
                return functools.partial(member, placeholder(module, name))
            raise CheckpointError(
                f"{what} names {module}.{name}, which no such file needs: refused, nothing "
                "was run. Exclude this checkpoint; if you trust the file, report the name"
            )

        def persistent_load(self, pid: Any) -> StorageRef:
            kind, storage_type, key, location, numel = pid
            if kind != "storage" or not isinstance(storage_type, _StorageType):
                raise CheckpointError(f"{what} refers to {pid!r}, expected a tensor storage")
            return StorageRef(key, storage_type.dtype, numel, location, storage_type.name)

    return _unpickle(Lenient(io.BytesIO(data)), what)


def dump_inert(value: Any) -> bytes:
    """Pickle what `load_inert` returned (and plain changes to it), names and tensors as before."""
    stream = io.BytesIO()
    _InertPickler(stream, protocol=2).dump(value)
    return stream.getvalue()


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


def new_tensor(size: tuple[int, ...], dtype: torch.dtype, *, key: str = "0") -> TensorRef:
    """A contiguous tensor of shape `size` with a CPU storage of its own."""
    names = [n for n, kept in _STORAGE_DTYPES.items() if kept == dtype]
    if not names:
        raise CheckpointError(f"cannot store a tensor of {dtype}: no storage type for it")
    numel, stride = 1, []
    for extent in reversed(size):
        stride.append(numel)
        numel *= max(extent, 1)
    count = 0 if 0 in size else numel
    return TensorRef(
        StorageRef(key, dtype, count, "cpu", names[0]), 0, size, tuple(reversed(stride))
    )


def _attribute_refused(what: str, kind: Any, name: Any) -> CheckpointError:
    return CheckpointError(
        f"{what} takes the attribute {name!r} of {kind!r}, which no checkpoint of this format "
        "needs: refused, nothing was run. Exclude this checkpoint"
    )


def _unpickle(unpickler: pickle.Unpickler, what: str) -> Any:
    try:
        return unpickler.load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise anything at all
        raise CheckpointError(
            f"{what} cannot be read ({type(error).__name__}: {error}). It is damaged or not a "
            "checkpoint file: exclude this checkpoint or restore the file."
        ) from error


def _resolve(module: str, name: str, allowed: Set[tuple[str, str]]) -> Any:
    module = _OTHER_NAMES.get(module, module)
    if (module, name) in _PLAIN or (module, name) in allowed:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return found
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    return None


_STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _StorageType:
    def __init__(self, name: str) -> None:
        # UntypedStorage holds the newer dtypes (fp8): raw bytes for us, copied as they are.
        self.name, self.dtype = name, _STORAGE_DTYPES.get(name, torch.uint8)


def _rebuild_tensor(storage: StorageRef, offset: int, size: Any, stride: Any, *rest: Any) -> Any:
    return TensorRef(storage, offset, tuple(size), tuple(stride), rest)


def _rebuild_with_attributes(rebuild: Any, kind: Any, args: Any, state: Any) -> Any:
    if rebuild is not _rebuild_tensor:
        raise CheckpointError(f"a tensor is rebuilt by {rebuild!r}, which is not known here")
    return replace(rebuild(*args), outer=(kind, state))


_REBUILDERS = {
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
}


class _Global:
    """A name that the pickler writes without importing it."""

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __call__(self, *args: Any) -> Any:  # the pickler asks only that it be callable
        raise TypeError(f"{self.module}.{self.name} is a name, not a function")


_REBUILD_V2 = _Global("torch._utils", "_rebuild_tensor_v2")
_REBUILD_TYPE = _Global("torch._tensor", "_rebuild_from_type_v2")


class _InertPickler(pickle._Pickler):
    """The pure Python pickler: only it lets a name be written that cannot be imported."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, StorageRef):
            name = _Global("torch", obj.type_name)
            return ("storage", name, obj.key, obj.location, obj.numel)
        return None

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, InertType):
            return f"{obj.__module__}\n{obj.__qualname__}"
        if isinstance(obj, _Global):
            return f"{obj.module}\n{obj.name}"
        if isinstance(obj, TensorRef):
            rest = obj.rest or (False, OrderedDict())
            args = (obj.storage, obj.offset, obj.size, obj.stride, *rest)
            if obj.outer is None:
                return _REBUILD_V2, args
            return _REBUILD_TYPE, (_REBUILD_V2, obj.outer[0], args, obj.outer[1])
        return NotImplemented

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if name is not None and "\n" in name:
            self.write(b"c" + name.encode() + b"\n")  # type: ignore[attr-defined]  # opcode GLOBAL
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]
