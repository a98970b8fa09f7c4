"""Make an output whole once its shards are: the small files, and the checksum of every file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pma_megatron.base.durable import sync
from pma_megatron.base.faults import point
from pma_megatron.base.openfiles import write_inside
from pma_megatron.formats.manifest import TENSORS, sum_of, write_marker
from pma_megatron.formats.output import OutputLayout
from pma_megatron.merging.leftovers import Target
from pma_megatron.merging.publish import writing
from pma_megatron.merging.structure import Structured


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
        for folder in sorted({(target.staging / name).parent for name in sums}):
            sync(folder)
        sync(target.staging)
