"""Ctrl-C: one line and exit code 130, whatever the command was doing. Real signals, real commands.

What a killed merge leaves, and signals between two publications, are in test_failures.
"""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from jobs import JOBS, free_port, nothing_goes_on, without_progress  # noqa: F401
from pma_megatron.base.comm import process_group_from_environment
from pma_megatron.base.stopping import Stopped, stoppable, unwinding
from pma_megatron.cli import command, verbs
from pma_megatron.errors import PlanError, RankError
from pma_megatron.testing import inject, run_ranks

PATIENCE_S = 200.0
TRIES = 20
TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")


def start(*words: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    """A command as a terminal starts it: in a process group of its own, signals heeded."""
    job = subprocess.Popen(
        [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL) and None,
    )
    JOBS.append(job)
    return job


def pma(*words: object, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return start("-m", "pma_megatron", *map(str, words), stderr=stderr)


def wait_until_it_imports(job: subprocess.Popen[str]) -> None:
    """Torch's library is mapped when a second or more of its import is still to come."""
    until_s = time.monotonic() + PATIENCE_S
    while job.poll() is None and "libtorch" not in Path(f"/proc/{job.pid}/maps").read_text():
        assert time.monotonic() < until_s
        time.sleep(0.005)


def interrupted(job: subprocess.Popen[str]) -> tuple[str, str]:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and says how
        os.killpg(job.pid, signal.SIGINT)
    return job.communicate(timeout=PATIENCE_S)


def test_while_it_imports(dense_run: Path, tmp_path: Path) -> None:
    """At several moments of it, and with what a verb would have done said as always.

    Where one that cannot be held at its work was at its end before the signal, it is started again.
    """
    merge = ("merge", "--load", dense_run, "--last", 2, "--save", tmp_path / "save")
    for words, pause_s, more, at_its_end in (
        (("list", dense_run), 0.0, "", 0),
        (("verify", dense_run), 0.1, "", 1),
        (merge, 0.2, "; nothing was published", None),
        (("plan", "--load", dense_run), 0.4, "", None),
    ):
        for _ in range(TRIES):
            with inject("policy", rank=0, action="hang"):
                job = pma(*words)
            wait_until_it_imports(job)
            time.sleep(pause_s)
            out, err = interrupted(job)
            if job.returncode != at_its_end or "Traceback" in err:
                break
        assert (out, without_progress(err)) == ("", f"pma: stopped by SIGINT{more}\n"), words
        assert job.returncode == 130
    assert list(tmp_path.iterdir()) == []


def test_while_ranks_merge(dense_run: Path, tmp_path: Path) -> None:
    """torchrun tells of itself; the ranks say one line between them, and leave nothing."""
    save = tmp_path / "save"
    merge = ("-m", "pma_megatron", "merge", "--load", str(dense_run), "--last", "2")
    with inject("split", rank=0, action="hang"):
        job = start(*TORCHRUN, *merge, "--save", str(save))
    until_s = time.monotonic() + PATIENCE_S
    while not list(save.glob(".pma-staging-*")):
        assert job.poll() is None and time.monotonic() < until_s, job.communicate()
        time.sleep(0.01)
    out, err = interrupted(job)
    said = without_progress(out + err).splitlines()
    ours = [line for line in said if line.startswith("pma: ")]
    assert ours == ["pma: stopped by SIGINT; nothing was published"]
    assert job.returncode != 0
    assert not save.exists()


def test_while_it_plans(dense_run: Path) -> None:
    """At a terminal: what is done is shown as it goes on, and goes away, the cursor is back."""
    ours, its = pty.openpty()
    plan = ("plan", "--load", dense_run, "--last", 3)
    with inject("policy", rank=0, action="hang"):
        job = pma(*plan, stderr=its)
    os.close(its)
    shown = b""
    while b"plan: policy" not in shown:
        shown += os.read(ours, 4096)
    os.killpg(job.pid, signal.SIGINT)
    with contextlib.suppress(OSError):  # its end is closed
        while more := os.read(ours, 4096):  # who does not read holds it up
            shown += more
    os.close(ours)
    assert job.wait(PATIENCE_S) == 130
    for what in ("look at iter_0000002", "open iter_0000008, 1 of 3", "open iter_0000006, 3 of 3"):
        assert f"plan: {what}".encode() in shown
    assert shown.endswith(b"pma: stopped by SIGINT\r\n")
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")


class Interrupting:
    """What is interrupted where it is destroyed, where no exception gets out."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def test_where_an_exception_would_be_swallowed(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with stoppable(), pytest.raises(Stopped) as stop:
            held = Interrupting()
            del held
            time.sleep(PATIENCE_S)
    finally:
        signal.signal(signal.SIGINT, before)
    assert stop.value.number == signal.SIGINT
    assert capsys.readouterr().err == ""


def test_from_when_on_it_unwinds() -> None:
    """Before `unwinding` the process ends there and then; after it, what is open is closed."""
    ended: list[int] = []

    def end(number: int) -> None:
        ended.append(number)
        raise RuntimeError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "_exit", lambda code: ended.append(code))
        with stoppable(end), pytest.raises(RuntimeError):
            signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGTERM, 143]
    with stoppable(end):
        unwinding()
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)
    assert ended == [signal.SIGTERM, 143]


@pytest.mark.parametrize("asked", [False, True])
def test_the_end_of_a_rank_is_told_though_torchrun_ends_the_others(
    asked: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It does so when the first is gone: in whatever moment of telling that the signal comes."""

    def work(_: object) -> int:
        try:
            raise RankError("rank 1 is gone", lost=True, asked=asked)
        finally:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(verbs, "work_of", lambda _: work)
    code = command.run(["list", str(tmp_path)])
    told = "stopped by SIGTERM" if asked else "error: rank 1 is gone"
    assert (code, capsys.readouterr().err) == (143 if asked else 1, f"pma: {told}\n")


def test_an_end_that_is_being_told_is_told_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupted(text: str) -> str:
        signal.raise_signal(signal.SIGTERM)
        return text

    monkeypatch.setattr(command, "visible", interrupted)
    assert command.run(["list", str(tmp_path / "nowhere")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pma: error: ") and "nowhere" in line


def leave(rank: int, world_size: int, meet: str) -> list[str]:
    """Torchrun asks this rank to end while it leaves the job because of an error."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=meet)
    destroy, came = torch.distributed.destroy_process_group, []

    def interrupted() -> None:
        signal.raise_signal(signal.SIGTERM)
        destroy()
        came.append("left")

    torch.distributed.destroy_process_group = interrupted  # type: ignore[assignment]
    try:
        with stoppable(), process_group_from_environment(PATIENCE_S):
            raise PlanError("there is no plan")
    except (PlanError, Stopped) as error:
        came.append(type(error).__name__)
    finally:
        torch.distributed.destroy_process_group = destroy  # type: ignore[assignment]
    return came


def test_a_rank_that_leaves_because_of_an_error_raises_that() -> None:
    found = run_ranks(leave, 2, str(free_port()), init=False)
    assert found == [["left", "PlanError"]] * 2
