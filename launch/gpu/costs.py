"""What the package costs on this machine: parts that need it for themselves."""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from gpu.core import SMA
from gpu.findings import Finding, found, measured
from gpu.job import LAST, Job, synchronize
from gpu.pairs import cost
from gpu.parts import PEER, PEER_ENV, PEER_SAYS_ENV
from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.base.comm import Comm
from pma_megatron.megatron.load import merge_into
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.megatron.params import live_tensors
from pma_megatron.megatron.shard import MegatronShard
from pma_megatron.merging.planning import make_plan
from pma_megatron.online.hostcopy import HostCopy
from pma_megatron.testing import TinyTrainer

_GPU_ROUNDS = {1: (5, 16), 10: (10, 10), 100: (100, 2)}
_CPU_ROUNDS = {1: (2, 2), 10: (10, 1)}
"""Interval in steps: (steps per round, pairs of rounds with and without)."""
_REPEATS = 5
_PEER_ROUNDS = 3
_BENCH = Path(__file__).parents[1] / "bench" / "bench.py"
_BLOCK_BYTES = 8 << 20


@functools.lru_cache(maxsize=1)
def _trainer(job_is_on_gpu: bool) -> TinyTrainer:
    """One for all parts, warm."""
    trainer = TinyTrainer(Job(folder=Path(), gpu=job_is_on_gpu).large())
    trainer.train(3)
    return trainer


def timed(work: Callable[[], Any]) -> float:
    """Seconds until it is done, on the GPU too."""
    synchronize()
    start_s = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start_s


def pinned_copy_s(nbytes: int) -> float:
    """Seconds of the machine's own copy of so many bytes: GPU to pinned memory, or in memory."""
    numel = nbytes // 4
    on_gpu = torch.cuda.is_available() and _is_on_gpu()
    source = torch.zeros(numel, device="cuda" if on_gpu else "cpu")
    target = torch.empty(numel, pin_memory=on_gpu)
    target.copy_(source)
    return statistics.median(
        timed(lambda: target.copy_(source, non_blocking=True)) for _ in range(_REPEATS)
    )


def _is_on_gpu() -> bool:
    from pma_megatron.testing import cpu

    return cpu.on_gpu()


# Steps.


def step(job: Job) -> Iterator[Finding]:
    """Rounds of steps with and without an average take turns; medians of both."""
    trainer = _trainer(job.gpu)
    tokens = trainer.config.global_batch_size * trainer.config.seq_length
    copy_s = None
    for interval, (steps, pairs) in (_GPU_ROUNDS if job.gpu else _CPU_ROUNDS).items():
        average = OnlineAverage(trainer.models, trainer.optimizer, SMA, LAST, interval * tokens)
        copy_s = copy_s or pinned_copy_s(average.shard.nbytes)
        watched = _Watched(trainer, average)
        watched.steps(steps if interval < 100 else interval)  # memory is touched
        average.wait()
        without, with_it, before_them = [], [], watched.entries
        for number in range(2 * pairs):
            if number % 4 in (0, 3):  # whatever drifts, drifts for both
                without.append(timed(lambda n=steps: trainer.train(n)) / steps)  # type: ignore[misc]
                continue
            with_it.append(timed(lambda w=watched, n=steps: w.steps(n)) / steps)  # type: ignore[misc]
            average.wait()  # what is still copied must not disturb the next round
        told = cost(without, with_it)
        seen = told.extra * interval if told.is_seen else None
        yield measured(
            f"a step with an entry every {interval}",
            interval_steps=interval,
            without_ms=1e3 * statistics.median(without),
            with_ms=1e3 * statistics.median(with_it),
            extra_ms_per_entry=None if seen is None else 1e3 * seen,
            entry_over_pinned_copy=None if seen is None else seen / copy_s,
            entry_bytes=average.shard.nbytes,
            pinned_copy_ms=1e3 * copy_s,
            entries=watched.entries - before_them,
            host_threads=torch.get_num_threads(),
            rounds_without_ms=[round(1e3 * each, 3) for each in without],
            rounds_with_ms=[round(1e3 * each, 3) for each in with_it],
        )


