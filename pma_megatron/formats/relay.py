"""Lay out a file of many tensors afresh: the same records, some of them with new bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pma_megatron.formats.base import Item, Payload
from pma_megatron.formats.items import ItemFiles
from pma_megatron.formats.output import Destination, OutputItem
from pma_megatron.formats.pickles import TensorRef, add_entry, dump_inert
from pma_megatron.formats.zips import lay_out

NOTE = "pma"
"""What a merge says of itself in the client state that training gets back when it resumes."""


@dataclass(frozen=True, slots=True)
class Relaid:
    """An item laid out afresh, and where its new payloads go."""

    item: OutputItem
    places: Mapping[Payload, Destination]


def relay(
    files: ItemFiles,
    item: Item,
    payloads: Sequence[Payload],
    number: int,
    place: Callable[[int], Item],
    edited: Any = None,
    zero: frozenset[str] = frozenset(),
    note: Any = None,
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
    """
    records = files.records(item)
    names = [name for name in records if name.startswith("data/")]
    content = files.read_record(item, "data.pkl") if edited is None else dump_inert(edited)
    if note is not None:
        content = add_entry(content, NOTE, note)
    literals = {key: bytes(records[f"data/{key}"].nbytes) for key in zero}
    skeleton = lay_out(content, [(n.partition("/")[2], records[n].nbytes) for n in names], literals)
    placed = place(skeleton.length)
    new = {payload.record: payload for payload in payloads}
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
