"""Does what is not done yet, over the cores of this machine, and can be stopped at any time."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lab import deadline
from pma_megatron.testing import RankFailure, run_ranks

_TIMEOUT_S = 3600.0
_TOGETHER = 8  # small jobs share a process: importing Megatron takes longer than some of them


class Job(Protocol):
    """Something that leaves a file."""

    @property
    def ranks(self) -> int:
        """Processes that it takes."""

    @property
    def after(self) -> Sequence[Job]:
        """What must be done first."""

    @property
    def own_process(self) -> bool:
        """Whether nothing else may run in its processes."""

    @property
    def is_done(self) -> bool:
        """Whether its file is there."""

    def perform(self, rank: int) -> None:
        """Do it. Every rank makes this call."""


def missing(jobs: Sequence[Job]) -> list[Job]:
    """Jobs that are not done, and what they need, each once and in an order that works."""
    found: dict[Job, None] = {}

    def visit(job: Job) -> None:
        if not job.is_done and job not in found:
            for other in job.after:
                visit(other)
            found[job] = None

    for job in jobs:
        visit(job)
    return list(found)


def devices(jobs: Sequence[Job]) -> list[str]:
    """Names of what the runs among `jobs`, and those that they need, were trained on."""
    seen: dict[Job, None] = {}
    waiting = list(jobs)
    while waiting:
        job = waiting.pop()
        if job not in seen:
            seen[job] = None
            waiting.extend(job.after)
    return sorted({name for job in seen for name in getattr(job, "devices", tuple)()})


def perform(
    jobs: Sequence[Job], cores: int | None = None, until_s: float | None = None
) -> list[Job]:
    """Do what is missing, as much at once as there are cores.

    Args:
        jobs: what is wanted.
        cores: how many to use; None for all.
        until_s: time of `time.monotonic` after which nothing begins, and at which a run that trains
            leaves a checkpoint and stops.

    Returns:
        What time did not suffice for.

    Raises:
        RankFailure: a job failed twice. What was done stays done.
    """
    cores = cores or os.cpu_count() or 1
    waiting, running = missing(jobs), dict[Future[None], list[Job]]()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns) as progress, ThreadPoolExecutor(cores) as pool:
        task = progress.add_task("runs and scores", total=len(waiting))
        while waiting or running:
            over = until_s is not None and time.monotonic() >= until_s
            if over and not running:
                break
            for batch in [] if over else list(_batches(waiting, running, cores)):
                waiting = [job for job in waiting if job not in batch]
                running[pool.submit(_together, batch, until_s)] = batch
            try:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
            except KeyboardInterrupt:
                progress.stop()
                print("interrupted: the same command goes on from here")
                os._exit(130)  # ends the ranks too, instead of waiting for them
            for future in done:
                batch = running.pop(future)
                future.result()
                stopped = [job for job in batch if not job.is_done]
                progress.advance(task, len(batch) - len(stopped))
                for said, which in (("stopped", stopped), ("done", [*{*batch} - {*stopped}])):
                    if which:
                        progress.console.print(f"{said}: {', '.join(map(str, which))}")
    return missing(jobs)


def _batches(
    waiting: Sequence[Job], running: dict[Future[None], list[Job]], cores: int
) -> Iterator[list[Job]]:
    """What can start now on the free cores."""
    free = cores - sum(batch[0].ranks for batch in running.values())
    undone = {*waiting, *(job for batch in running.values() for job in batch)}
    ready = [job for job in waiting if undone.isdisjoint(job.after)]
    while ready and free > 0:
        first = next((job for job in ready if job.ranks <= free or not running), None)
        if first is None:
            return
        like = [job for job in ready if not job.own_process and job.ranks == first.ranks]
        at_once = max(1, cores // first.ranks)
        rounds = math.ceil(len(like) / (at_once * _TOGETHER))  # so that all cores end together
        share = math.ceil(len(like) / max(1, rounds * at_once))
        batch = [first] if first.own_process else like[:share]
        ready = [job for job in ready if job not in batch]
        free -= first.ranks
        yield batch


def _together(batch: Sequence[Job], until_s: float | None) -> None:
    """Do a batch; once more if it fails, because hours of others may wait for it."""
    try:
        _run(batch, until_s)
    except RankFailure as error:
        print(f"failed, tried once more: {', '.join(map(str, batch))}\n{error}", file=sys.stderr)
        if left := [job for job in batch if not job.is_done]:
            _run(left, until_s)


def _run(batch: Sequence[Job], until_s: float | None) -> None:
    run_ranks(_perform_all, batch[0].ranks, tuple(batch), until_s, timeout_s=_TIMEOUT_S)


def _perform_all(
    rank: int, _world_size: int, batch: tuple[Job, ...], until_s: float | None
) -> None:
    deadline.stop_at(until_s)
    for job in batch:
        if deadline.is_over():
            return
        job.perform(rank)