class _Watched:
    """A trainer with an average, for which only the steps count that are made here."""

    def __init__(self, trainer: TinyTrainer, average: OnlineAverage) -> None:
        self._trainer, self._average = trainer, average
        self._per_step = trainer.config.global_batch_size * trainer.config.seq_length
        self._tokens = self.entries = 0

    def steps(self, count: int) -> None:
        for _ in range(count):
            self._trainer.train(1)
            self._tokens += self._per_step
            self.entries += self._average.step(self._trainer.iteration, self._tokens)


# Copies and swaps.


def copy(job: Job) -> Iterator[Finding]:
    """The copy of one entry, and the same bytes in one piece."""
    trainer = _trainer(job.gpu)
    shard = MegatronShard(live_tensors(trainer.models, trainer.optimizer))
    to_host = HostCopy(shard, None)
    target = to_host.buffer()

    def entry() -> None:
        to_host.start(target)
        to_host.wait()

    entry()
    entry_s = statistics.median(timed(entry) for _ in range(_REPEATS))
    issued_s = statistics.median(_issue(to_host, target) for _ in range(_REPEATS))
    pinned_s = pinned_copy_s(shard.nbytes)
    yield measured(
        "the copy of an entry",
        entry_bytes=shard.nbytes,
        tensors=len(shard.slots),
        entry_gb_per_s=shard.nbytes / entry_s / 1e9,
        pinned_gb_per_s=shard.nbytes / pinned_s / 1e9,
        entry_over_pinned=entry_s / pinned_s,
        issued_in_ms=1e3 * issued_s,
    )


def _issue(to_host: HostCopy, target: torch.Tensor) -> float:
    """Seconds for which the training process itself is held up by the start of a copy."""
    synchronize()
    start_s = time.perf_counter()
    to_host.start(target)
    issued_s = time.perf_counter() - start_s
    to_host.wait()
    return issued_s


def swap(job: Job) -> Iterator[Finding]:
    """Putting the average in place, and the live values back."""
    trainer = _trainer(job.gpu)
    tokens = trainer.config.global_batch_size * trainer.config.seq_length
    average = OnlineAverage(trainer.models, trainer.optimizer, SMA, LAST, tokens)
    _Watched(trainer, average).steps(LAST)
    average.wait()
    made = average.average()
    assert made is not None
    sums_s = [
        timed(lambda: [made.made(slot) for slot in average.shard.slots]) for _ in range(_REPEATS)
    ]
    yield measured("the sums of a swap, on the host", sums_ms=1e3 * statistics.median(sums_s))
    for name in ("averaged_weights", "averaged_state"):
        pairs = [_in_and_out(getattr(average, name)) for _ in range(_REPEATS)]
        entering, leaving = (statistics.median(each) for each in zip(*pairs, strict=True))
        yield measured(
            f"a swap, {name}",
            in_ms=1e3 * entering,
            out_ms=1e3 * leaving,
            entry_bytes=average.shard.nbytes,
            in_gb_per_s=LAST * average.shard.nbytes / entering / 1e9,
        )


def _in_and_out(swapped: Callable[[], AbstractContextManager[None]]) -> tuple[float, float]:
    block = swapped()
    return timed(block.__enter__), timed(lambda: block.__exit__(None, None, None))


# Checkpoints.


def _saved(job: Job, root: Path) -> TinyTrainer:
    trainer = _trainer(job.gpu)
    for _ in range(LAST):
        trainer.train(1)
        trainer.save(root)
    return trainer


