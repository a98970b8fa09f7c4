"""What a pickle of a checkpoint is decoded to: plain values, and records without behaviour.

No value here is of a class that the pickle names. A record says which name was called or built,
with what, and is written back as it was (`pickle_writer`).
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

from pma_megatron.base.boxes import row_major_strides


@dataclass(frozen=True, slots=True)
class Name:
    """A class or function that a pickle names; it is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    __repr__ = __str__


CALL, NEW = "call", "new"
"""How a record was built: the name was called, or an object made without calling its `__init__`."""


class Record:
    """What a pickle builds of something that it names: every part of it, and no behaviour.

    Attributes:
        name: the class or function; another record where the pickle calls what it has built.
        how: `CALL` or `NEW`.
        args: arguments, in order.
        kwargs: arguments by name.
        state: what was set on the object afterwards; None for nothing.
        items: what was appended to it.
        pairs: what was assigned to keys of it.
    """

    __slots__ = ("args", "how", "items", "kwargs", "name", "pairs", "state")

    def __init__(
        self, name: Name | Record, how: str, args: tuple[Any, ...], kwargs: dict[str, Any] | None
    ) -> None:
        self.name, self.how, self.args, self.kwargs = name, how, args, kwargs
        self.state: Any = None
        self.items: list[Any] | None = None
        self.pairs: list[tuple[Any, Any]] | None = None

    def __repr__(self) -> str:
        return f"an object of {self.name}"


class Ordered(dict[Any, Any]):
    """A `collections.OrderedDict`; `state` holds the attributes that were set on it, or None."""

    __slots__ = ("state",)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.state: dict[str, Any] | None = None


class Defaulting(dict[Any, Any]):
    """A `collections.defaultdict`, which here never makes an entry by itself."""

    __slots__ = ("factory",)

    def __init__(self, factory: tuple[Any, ...]) -> None:
        super().__init__()
        self.factory = factory


class Size(tuple[int, ...]):
    """A `torch.Size`: integers of at least 0."""

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class StorageRef:
    """A tensor storage inside a `.pt` zip: record `data/<key>`, `numel` elements of `dtype`."""

    key: str
    dtype: torch.dtype
    numel: int
    location: str
    type_name: Name


@dataclass(frozen=True, slots=True, repr=False)
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
        places = zip(self.size, self.stride, row_major_strides(self.size), strict=True)
        return all(size == 1 or stride == expected for size, stride, expected in places)

    def __repr__(self) -> str:
        return f"a tensor of shape {tuple(self.size)}, strides {tuple(self.stride)}"


def fields_of(value: Any) -> dict[str, Any] | None:
    """The attributes that were set on a record, whether kept in slots or not; else None."""
    if not isinstance(value, Record):
        return None
    parts = value.state if isinstance(value.state, tuple) else (value.state,)
    if len(parts) > 2 or not all(isinstance(part, dict) or part is None for part in parts):
        return None
    fields = {key: item for part in parts for key, item in (part or {}).items()}
    return fields if all(isinstance(key, str) for key in fields) else None


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: Any) -> str:
    """`value` for a message: never longer than a few words, whatever a file made of it."""
    text = str(value) if isinstance(value, Name) else _BRIEF.repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
