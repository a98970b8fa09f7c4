"""Make a staged output whole: what surrounds the payloads, the small files, and every checksum."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isal import isal_zlib

from pma_megatron.base.durable import sync
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import Files, write_inside
from pma_megatron.formats.manifest import TENSORS, FileSum, Part, sum_of, sum_of_parts, write_marker
from pma_megatron.formats.output import OutputItem, OutputLayout
from pma_megatron.merging.leftovers import Target
from pma_megatron.merging.publish import writing
from pma_megatron.transfer.checksums import (
    Checksums,
    ScatteredChecksums,
    crc_of,
    joined_crc,
    scattered_crc,
)


@dataclass(frozen=True, slots=True)
class Structured:
    """A folder whose shards are whole.

    Attributes:
        sums: of every file in it.
        payloads: CRC-32 of every payload that was written, by its name.
    """

    sums: Mapping[str, FileSum]
    payloads: Mapping[str, int]


def structure(layout: OutputLayout, target: Target, written: Sequence[Checksums]) -> Structured:
    """Write what surrounds the payloads (rank 0 only).

    Args:
        layout: of the folder.
        target: the folder.
        written: per rank, the checksums of what it wrote into it.

    Raises:
        PublishError: bytes of a payload are unaccounted for, or the folder cannot be written.
    """
    with writing(target):
        return Structured(*_write_structure(layout, target, written))


def finish(
    layout: OutputLayout,
    target: Target,
    made: Structured,
    provenance: Mapping[str, Any],
    further: Mapping[str, bytes],
    sha256_of: Mapping[str, str],
) -> None:
    """Write the small files, the marker last (rank 0 only).

    Args:
        layout: of the folder.
        target: the folder.
        made: what is in it, files that were carried too.
        provenance: what `pma.json` says beside the checksums of all files.
        further: small files that are this output's own.
        sha256_of: file -> SHA-256 of those that `layout.digests` lists, small ones aside.

    Raises:
        PublishError: the folder cannot be written.
    """
    with writing(target):
        sums, payloads = dict(made.sums), made.payloads
        small = {**layout.small_files, **further}
        sums.update({name: sum_of(data) for name, data in small.items()})
        if layout.digests is not None:
            listed = {n: s.sha256 for n, s in sums.items() if s.sha256 and layout.digests.lists(n)}
            name, content = layout.digests.made({**listed, **sha256_of})
            small[name], sums[name] = content, sum_of(content)
        last = layout.last_file
        marker = small.pop(last) if last is not None else b""
        for name, data in small.items():
            write_inside(target.staging, name, data)
        if layout.sums_payloads:
            provenance = {**provenance, TENSORS: {n: f"{crc:08x}" for n, crc in payloads.items()}}
        write_marker(target.staging, provenance, sums)
        point("marker", 0)
        if last is not None:
            write_inside(target.staging, last, marker)
        for name in layout.files:
            sync(target.staging / name)
        for folder in sorted({(target.staging / name).parent for name in sums}):
            sync(folder)
        sync(target.staging)


def _write_structure(
    layout: OutputLayout, target: Target, written: Sequence[Checksums]
) -> tuple[dict[str, FileSum], dict[str, int]]:
    """Write what files have around their payloads; returns the sum of every file, and the CRC-32 of
    every payload that was written, by its name."""
    parts = _merged(each.parts for each in written)
    scattered: dict[tuple[int, str], list[tuple[int, int]]] = {}
    is_scattered = any(isinstance(each, ScatteredChecksums) for each in written)
    for each in written:
        if isinstance(each, ScatteredChecksums):
            for place, sum_ in each.sums.items():
                scattered.setdefault(place, []).append(sum_)
    found: dict[str, list[Part]] = _merged(each.copies for each in written)
    payloads: dict[str, int] = {}
    files = Files(target.staging, os.O_RDWR)
    try:
        for number, item in enumerate(layout.items):
            ours = found.setdefault(item.placed.file, [])
            if item.literal is not None:
                crc = isal_zlib.crc32(item.literal)
                ours.append((item.placed.offset, len(item.literal), crc))
            if item.skeleton is None:
                continue
            with files.opened(item.placed.file) as descriptor:
                if is_scattered:
                    crcs = {
                        record: scattered_crc(scattered.get((number, record), ()), nbytes)
                        for record, (_, nbytes) in item.skeleton.payloads.items()
                    }
                else:
                    crcs = _payloads(item, number, parts, descriptor)
                payloads.update(crcs)
                for record, crc in crcs.items():
                    start, nbytes = item.skeleton.payloads[record]
                    if record not in item.kept:  # those are among the copies
                        ours.append((item.placed.offset + start, nbytes, crc))
                for offset, data in item.skeleton.structure(crcs):
                    at = item.placed.offset + offset
                    os.pwrite(descriptor, data, at)
                    ours.append((at, len(data), isal_zlib.crc32(data)))
    finally:
        files.close()
    sums = {
        name: sum_of_parts(found.get(name, ()), nbytes) for name, nbytes in layout.files.items()
    }
    return sums, payloads


def _payloads(
    item: OutputItem, number: int, parts: Mapping[tuple[int, str], Sequence[Part]], descriptor: int
) -> dict[str, int]:
    """CRC-32 of every payload of an item that is laid out afresh, in the open file."""
    assert item.skeleton is not None
    crcs = {record: crc for record, (_, crc) in item.kept.items() if crc is not None}
    for record, (start, nbytes) in item.skeleton.payloads.items():
        if record in item.kept and record not in crcs:  # saved without checksums
            crcs[record] = crc_of(descriptor, item.placed.offset + start, nbytes)
        elif record not in crcs:
            crcs[record] = joined_crc(parts.get((number, record), []), nbytes)
    return crcs


def _merged(each: Iterable[Mapping[Any, Sequence[Part]]]) -> dict[Any, list[Part]]:
    found: dict[Any, list[Part]] = {}
    for ranges in each:
        for where, part in ranges.items():
            found.setdefault(where, []).extend(part)
    return found