def init(job: Job) -> Iterator[Finding]:
    """PMA-init from checkpoints that have just been written: the page cache holds them."""
    root = job.folder / "run"
    trainer = _saved(job, root)
    reports = [
        merge_into(
            trainer.models,
            trainer.optimizer,
            load=str(root),
            selection=SelectionRequest(last=LAST),
            threads=_threads(),
        )
        for _ in range(2)
    ]
    seconds = min(report.seconds for report in reports)
    read = reports[-1].read_bytes
    yield measured(
        "PMA-init",
        sources=LAST,
        threads=_threads(),
        read_bytes=read,
        seconds=seconds,
        seconds_per_gb=seconds / (read / 1e9),
        first_seconds=reports[0].seconds,
        peak_memory_above_baseline_bytes=max(reports[-1].peak_memory_above_baseline_bytes),
    )


def _threads() -> int:
    return min(8, os.cpu_count() or 1)


def merge_(job: Job) -> Iterator[Finding]:
    """The merge of the same checkpoints, and its reads and writes alone, in turns, from warm
    pages."""
    root, save = job.folder / "run", job.folder / "out"
    _saved(job, root)
    request = MergeRequest(
        load=str(root), save=str(save), selection=SelectionRequest(last=LAST), threads=_threads()
    )
    floors, merges, rounds = [], [], []
    for _ in range(2):
        floors.append(_floor(request, job.folder / "floor"))
        start_s = time.perf_counter()
        report = merge(request)
        merges.append(time.perf_counter() - start_s)
        rounds.append({name: round(value, 3) for name, value in report.seconds.items()})
        shutil.rmtree(save)
    best, floor = min(merges), min(each[0] for each in floors)
    averaging = min(each["merge"] for each in rounds)
    read, written = floors[-1][1:]
    yield measured(
        "an offline merge",
        sources=LAST,
        threads=_threads(),
        read_bytes=read,
        written_bytes=written,
        merge_s=best,
        floor_s=floor,
        averaging_s=averaging,
        averaging_over_floor=averaging / floor,
        read_gb_per_s=read / best / 1e9,
        stages_s=rounds,
    )
    if PEER_ENV in os.environ:
        yield _beside_peer(root, job.folder, _PEER_ROUNDS if job.gpu else 1)


def _beside_peer(root: Path, folder: Path, rounds: int) -> Finding:
    """`launch/bench/bench.py --peer`: another program and the merge, in turns."""
    name, command, says = PEER, os.environ[PEER_ENV], os.environ.get(PEER_SAYS_ENV)
    result = folder / "bench.json"
    words = [
        *(sys.executable, "-W", "ignore", str(_BENCH), str(root), "--work", str(folder / "bench")),
        *("--last", str(LAST), "--rounds", str(rounds), "--settings", f"1x{_threads()}"),
        *("--floor-block", str(_BLOCK_BYTES), "--json", str(result)),
        *("--peer", command),
        *(("--peer-says", says) if says else ()),
    ]
    done = subprocess.run(words, capture_output=True, text=True)
    print(done.stdout, done.stderr, flush=True)  # into the log
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        last = said[-1] if said else f"exit code {done.returncode}"
        return found(name, [f"{last} (the log has all that it printed)"])
    values = json.loads(result.read_text())
    (setting,) = values["settings"].values()
    stage_s = values["peer_stage_s"]
    return measured(
        name,
        command=command,
        says=says,
        peer_s=values["peer_median_s"],
        peer_stage_s=statistics.median(stage_s) if stage_s else None,
        merge_stage_s=setting["merge_median_s"],
        floor_s=setting["floor_median_s"],
        rounds=setting["rounds"] | {"peer_s": values["peer_s"], "peer_stage_s": stage_s},
    )


def _floor(request: MergeRequest, folder: Path) -> tuple[float, int, int]:
    """(seconds, bytes read, bytes written)."""
    from floor import Floor

    plan = make_plan(request, Comm())
    folder.mkdir()
    for name, nbytes in plan.layout.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.truncate(nbytes)
    floor = Floor(plan, folder, Comm())
    floor.open()
    moved = floor.run(request.threads, _BLOCK_BYTES)
    shutil.rmtree(folder)
    return floor.wall_s, moved.read, moved.written
