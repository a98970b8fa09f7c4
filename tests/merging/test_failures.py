"""Signals, ranks that die, hang or never come: one line that names them, and nothing left behind.

Real commands, under a real torchrun where ranks are the matter.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any
from unittest import mock

import pytest

import kills
from conftest import digests, request_for
from jobs import JOBS, free_port, nothing_goes_on, without_progress  # noqa: F401
from pma_megatron import MergeRequest, SelectionRequest, merge
from pma_megatron.base.stopping import Stopped, stoppable
from pma_megatron.merging import job as merging_job
from pma_megatron.testing import inject

TRACKER = "latest_checkpointed_iteration.txt"
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
TOGETHER = Path(__file__).with_name("together.py")
PATIENCE_S = 240.0
ENDING = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)


def heed_signals() -> None:
    """Signals as a terminal leaves them; a background job of a shell inherits ignored ones."""
    for number in ENDING:
        signal.signal(number, signal.SIG_DFL)


def start(
    *flags: str, ranks: bool = False, meet: tuple[Path, int] | None = None, **environment: str
) -> subprocess.Popen[str]:
    """One `pma` command, under torchrun or alone; so many ranks begin together in a folder."""
    before = TORCHRUN if ranks else ()
    pma = ("-m", "pma_megatron")
    if meet is not None:
        meet[0].mkdir(exist_ok=True)
        pma = (str(TOGETHER), *map(str, meet))
    job = subprocess.Popen(
        [sys.executable, *before, *pma, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=heed_signals,
    )
    JOBS.append(job)
    return job


def merging(
    run: Path, save: Path, *flags: str, ranks: bool = False, meet: tuple[Path, int] | None = None
) -> subprocess.Popen[str]:
    last = () if "--sweep" in flags else ("--last", "2")
    wanted = ("merge", "--load", str(run), "--save", str(save), *last, *flags)
    return start(*wanted, ranks=ranks, meet=meet)


def wait_for(pattern: str, save: Path, job: subprocess.Popen[str]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not list(save.glob(pattern)):
        assert job.poll() is None and time.monotonic() < until_s, job.communicate()
        time.sleep(0.01)


def said(job: subprocess.Popen[str]) -> list[str]:
    """The lines that ranks wrote on stderr, once the job is over; those of torchrun left out."""
    _, text = job.communicate(timeout=PATIENCE_S)
    lines = without_progress(text).splitlines()
    agent = [n for n, line in enumerate(lines) if "torch/distributed/elastic" in line]
    end = lines.index("Traceback (most recent call last):") if agent else len(lines)
    return [line for n, line in enumerate(lines[:end]) if n not in agent]


def test_signals(dense_run: Path, tmp_path: Path) -> None:
    """Each signal that asks to end, followed by another one: clean, with the shell's codes.

    Nothing is done yet that could be kept; what is, see `test_restart`.
    """
    jobs = {}
    with inject("split", rank=0, action="hang"):
        for number in ENDING:
            jobs[number] = merging(dense_run, tmp_path / number.name)
    for number, job in jobs.items():
        save = tmp_path / number.name
        wait_for(".pma-staging-*", save, job)
        for each in (signal.SIGSTOP, number, signal.SIGTERM, signal.SIGCONT):  # both are there
            job.send_signal(each)
        lines = [line for line in said(job) if "already stopping" not in line]
        assert job.returncode == 128 + number
        assert lines == [f"pma: stopped by {number.name}; nothing was published"]
    assert list(tmp_path.iterdir()) == []


def test_a_signal_between_two_publications(dense_run: Path, tmp_path: Path) -> None:
    """What is there is said, by path, and the same command makes the rest."""
    save = tmp_path / "save"
    with inject("published", rank=0, action="hang"):
        job = merging(dense_run, save, "--sweep", "sma,wma:2")
    wait_for(f"*/{TRACKER}", save, job)
    job.send_signal(signal.SIGTERM)
    first, second = (save / name / "iter_0000008" for name in ("sma-last2", "wma-last2"))
    (line,) = said(job)
    (staging,) = save.rglob(".pma-staging-*")
    assert line == (
        f"pma: stopped by SIGTERM; published {first}; not {second}: the same command makes the "
        f"rest, and goes on with what is kept in {staging}"
    )
    assert job.returncode == 143
    before = digests(first)
    again = merging(dense_run, save, "--sweep", "sma,wma:2")
    kept, going_on = said(again)
    assert kept == f"pma: {first} is kept: this very request published it before"
    assert "going on with a merge that was cut off" in going_on and "(100 %" in going_on
    assert again.returncode == 0
    assert digests(first) == before and second.is_dir()
    assert sorted(path.name for path in save.rglob("*pma-*")) == []


SWEEP = ("sma,wma:2",)
MOMENTS = 6


def lines_until_the_end(request: MergeRequest, act: Callable[[int], None]) -> int:
    """Merge; calls `act` with a number at each line that is run once all is published."""
    seen = 0

    def line(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if event == "line":
            seen += 1
            act(seen - 1)
        return line

    def from_now_on(*given: Any) -> None:
        publish(*given)
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_code is not lines_until_the_end.__code__:
            frame.f_trace, frame = line, frame.f_back
        sys.settrace(line)

    publish = merging_job._publish
    try:
        with mock.patch.object(merging_job, "_publish", from_now_on):
            merge(request)
    finally:
        sys.settrace(None)
    return seen


def test_a_signal_when_all_is_published(dense_run: Path, tmp_path: Path) -> None:
    """Nothing is left half cleaned, wherever it comes, and what is published is said."""

    def stop_at(moment: int) -> Callable[[int], None]:
        return lambda line: signal.raise_signal(signal.SIGTERM) if line == moment else None

    lines = lines_until_the_end(
        request_for(dense_run, tmp_path / "whole", sweep=SWEEP), lambda _: None
    )
    assert lines > 10 * MOMENTS
    for number in range(MOMENTS):
        save = tmp_path / str(number)
        with stoppable(), pytest.raises(Stopped) as stop:
            moment = lines * number // MOMENTS
            lines_until_the_end(request_for(dense_run, save, sweep=SWEEP), stop_at(moment))
        names = {str(save / name / "iter_0000008") for name in ("sma-last2", "wma-last2")}
        assert {*stop.value.published} == names and stop.value.unpublished == ()
        assert sorted(path.name for path in save.rglob("*pma-*")) == []


def test_killed_when_all_is_published(dense_run: Path, tmp_path: Path) -> None:
    """Whatever job comes next takes away what was left."""
    save = tmp_path / "save"
    with inject("leave", rank=0, action="kill"):
        killed = merging(dense_run, save, "--sweep", "sma,wma:2")
    assert killed.wait(PATIENCE_S) == -signal.SIGKILL
    assert list(save.rglob(".pma-journal-*"))
    earlier = SelectionRequest(last=None, end_iteration=6)
    merge(request_for(dense_run, save, selection=earlier, sweep=SWEEP))
    assert sorted(path.name for path in save.rglob("*pma-*")) == []


CASES: dict[str, tuple[str, Sequence[str], str]] = {
    # In the stage of who tells it, which may be the one before.
    "killed": ("merge:1:kill", (), "pma: error: rank 1 died in stage '"),
    "main is killed": ("merge:0:kill", (), "pma: error: [rank 1] rank 0 died in stage '"),
    "hangs": (
        "merge:1:hang",
        ("--timeout", "10s"),
        "pma: error: rank 1 moved nothing, last seen in stage 'merge': waited 10 s",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_rank_is_lost(dense_run: Path, tmp_path: Path, case: str) -> None:
    """The survivor says in one line which, and the next job finds nothing in its way."""
    fault, flags, words = CASES[case]
    stage, rank, action = fault.split(":")
    save = tmp_path / "save"
    with inject(stage, rank=int(rank), action=action):  # type: ignore[arg-type]
        job = merging(dense_run, save, *flags, ranks=True, meet=(tmp_path / "meet", 2))
    lines = said(job)
    assert len(lines) == 1 and lines[0].startswith(words), lines
    assert job.returncode != 0
    kept = "the same command goes on from there" in lines[0]
    assert kept == (case != "main is killed") and list(save.glob(".pma-staging-*"))
    again = merging(dense_run, save)
    assert again.communicate(timeout=PATIENCE_S) and again.returncode == 0
    assert sorted(path.name for path in save.iterdir()) == ["iter_0000008", TRACKER]


def test_a_rank_never_comes(dense_run: Path, tmp_path: Path) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "3"}
    flags = ("merge", "--load", str(dense_run), "--save", str(tmp_path / "save"), "--timeout", "10")
    meet = (tmp_path / "meet", 2)
    jobs = [start(*flags, meet=meet, **where, RANK=rank) for rank in ("0", "2")]
    texts: list[Any] = [said(job) for job in jobs]
    assert [job.returncode for job in jobs] == [1, 1]
    assert len(texts[0]) == 1 and "rank 1 never came: waited 10 s" in texts[0][0], texts
    assert not (tmp_path / "save").exists()


def test_kill_loop(dense_run: Path, tmp_path: Path) -> None:
    """Three rounds of `launch/attack/kills.py`: SIGTERM and SIGKILL at random moments."""
    shutil.copytree(dense_run, tmp_path / "run")
    loop = kills.Loop(tmp_path, limit_s=PATIENCE_S)
    for number in (0, 3, 5):
        done = loop.play(number)
        assert not done.wrong, done


def test_a_signal_that_somebody_takes_is_theirs() -> None:
    """A debugger's handler stays, in the block too; nothing is left changed after it."""
    taken: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: taken.append(number))
    try:
        with stoppable():
            signal.raise_signal(signal.SIGUSR1)
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGUSR2)
        assert taken == [signal.SIGUSR1]
        assert signal.getsignal(signal.SIGUSR2) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGUSR1, before)


