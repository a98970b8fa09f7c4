"""The same work for several folders of a store at once: each would wait for answers in turn."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from pma_megatron.storage.paths import in_store

T = TypeVar("T")
_AT_ONCE = 4
"""Each may hold what a large `.metadata` says."""


def of_each(work: Callable[[Path], T], folders: Iterable[Path]) -> list[T]:
    """What `work` makes of every folder, in their order.

    On a disk one after the other: there it is Python that takes the time.

    >>> of_each(lambda folder: folder.name, [Path("runs/7b"), Path("runs/70b")])
    ['7b', '70b']
    """
    waiting = list(folders)
    if len(waiting) < 2 or not any(map(in_store, waiting)):
        return [work(folder) for folder in waiting]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="pma-look") as pool:
        # In a context of this thread's each: what it keeps of files (`base.once`) is theirs too.
        begun = [pool.submit(contextvars.copy_context().run, work, folder) for folder in waiting]
        try:
            return [each.result() for each in begun]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
