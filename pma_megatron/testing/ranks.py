"""Runs a function as the ranks of a small gloo job on this machine, one process per rank.

Each rank leads its own session, so that whatever it forks (checkpoint writers, managers) goes away
with it. A rank's exception, signal, or hang comes back to the caller as text that says where.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any
from unittest import mock

_ENV = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
_PRELOAD = [
    "torch.distributed",
    "megatron.core.distributed",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.dist_checkpointing.strategies.fully_parallel",
    "pma_megatron.merging.job",
    "pytest",
]
"""What most ranks import, by the module of their test too, and no test wants in two releases."""

_GRACE_S = 2.0
"""For the rank that failed first, which may still be cleaning up when another one has told that it
failed with it."""
_STACKS_S = 20.0
_ENDED_S = 60.0
_LOOK_EVERY_S = 1.0
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class RankFailure(RuntimeError):
    """A rank raised, was killed by a signal, or left without a result.

    `rank` is the first that failed, `exitcode` that of its process (negative: minus the signal),
    `signal` the signal's name or None, `traceback` the text of the child's traceback or "".
    """

    def __init__(self, outcome: Outcome, world_size: int) -> None:
        self.rank = outcome.rank
        self.exitcode = outcome.exitcode
        self.signal = outcome.signal
        self.traceback = outcome.traceback
        super().__init__(f"rank {self.rank} of {world_size} {outcome.describe()}")


class RankTimeout(RankFailure):
    """At least one rank was still running when the time was over; `traceback` shows its stacks."""


@dataclass
class Outcome:
    """How one rank ended; `result` means something only where `ok` is true.

    `seconds` is the time from the start of the job until the rank reported, or was seen dead.
    """

    rank: int
    ok: bool = False
    result: Any = None
    exitcode: int | None = None
    traceback: str = ""
    timed_out: bool = False
    seconds: float = field(default=0.0, compare=False)

    @property
    def signal(self) -> str | None:
        """Name of the signal that ended the process, or None."""
        if self.exitcode is None or self.exitcode >= 0:
            return None
        return signal.Signals(-self.exitcode).name

    def describe(self) -> str:
        """One phrase, then the traceback where there is one."""
        if self.timed_out:
            phrase = f"was still running after {self.seconds:.1f} s and was killed"
        elif self.traceback:
            phrase = "raised"
        elif self.signal:
            phrase = f"was killed by {self.signal}"
        else:
            phrase = f"left with exit code {self.exitcode} and no result"
        return f"{phrase}:\n{self.traceback}" if self.traceback else phrase


def run_ranks(fn: Callable[..., Any], world_size: int, *args: Any, **asked: Any) -> list[Any]:
    """Call `fn(rank, world_size, *args, **kwargs)` on every rank and return the results by rank.

    The first rank to fail ends the others. `asked` may hold `timeout_s`, `init` and `preloaded`,
    see `rank_outcomes`; the rest of it is for `fn`.

    Raises RankFailure for the rank that failed first, RankTimeout when `timeout_s` is over.
    """
    outcomes = rank_outcomes(fn, world_size, *args, stop_at_failure=True, **asked)
    failed = [outcome for outcome in outcomes if not outcome.ok]
    if failed:
        first = min(failed, key=lambda o: (o.timed_out, not o.signal, o.seconds))
        raise (RankTimeout if first.timed_out else RankFailure)(first, world_size)
    return [outcome.result for outcome in outcomes]


def backend(world_size: int) -> str:
    """What a tiny job's process group is made with: NCCL for CUDA tensors where every rank has a
    GPU of its own, which NCCL insists on, and gloo for everything else."""
    import torch

    from pma_megatron.testing import cpu

    own = cpu.on_gpu() and world_size <= torch.cuda.device_count()
    return "cpu:gloo,cuda:nccl" if own else "gloo"


def rank_outcomes(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = 600.0,
    init: bool = True,
    preloaded: bool = True,
    stop_at_failure: bool = False,
    **kwargs: Any,
) -> list[Outcome]:
    """Like `run_ranks`, but lets every rank end by itself and reports how each one did.

    For tests of what the other ranks do when one dies. Ranks that are still there after
    `timeout_s` are killed and marked `timed_out`. Never raises for what a rank did.

    `fn` must be a top-level function; results travel by pickle. With `init` each rank joins a gloo
    process group that meets in a file (on GPUs, see `cpu.DEVICE_ENV`, NCCL beside it, and each rank
    has its own; more ranks than GPUs share them, over gloo alone, see `by_host`).

    Ranks are forked from a process that has imported torch and megatron-core, and end without exit
    handlers; with `preloaded=False` each is a new interpreter that ends as any program does.
    """
    context = _context(preloaded)
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="pma_ranks_") as directory:
        try:
            with mock.patch.dict(os.environ, _ENV):
                environment = dict(os.environ)
                job = _Job(fn, world_size, args, kwargs, directory, timeout_s, init, environment)
                for rank in range(world_size):
                    receiver, sender = context.Pipe(duplex=False)
                    process = context.Process(target=_child, args=(job, rank, sender, _Output()))
                    process.start()
                    sender.close()
                    processes.append(process)
                    pipes.append(receiver)
            return _collect(processes, pipes, Path(directory), timeout_s, stop_at_failure)
        finally:
            for process in processes:
                _kill_session(process)
            for pipe in pipes:
                pipe.close()


def _collect(
    processes: Sequence[BaseProcess],
    pipes: list[Connection],
    directory: Path,
    timeout_s: float,
    stop_at_failure: bool,
) -> list[Outcome]:
    start = time.monotonic()
    deadline = start + timeout_s
    outcomes = [Outcome(rank) for rank in range(len(processes))]
    running = set(range(len(processes)))
    while running and (left := deadline - time.monotonic()) > 0:
        ready = wait([pipes[rank] for rank in running], timeout=min(left, _LOOK_EVERY_S))
        # A killed rank's own children (checkpoint writers) may hold its end of the pipe open.
        for rank in [r for r in running if pipes[r] in ready or not processes[r].is_alive()]:
            running.discard(rank)
            outcome = outcomes[rank]
            outcome.seconds = time.monotonic() - start
            try:
                if not pipes[rank].poll():
                    raise EOFError
                outcome.ok, payload, at = pickle.loads(pipes[rank].recv_bytes())
                outcome.result, outcome.traceback = (payload, "") if outcome.ok else (None, payload)
                outcome.seconds = at - start
            except EOFError:
                processes[rank].join(timeout=_ENDED_S)
                outcome.exitcode = processes[rank].exitcode
            if stop_at_failure and not outcome.ok:
                # Others may have failed first and not been read yet: look a moment longer.
                deadline = min(deadline, time.monotonic() + _GRACE_S)
    failed_elsewhere = stop_at_failure and any(
        not o.ok for rank, o in enumerate(outcomes) if rank not in running
    )
    for rank in running:
        outcomes[rank].seconds = time.monotonic() - start
        outcomes[rank].timed_out = True
        if not failed_elsewhere:
            outcomes[rank].traceback = _stacks(processes[rank], directory / f"stacks{rank}")
    for rank, outcome in enumerate(outcomes):
        if outcome.ok:
            processes[rank].join(timeout=max(_ENDED_S, deadline - time.monotonic()))
        outcome.exitcode = processes[rank].exitcode if outcome.ok else outcome.exitcode
    return outcomes


def _stacks(process: BaseProcess, path: Path) -> str:
    """Python stacks of a rank that hangs, as `faulthandler` writes them."""
    if process.pid is None or not path.exists():
        return ""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGUSR1)
    until_s, text = time.monotonic() + _STACKS_S, ""
    while time.monotonic() < until_s:  # it is written line by line
        time.sleep(_LOOK_EVERY_S / 2)
        before, text = text, path.read_text()
        if text and text == before:
            break
    return text


def _kill_session(process: BaseProcess) -> None:
    if process.pid is not None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


@dataclass(frozen=True)
class _Job:
    fn: Callable[..., Any]
    world_size: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    directory: str
    timeout_s: float
    init: bool
    environment: dict[str, str]


class _Output:
    """The caller's standard output and error, whatever those of the process that forks are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _take_over, (DupFd(1), DupFd(2))


