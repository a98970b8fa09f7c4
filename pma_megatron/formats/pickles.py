"""Read and write the pickles inside checkpoints without ever running what they name.

A checkpoint's pickle may name any callable. Here nothing that it names is looked up, by whatever
name: `load_inert` decodes it into plain values, tensors as `TensorRef` (where their bytes lie,
never the bytes), and a `Record` for everything else, which is written back as it was (a Megatron
`args` namespace may hold enums of any library).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Set
from dataclasses import replace
from typing import Any

import torch

from pma_megatron.base.boxes import row_major_strides
from pma_megatron.base.memory import collector_at_rest
from pma_megatron.base.openfiles import Content
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.alike import Alike
from pma_megatron.formats.bounds import PickleError, check_bounded
from pma_megatron.formats.inert import (
    Defaulting,
    Name,
    Ordered,
    Record,
    Size,
    StorageRef,
    TensorRef,
    brief,
    fields_of,
)
from pma_megatron.formats.opcodes import NOT_PLAIN, Machine
from pma_megatron.formats.pickle_writer import add_entry, dump_inert
from pma_megatron.formats.schema import is_count, is_shape

__all__ = [
    "Name",
    "Record",
    "StorageRef",
    "TensorRef",
    "add_entry",
    "brief",
    "dump_inert",
    "fields_of",
    "load_inert",
    "new_tensor",
]

_HARMLESS = {
    "argparse": {"Namespace"},
    "builtins": {
        "bool",
        "bytearray",
        "complex",
        "dict",
        "float",
        "frozenset",
        "int",
        "list",
        "range",
        "set",
        "slice",
        "str",
        "tuple",
    },
    "collections": {"OrderedDict", "defaultdict", "deque"},
    "torch": {"Size"},
    "torch._tensor": {"_rebuild_from_type_v2"},
    "torch._utils": {"_rebuild_tensor", "_rebuild_tensor_v2"},
    "types": {"SimpleNamespace"},
}
"""Names that any file may hold."""
_OTHER_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg", "pathlib._local": "pathlib"}
"""Modules as protocol 2 and Python 3.13 call them."""
_GETATTR = ("builtins", "getattr")
"""How Python 3.11.0 to 3.11.3 pickle a member of an enum: `getattr(class, name)`."""
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
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


def load_inert(
    data: Content,
    *,
    what: str,
    known: Set[tuple[str, str]] | None = None,
    walked: bool = True,
    sizes: Mapping[str, int] | None = None,
    alike: Alike | None = None,
) -> Any:
    """Decode a pickle: plain values, a `Record` of what it names otherwise, tensors `TensorRef`.

    Args:
        data: the pickle.
        what: the file, for messages.
        known: the only names that it may hold beside plain containers and tensors, and public
            attributes of classes among them; None for any.
        sizes: record of the zip that the pickle is of -> its bytes; a tensor's storage must lie in
            one of them. None where nothing is known of it.
        walked: refuse also what no recursive walk would finish: cycles, deep nesting, and a few
            objects that are held very many times over. False for a caller that never walks.
        alike: elements of lists and dictionaries that are taken as `Rows`, for a caller that knows
            them.

    Raises:
        CheckpointError: the pickle is damaged, asks for more memory than a checkpoint of its length
            would, or names something that is not `known`.
    """
    machine = Machine(
        data,
        named=functools.partial(_named, what, known),
        convert=functools.partial(_plain, what, known),
        persistent=functools.partial(_storage, sizes),
        alike=alike,
    )
    try:
        with collector_at_rest():
            value = machine.run()
        if walked:
            check_bounded(value, len(data))
    except PickleError as error:
        raise CheckpointError(
            f"{what} cannot be read: {error}. It is damaged or not a checkpoint file: exclude this "
            "checkpoint or restore the file"
        ) from error
    return value


def new_tensor(size: tuple[int, ...], dtype: torch.dtype, *, key: str = "0") -> TensorRef:
    """A contiguous tensor of shape `size` with a CPU storage of its own."""
    names = [n for n, kept in _STORAGE_DTYPES.items() if kept == dtype]
    if not names:
        raise CheckpointError(f"cannot store a tensor of {dtype}: no storage type for it")
    storage = StorageRef(key, dtype, math.prod(size), "cpu", Name("torch", names[0]))
    stride = row_major_strides([max(extent, 1) for extent in size])  # of an empty tensor too
    return TensorRef(storage, 0, size, stride)


def _named(what: str, known: Set[tuple[str, str]] | None, module: str, name: str) -> Any:
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    plain = _OTHER_MODULES.get(module, module)
    if known is not None and not (
        (plain, name) in known
        or name in _HARMLESS.get(plain, ())
        or (plain, name) == _GETATTR
        or _is_storage(module, name)
    ):
        raise CheckpointError(
            f"{what} names {module}.{name}, which no such file needs: refused, nothing was run. "
            "Exclude this checkpoint; if you trust the file, report the name, or re-save the "
            "checkpoint with an unmodified trainer"
        )
    return Name(module, name)


def _plain(what: str, known: Set[tuple[str, str]] | None, name: Name, args: tuple[Any, ...]) -> Any:
    """The plain value that a call stands for; a record for what is called otherwise."""
    if name.module == "torch" and name.name == "Size":  # half of all calls in a `.metadata`
        return _size(args)
    module = _OTHER_MODULES.get(name.module, name.module)
    if (module, name.name) == _GETATTR and known is not None:
        of_class = len(args) == 2 and type(args[0]) is Name and type(args[1]) is str
        if not of_class or args[1].startswith("_") or (args[0].module, args[0].name) not in known:
            raise CheckpointError(
                f"{what} takes the attribute {brief(args[-1:])} of {brief(args[:1])}, which no "
                "such file needs: refused, nothing was run. Exclude this checkpoint"
            )
    convert = _CONVERTERS.get((module, name.name))
    return NOT_PLAIN if convert is None else convert(args)


def _ordered(args: tuple[Any, ...]) -> Any:
    return Ordered() if args == () else NOT_PLAIN


def _defaulting(args: tuple[Any, ...]) -> Any:
    return Defaulting(args) if len(args) <= 1 else NOT_PLAIN


def _size(args: tuple[Any, ...]) -> Any:
    if len(args) == 1 and type(args[0]) is tuple and is_shape(args[0]):
        return Size(args[0])
    return NOT_PLAIN


def _is_storage(module: str, name: str) -> bool:
    return module in ("torch", "torch.storage") and name.endswith("Storage")


def _storage(sizes: Mapping[str, int] | None, pid: Any) -> StorageRef:
    if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
        _, kind, key, location, numel = pid
        named = type(kind) is Name and _is_storage(kind.module, kind.name)
        keyed = type(key) is str and key.isascii() and key.isdecimal() and len(key) < 20
        if named and keyed and type(location) is str and is_count(numel):
            # UntypedStorage holds the newer dtypes (fp8): raw bytes for us, copied as they are.
            dtype = _STORAGE_DTYPES.get(kind.name, torch.uint8)
            there = numel * dtype.itemsize if sizes is None else sizes.get(f"data/{key}", 0)
            if numel * dtype.itemsize > there:
                raise PickleError(
                    f"a tensor needs {numel} elements of {dtype}, data/{key} has {there} bytes"
                )
            return StorageRef(key, dtype, numel, location, kind)
    raise PickleError(f"it refers to {brief(pid)}, expected a tensor's storage")


def _tensor(args: tuple[Any, ...]) -> TensorRef:
    if len(args) >= 4:
        storage, offset, size, stride, *rest = args
        if type(storage) is StorageRef and is_count(offset) and is_shape(size):
            strides = isinstance(stride, tuple) and len(stride) == len(size)
            if strides and all(map(is_count, stride)):
                last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
                if 0 in size or last < storage.numel:
                    return TensorRef(storage, offset, tuple(size), tuple(stride), tuple(rest))
    raise PickleError(
        f"a tensor is {brief(args)}, expected storage, offset, shape and strides in it"
    )


def _tensor_of_type(args: tuple[Any, ...]) -> TensorRef:
    if len(args) == 4 and type(args[0]) is Name and type(args[2]) is tuple:
        rebuild, kind, inner, state = args
        if (rebuild.module, rebuild.name) in _REBUILDERS:
            return replace(_tensor(inner), outer=(kind, state))
    raise PickleError(f"a tensor is rebuilt by {brief(args)}, which is not known here")


_REBUILDERS = (("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor"))
_CONVERTERS = {
    ("collections", "OrderedDict"): _ordered,
    ("collections", "defaultdict"): _defaulting,
    ("torch", "Size"): _size,
    **dict.fromkeys(_REBUILDERS, _tensor),
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
}
