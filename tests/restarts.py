"""Merges that are cut off at a share of their work, and what must come of them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import digests, folder_of, request_for
from pma_megatron import MergeReport, MergeRequest, SelectionRequest, merge, verify
from pma_megatron.merging.job import Show

TRACKER = "latest_checkpointed_iteration.txt"
STOP_AFTER = 0.5


def stopped_at(share: float, how: Callable[[], None]) -> Show:
    """A display that ends the job when it has seen that share of the work."""

    @contextlib.contextmanager
    def show(stage: str, total_bytes: int) -> Iterator[Callable[[int], None]]:
        seen, lock = 0, threading.Lock()

        def progress(nbytes: int) -> None:
            nonlocal seen
            with lock:
                seen += nbytes
                enough = seen >= share * total_bytes
            if enough:
                how()

        yield progress

    return show


def interrupt() -> None:
    raise KeyboardInterrupt


def cut_off(request: MergeRequest, share: float = STOP_AFTER) -> None:
    with pytest.raises(KeyboardInterrupt):
        merge(request, show=stopped_at(share, interrupt))


def of_three(run: Path, save: Path, **settings: object) -> MergeRequest:
    return request_for(run, save, selection=SelectionRequest(last=3), **settings)


def contents(folder: Path) -> dict[str, str]:
    """All files but the one that has times, and its own checksum."""
    return {n: s for n, s in digests(folder).items() if "pma.json" not in n}


def names(save: Path) -> list[str]:
    return sorted(path.name for path in save.iterdir())


def check(save: Path, whole: tuple[Path, MergeReport], report: MergeReport) -> None:
    """The result is that of one go, and nothing else is left."""
    assert contents(save) == contents(whole[0])
    assert names(save) == ["iter_0000008", TRACKER]
    verify(folder_of(save, 8))
    assert report.bytes["read"] <= whole[1].bytes["read"]
