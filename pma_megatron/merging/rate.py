"""How fast sources are read here, from a short try."""

from __future__ import annotations

import contextlib
import time

from pma_megatron.base.openfiles import SourceStream
from pma_megatron.formats.source import Source
from pma_megatron.merging.tasks import Workload
from pma_megatron.storage.paths import path_of
from pma_megatron.storage.spool import ahead


def read_rate(plan: Workload, *, limit_bytes: int = 64 << 20, limit_s: float = 1.0) -> float:
    """Bytes per second at which the newest source's payloads are read here, from a short try.

    0 where none of them can be read here: its speed is told, and never why a plan fails.
    """
    folder, buffer = path_of(plan.sources[-1].path), bytearray(1 << 20)
    done, start_s = 0, time.perf_counter()
    for name in _payload_files(plan.sources[-1]):
        with contextlib.suppress(OSError), SourceStream(folder / name) as stream:
            ahead(stream.fileno(), 0, limit_bytes - done)
            while done < limit_bytes and (count := stream.readinto(buffer)):
                done += count
                if time.perf_counter() - start_s > limit_s:
                    break
        if done >= limit_bytes or time.perf_counter() - start_s > limit_s:
            break
    return done / max(time.perf_counter() - start_s, 1e-6)


def _payload_files(source: Source) -> list[str]:
    """Files that hold tensors of a source, the largest first."""
    groups = (source.space.weights, source.frozen, *source.space.states.values())
    pieces = (piece for group in groups for tensor in group.values() for piece in tensor.pieces)
    names = {piece.payload.item.file for piece in pieces}
    return sorted(names, key=lambda name: (-source.stamps.get(name, (0, 0))[0], name))
