"""What a format says of a checkpoint that is to be written; the engine knows no more than this."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property
from typing import Any, Protocol

import torch

from pma_megatron.base.boxes import Piece
from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.pieces import payloads_of


class Folder(str, Enum):
    """What one output of a merge may be written as, each in a folder of its own.

    The value is the setting that says where it goes.
    """

    CHECKPOINT = "save"
    MODEL = "export"


class Frame(Protocol):
    """Bytes of a file around payloads, a zip's (`zips.Skeleton`) or a header.

    Attributes:
        length: bytes of it all.
        payloads: name -> (start relative to the item, bytes).
    """

    @property
    def length(self) -> int: ...
    @property
    def payloads(self) -> Mapping[str, tuple[int, int]]: ...
    def structure(self, crcs: Mapping[str, int]) -> Sequence[tuple[int, bytes]]:
        """All bytes but the payloads, as (offset, bytes), once the payloads' CRC-32 are known."""


class NewPayloads(Mapping[Payload, torch.dtype]):
    """Base payloads that get new bytes -> their dtype in the output.

    Attributes:
        groups: pieces that lie in such payloads, and the dtype that those get. A format that has
            very many looks at these, and makes no mapping.
    """

    def __init__(self, groups: Sequence[tuple[Sequence[Piece[Payload]], torch.dtype]]) -> None:
        self.groups = tuple(groups)

    @cached_property
    def _each(self) -> dict[Payload, torch.dtype]:
        found: dict[Payload, torch.dtype] = {}
        seen: dict[torch.dtype, set[object]] = {}
        for pieces, dtype in self.groups:
            payloads = payloads_of(pieces, seen.setdefault(dtype, set()))
            found.update(dict.fromkeys(payloads, dtype))
        return found

    def __getitem__(self, payload: Payload) -> torch.dtype:
        return self._each[payload]

    def __iter__(self) -> Iterator[Payload]:
        return iter(self._each)

    def __len__(self) -> int:
        return len(self._each)


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What an output has that its base, the newest source, has not.

    Attributes:
        payloads: base payloads that get new bytes, with their dtype in the output.
        drop: entries left out.
        optimizer: `keep`, `reset` (step counters to zero) or `drop` (no optimizer, no scheduler, as
            Megatron's --no-save-optim writes).
        note: what the merge says of itself, for training that gets such things back on resuming.
        lr_factor: of all learning rates that it stores; None leaves them.
    """

    payloads: NewPayloads
    drop: frozenset[str]
    optimizer: str
    note: Mapping[str, Any] = field(default_factory=dict)
    lr_factor: float | None = None

    @property
    def edits_optimizer(self) -> bool:
        """Whether small values of the optimizer change."""
        return self.optimizer == "reset" or self.lr_factor is not None


@dataclass(frozen=True, slots=True)
class Destination:
    """Where the new bytes of a payload go: byte `start` of `file`, `numel` elements of `dtype`.

    `item` counts in `OutputLayout.items`; `record` is the payload's name in that item's frame.
    `folder` says in which folder of the output `file` lies.
    """

    file: str
    start: int
    dtype: torch.dtype
    numel: int
    record: str
    item: int
    folder: Folder = Folder.CHECKPOINT


@dataclass(frozen=True, slots=True)
class OutputItem:
    """One part of an output file.

    Exactly one of three: something to be built around payloads (`skeleton`), the bytes of `source`
    as they are (`skeleton` and `literal` None), or `literal` bytes. `kept` names records of a built
    zip that come from the base unchanged: record -> (offset in the base's file, CRC-32 or None).
    """

    placed: Item
    skeleton: Frame | None
    source: Item | None
    kept: Mapping[str, tuple[int, int | None]]
    literal: bytes | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Described:
    """What the card of a model says beside where it comes from.

    Attributes:
        config: its `config.json`; None where it has none.
        dtype: of its weights, as torch calls it, without `torch.`.
        parameters: elements of all floating tensors.
    """

    config: Mapping[str, Any] | None
    dtype: str
    parameters: int


@dataclass(frozen=True, slots=True)
class Carried:
    """A file that an output gets as it is: where its bytes are, and how many."""

    path: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Digests:
    """A small file that lists the SHA-256 of others, which a trainer compares before it loads.

    Attributes:
        file: its name.
        covers: whether it lists a file, by its name.
        content: (file -> SHA-256 in hexadecimal digits) -> what it says. Both are functions of a
            module, for a layout is sent to other ranks.
        folder: in which it lies, "" or with a `/` at its end; names of files are below that.
    """

    file: str
    covers: Callable[[str], bool]
    content: Callable[[Mapping[str, str]], bytes]
    folder: str = ""

    def lists(self, name: str) -> bool:
        """Whether it lists a file of the output."""
        below = name.removeprefix(self.folder)
        return name.startswith(self.folder) and below != self.file and self.covers(below)

    def made(self, sha256_of: Mapping[str, str]) -> tuple[str, bytes]:
        """Its name in the output, and what it says of the files of the output that it lists."""
        below = {name.removeprefix(self.folder): each for name, each in sha256_of.items()}
        return self.folder + self.file, self.content(below)


class Placing(Protocol):
    """Base payload -> where its new bytes go; a dictionary, or `placed.Places`."""

    def __getitem__(self, payload: Payload, /) -> Destination: ...


@dataclass(frozen=True, slots=True)
class OutputLayout:
    """Files of an output.

    Attributes:
        files: shard file -> bytes.
        items: every item, by file and offset: a tuple, or `placed.PlacedItems`.
        places: base payload -> where its new bytes go.
        small_files: files written whole, in this order, `last_file` being the marker that makes the
            folder a checkpoint. Only the rank that writes them has them.
        last_file: name of that marker; None where all files together make it one.
        keeps_gaps: elements of a written payload that no tensor covers stay the base's; else zero.
        sums_payloads: the files have no checksums of their payloads, so `pma.json` has them.
        carried: files that are copied as they are, by their names in the output.
        digests: a file of checksums that is made once the others are there; None for none.
        checkpoint: the folder in it that a format reads as a checkpoint; "" for itself.
        described: what its model card says; None for what has no such card.
        notes: sentences for the user: what is carried, and what is not.
        absent_bytes: of small files that this rank has not.
        base_shards: the base's files of items, all of them; empty where the format does not say.
    """

    files: Mapping[str, int]
    items: Sequence[OutputItem]
    places: Placing
    small_files: OrderedDict[str, bytes]
    last_file: str | None
    keeps_gaps: bool = False
    sums_payloads: bool = False
    carried: Mapping[str, Carried] = field(default_factory=dict)
    digests: Digests | None = None
    checkpoint: str = ""
    described: Described | None = None
    notes: tuple[str, ...] = ()
    absent_bytes: int = 0
    base_shards: frozenset[str] = frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole output."""
        carried = sum(each.nbytes for each in self.carried.values())
        return sum(self.files.values()) + self._small_bytes + carried

    @property
    def _small_bytes(self) -> int:
        return sum(map(len, self.small_files.values())) + self.absent_bytes

    def without_small_files(self) -> OutputLayout:
        """The same for a rank that does not write them."""
        return replace(self, small_files=OrderedDict(), absent_bytes=self._small_bytes)
