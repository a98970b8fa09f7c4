"""One progress display, on rank 0: bytes, rate and time left; plain lines where no terminal is."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from pma_megatron.base.comm import Comm
from pma_megatron.base.log import visible, written_above
from pma_megatron.base.steps import Tell
from pma_megatron.merging import engine
from pma_megatron.merging.job import Show, silent

_LINE_EVERY_S = 10.0
_log = logging.getLogger(__name__)


def show(comm: Comm) -> Show:
    """A display for this rank: silent on all but rank 0."""
    if not comm.is_main:
        return silent
    return _bar if sys.stderr.isatty() else _lines


@contextlib.contextmanager
def _bar(stage: str, total_bytes: int) -> Iterator[engine.Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as display, written_above():
        task = display.add_task(stage, total=total_bytes)
        yield lambda nbytes: display.advance(task, nbytes)


@contextlib.contextmanager
def _lines(stage: str, total_bytes: int) -> Iterator[engine.Progress]:
    start_s = last_s = time.monotonic()
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done, last_s
        done += nbytes
        now_s = time.monotonic()
        if done and now_s > start_s and now_s - last_s >= _LINE_EVERY_S:
            last_s = now_s
            rate = done / (now_s - start_s)
            left_s = (total_bytes - done) / rate
            _log.info(
                "%s: %.1f of %.1f GiB, %.2f GiB/s, %.0f s left",
                stage,
                done / 2**30,
                total_bytes / 2**30,
                rate / 2**30,
                left_s,
            )

    yield advance


@contextlib.contextmanager
def stages(stage: str) -> Iterator[Tell]:
    """A display of a stage that counts no bytes: what it is at, and for how long."""
    start_s = last_s = time.monotonic()

    def line(what: str) -> None:
        nonlocal last_s
        now_s = time.monotonic()
        if now_s - last_s >= _LINE_EVERY_S:
            last_s = now_s
            _log.info("%s: %s, after %.0f s", stage, what, now_s - start_s)

    if not sys.stderr.isatty():
        yield line
        return
    columns = (
        SpinnerColumn("line"),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as display, written_above():
        task = display.add_task(stage, total=None)
        yield lambda what: display.update(
            task, description=visible(f"{stage}: {what}"), refresh=True
        )