OUTPUTS = {  # how a shell starts the command, what becomes of it, and what stderr says
    ">/dev/full": (0, "standard output cannot be written (No space left on device)"),
    "| head -c 1": (0, ""),
    ">&-": (0, ""),
    "2>&-": (0, ""),
    "<&- >&- 2>&-": (0, ""),
    "2>/dev/full": (0, ""),
}


def shell(line: str) -> tuple[int, str]:
    """The exit code of the first command of a pipe, and what it says on stderr."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    return done.returncode, without_progress(done.stderr)


def test_output_that_nobody_can_read(dense_run: Path, tmp_path: Path) -> None:
    """What was published decides the exit code, not whether it could be said."""
    pma = f"{sys.executable} -m pma_megatron"
    for number, (where, (code, words)) in enumerate(OUTPUTS.items()):
        save = tmp_path / str(number)
        found, error = shell(f"{pma} merge --load {dense_run} --last 2 --save {save} {where}")
        assert found == code and words in error, (where, found, error)
        assert (save / TRACKER).is_file()
        assert error.count("\n") == bool(words)
    assert shell(f"{pma} plan --load {dense_run} --last 2 | head -1") == (0, "")
    code, error = shell(f"{pma} list {dense_run} > /dev/full")
    assert code == 1 and "No space left" in error
