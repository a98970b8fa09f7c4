"""Threads that take work from one list."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TypeVar

from pma_megatron.errors import RankError

S = TypeVar("S")
U = TypeVar("U")


def over_threads(
    units: Iterable[U], threads: int, do: Callable[[U, S], None], space: Callable[[], S]
) -> None:
    """Threads take units from one list until it is empty or something fails.

    Args:
        units: the work.
        threads: how many.
        do: one unit, with the buffers of its thread.
        space: makes them.
    """
    queue, lock, stop = iter(units), threading.Lock(), threading.Event()

    def work() -> None:
        own = space()
        while not stop.is_set():
            with lock:
                unit = next(queue, None)
            if unit is None:
                return
            try:
                do(unit, own)
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(threads) as pool:
        futures: list[Future[None]] = []
        try:
            futures += (pool.submit(work) for _ in range(threads))
            wait(futures)
        except BaseException:  # a signal; what the threads use must outlast them
            stop.set()
            raise
    _raise_first(futures)


def _raise_first(futures: Sequence[Future[None]]) -> None:
    errors = [e for e in (future.exception() for future in futures) if e is not None]
    for error in itertools.chain((e for e in errors if not isinstance(e, RankError)), errors):
        raise error
