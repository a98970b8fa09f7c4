"""Requests to stores, several under way at once: what is waited for goes before what is not yet."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from enum import IntEnum

from pma_megatron.storage.protocol import IN_FLIGHT

Work = Callable[[], None]


class When(IntEnum):
    """When something is needed."""

    NOW = 0
    SOON = 1


class Requests:
    """What is to be asked, in a queue for each `When`. Threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues = {when: OrderedDict[Future[None], Work]() for when in When}
        self._pool: ThreadPoolExecutor | None = None

    def ask(self, work: Work, when: When) -> Future[None]:
        """Have `work` done by another thread."""
        made: Future[None] = Future()
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(IN_FLIGHT, thread_name_prefix="pma-store")
            self._queues[when][made] = work
            self._pool.submit(self._work)
        return made

    def hurry(self, asked: Future[None]) -> None:
        """Somebody waits for it by now."""
        with self._lock:
            work = self._queues[When.SOON].pop(asked, None)
            if work is not None:
                self._queues[When.NOW][asked] = work

    def drop_later(self) -> set[Future[None]]:
        """Forget what nobody waits for, and has not begun; returns that."""
        with self._lock:
            dropped = set(self._queues[When.SOON])
            self._queues[When.SOON].clear()
        return dropped

    def _work(self) -> None:
        """Do what is the most urgent, unless it was dropped meanwhile."""
        with self._lock:
            queue = next(filter(None, self._queues.values()), None)
            if queue is None:
                return
            asked, work = queue.popitem(last=False)
        try:
            work()
        except BaseException as error:
            asked.set_exception(error)
        else:
            asked.set_result(None)

    def close(self) -> None:
        """Wait for what is under way; nothing more is asked."""
        with self._lock:
            for queue in self._queues.values():
                for asked in queue:
                    asked.cancel()
                queue.clear()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
