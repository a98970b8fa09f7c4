"""Lay out a file of many tensors afresh: the same records, some of them with new bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.output import Destination, OutputItem
from pma_megatron.formats.pickles import TensorRef, add_entry, dump_inert
from pma_megatron.formats.zips import Skeleton, lay_out

NOTE = "pma"
"""What a merge says of itself in the client state that training gets back when it resumes."""


@dataclass(frozen=True, slots=True)
class Relaid:
    """An item laid out afresh, and where its new payloads go."""

    item: OutputItem
    places: Mapping[Payload, Destination]


@dataclass(slots=True)
class Frames:
    """What files of an output have in common: ranks write zips of one shape, with one pickle."""

    _pickles: dict[tuple[int, int], tuple[Any, Any, bytes]] = field(default_factory=dict)
    _skeletons: dict[tuple[Any, ...], Skeleton] = field(default_factory=dict)

    def pickle(self, content: bytes | None, edited: Any, note: Any) -> bytes:
        """The pickle of a file, which is `edited` unless that is None, with a note in it."""
        key = id(content if edited is None else edited), id(note)
        if key not in self._pickles:
            made = dump_inert(edited) if content is None else content
            if note is not None:
                made = add_entry(made, NOTE, note)
            # What the key is of is kept, so that nothing else gets its id.
            self._pickles[key] = (content if edited is None else edited), note, made
        return self._pickles[key][2]

    def skeleton(
        self, content: bytes, payloads: Sequence[tuple[str, int]], literals: Mapping[str, bytes]
    ) -> Skeleton:
        """See `zips.lay_out`."""
        key = content, tuple(payloads), tuple(literals.items())
        found = self._skeletons.get(key)
        if found is None:
            found = self._skeletons[key] = lay_out(content, payloads, literals)
        return found


def relay(
    files: ItemFiles,
    item: Item,
    payloads: Sequence[Payload],
    number: int,
    place: Callable[[int], Item],
    edited: Any = None,
    zero: frozenset[str] = frozenset(),
    note: Any = None,
    frames: Frames | None = None,
) -> Relaid:
    """Lay out `item` with new bytes for `payloads`, which keep their dtypes.

    Args:
        files: the base checkpoint.
        item: one that holds many storages.
        payloads: those of its storages that get new bytes.
        number: of the item in the output.
        place: bytes of the new item -> where it goes.
        edited: what its pickle says now (`load_inert`, changed); None where it stays.
        zero: keys of storages that become zero, small ones.
        note: plain values that its dictionary gets under `NOTE`; None for none.
        frames: shared by the files of an output.
    """
    frames = Frames() if frames is None else frames
    said = files.read_record(item, "data.pkl") if edited is None else None
    records = files.records(item)
    content = frames.pickle(said, edited, note)
    new = {payload.record: payload for payload in payloads}
    sizes = [(n.partition("/")[2], r.nbytes) for n, r in records.items() if n.startswith("data/")]
    literals = {key: bytes(records[f"data/{key}"].nbytes) for key in sorted(zero)}
    # Under ZeRO-3 there is an empty storage for every parameter in every file.
    literals |= {key: b"" for key, nbytes in sizes if not nbytes and f"data/{key}" not in new}
    skeleton = frames.skeleton(content, sizes, literals)
    placed = place(skeleton.length)
    kept = {
        name: (item.offset + records[name].start, records[name].crc32)
        for name in skeleton.payloads
        if name not in new
    }
    places = {}
    for name, payload in new.items():
        assert name is not None
        start = placed.offset + skeleton.payloads[name][0]
        places[payload] = Destination(
            placed.file, start, payload.dtype, payload.numel, name, number
        )
    return Relaid(OutputItem(placed, skeleton, item, kept), places)


def reset_steps(value: Any) -> set[str]:
    """Set every step counter in `value` to zero; returns the storages of those that are tensors."""
    zero: set[str] = set()
    if isinstance(value, dict):
        for name, inner in value.items():
            if name in ("step", "common_step"):
                if isinstance(inner, TensorRef):
                    zero.add(inner.storage.key)
                elif isinstance(inner, (int, float)):
                    value[name] = type(inner)(0)
            else:
                zero |= reset_steps(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            zero |= reset_steps(inner)
    return zero
