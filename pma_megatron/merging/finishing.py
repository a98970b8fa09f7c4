"""Make a staged output whole: what surrounds the payloads, the small files, and every checksum."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from isal import isal_zlib

from pma_megatron.base.durable import sync
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import Files, write_inside
from pma_megatron.formats.manifest import FileSum, Part, sum_of, sum_of_parts, write_marker
from pma_megatron.formats.output import OutputItem
from pma_megatron.merging.planning import MergePlan
from pma_megatron.merging.publish import Target, cannot_write
from pma_megatron.transfer.blocks import Checksums, crc_of, joined_crc


def finish(
    plan: MergePlan, target: Target, written: Sequence[Checksums], provenance: Mapping[str, Any]
) -> None:
    """Write what surrounds the payloads, then the small files, the marker last (rank 0 only).

    Args:
        plan: the plan.
        target: the output.
        written: per rank, the checksums of what it wrote into this output.
        provenance: what `pma.json` says beside the checksums of all files.

    Raises:
        PublishError: bytes of a payload are unaccounted for, or the folder cannot be written.
    """
    try:
        sums = _write_structure(plan, target, written)
        small = dict(plan.layout.small_files)
        sums.update({name: sum_of(data) for name, data in small.items()})
        last = plan.layout.last_file
        marker = small.pop(last) if last is not None else b""
        for name, data in small.items():
            write_inside(target.staging, name, data)
        write_marker(target.staging, provenance, sums)
        point("marker", 0)
        if last is not None:
            write_inside(target.staging, last, marker)
        for name in plan.layout.files:
            sync(target.staging / name)
        for folder in sorted({(target.staging / name).parent for name in plan.layout.files}):
            sync(folder)
        sync(target.staging)
    except OSError as error:
        raise cannot_write(target, error) from error


def _write_structure(
    plan: MergePlan, target: Target, written: Sequence[Checksums]
) -> dict[str, FileSum]:
    """Write what the zips have around their payloads; returns the sum of every shard file."""
    parts = _merged(each.parts for each in written)
    found: dict[str, list[Part]] = _merged(each.copies for each in written)
    files = Files(target.staging, os.O_RDWR)
    try:
        for number, item in enumerate(plan.layout.items):
            ours = found.setdefault(item.placed.file, [])
            if item.literal is not None:
                crc = isal_zlib.crc32(item.literal)
                ours.append((item.placed.offset, len(item.literal), crc))
            if item.skeleton is None:
                continue
            with files.opened(item.placed.file) as descriptor:
                crcs = _payloads(item, number, parts, descriptor)
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
    return {
        name: sum_of_parts(found.get(name, ()), nbytes)
        for name, nbytes in plan.layout.files.items()
    }


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
