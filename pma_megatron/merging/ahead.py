"""Units whose bytes are looked for before their turn, so that storage has not to be waited for."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from functools import partial

from pma_megatron.merging.accumulate import Work
from pma_megatron.merging.streaming import Range
from pma_megatron.merging.tasks import Unit
from pma_megatron.storage.spool import active

AHEAD_BYTES = 512 << 20  # asked of storage before its time; more might leave the cache unused
_OF_STORES = 8  # times as many units are looked for where each request takes its time
_TOGETHER = 8  # units that are looked for at once


@dataclass(frozen=True, slots=True)
class Found:
    """A unit whose bytes are found, and on their way."""

    work: Work
    streamed: Sequence[Range]
    is_cold: bool


def found_ahead(
    units: Sequence[Unit], find: Callable[[Unit], Found | None], scouts: Executor, threads: int
) -> Iterator[tuple[Unit, Callable[[], Found | None]]]:
    """The units, each with what waits for what `find` says of it, which `scouts` ask beforehand.

    Where nothing has to be fetched several are looked for at once: threads that wake each other
    less often keep more of what they sum in their caches.
    """
    queue, ahead = iter(units), deque[tuple[list[Unit], Future[list[Found | None]]]]()
    most = threads if active() is None else _OF_STORES * threads
    together, ahead_bytes = 1, 0
    while batch := _batch(queue, together, AHEAD_BYTES // most):
        ahead.append((batch, scouts.submit(lambda some: [*map(find, some)], batch)))
        ahead_bytes += _read_bytes(batch)
        while len(ahead) > most or (len(ahead) > 1 and ahead_bytes > AHEAD_BYTES):
            ahead_bytes -= _read_bytes(ahead[0][0])
            yield from _with_results(*ahead.popleft())
        first = ahead[0][1]
        if first.done() and first.exception() is None:
            is_cold = any(found is not None and found.is_cold for found in first.result())
            together = 1 if is_cold else _TOGETHER
    for each in ahead:
        yield from _with_results(*each)


def _read_bytes(batch: Sequence[Unit]) -> int:
    return sum(unit.read_bytes for unit in batch)


def _batch(queue: Iterator[Unit], most: int, most_bytes: int) -> list[Unit]:
    """The next units: so many, or fewer that read as much; none at the end."""
    batch, read_bytes = [], 0
    for unit in itertools.islice(queue, most):
        batch.append(unit)
        read_bytes += unit.read_bytes
        if read_bytes >= most_bytes:
            break
    return batch


def _with_results(
    units: Sequence[Unit], found: Future[list[Found | None]]
) -> Iterator[tuple[Unit, Callable[[], Found | None]]]:
    for place, unit in enumerate(units):
        yield unit, partial(_nth, found, place)


def _nth(found: Future[list[Found | None]], place: int) -> Found | None:
    return found.result()[place]