def _take_over(*streams: Any) -> _Output:
    for number, stream in enumerate(streams, start=1):
        descriptor = stream.detach()
        if descriptor != number:
            os.dup2(descriptor, number)
            os.close(descriptor)
    return _Output()


def _context(preloaded: bool) -> BaseContext:
    """Forks ranks of a process that has imported the trainer once: that takes longer than a test.

    Nothing else is shared. Spawns them where imports are measured too, and on GPUs, whose driver
    does not survive a fork.
    """
    from pma_megatron.testing import cpu

    measured = "COVERAGE_PROCESS_CONFIG" in os.environ or "COVERAGE_PROCESS_START" in os.environ
    if measured or not preloaded or cpu.on_gpu():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    return context


def _let_go_of_server() -> None:
    """The process that forks ranks ends with its job, and its ranks with it, only if they do not
    hold the pipe on which it sees the job alive."""
    server = forkserver._forkserver
    if server._forkserver_alive_fd is not None:
        os.close(server._forkserver_alive_fd)
        server._forkserver_alive_fd = server._forkserver_address = None


def _end_with_parent(parent: int) -> None:
    """Else the ranks of a job that was killed would go on writing beside those of the next.

    Args:
        parent: its process, which may have gone before the system knows that this one follows it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _forks_end_with_rank() -> None:
    """Checkpoint writers too; but the signal comes when the thread that forked ends, so only those
    that the main thread forks."""
    by_main, parent = False, 0

    def before() -> None:
        nonlocal by_main, parent
        by_main = threading.current_thread() is threading.main_thread()
        parent = os.getpid()

    def in_child() -> None:
        if by_main:
            _end_with_parent(parent)

    os.register_at_fork(before=before, after_in_child=in_child)


def _child(job: _Job, rank: int, sender: Connection, _: _Output) -> None:
    parent = os.getppid()
    os.setsid()
    _let_go_of_server()
    os.environ.clear()
    os.environ.update(job.environment)
    _end_with_parent(parent)
    _forks_end_with_rank()
    stacks = Path(job.directory, f"stacks{rank}").open("w")  # noqa: SIM115 (open until exit)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job.world_size))
    try:
        message = (True, _call(job, rank))
        payload = pickle.dumps((*message, time.monotonic()))
    except BaseException:
        payload = pickle.dumps((False, traceback.format_exc(), time.monotonic()))
    sender.send_bytes(payload)
    sender.close()
    sys.stdout.flush()


def _call(job: _Job, rank: int) -> Any:
    if not job.init:
        return job.fn(rank, job.world_size, *job.args, **job.kwargs)
    import torch
    import torch.distributed as dist

    from pma_megatron.testing import by_host, cpu

    torch.set_num_threads(1)
    if cpu.on_gpu():
        local_rank = rank % torch.cuda.device_count()
        os.environ["LOCAL_RANK"] = str(local_rank)
        torch.cuda.set_device(local_rank)
        if "nccl" not in backend(job.world_size):
            by_host.install()
    dist.init_process_group(
        backend(job.world_size),
        init_method=f"file://{job.directory}/rendezvous",
        rank=rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_s),
    )
    result = job.fn(rank, job.world_size, *job.args, **job.kwargs)
    dist.destroy_process_group()
    return result
