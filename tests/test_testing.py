"""Tests of `pma_megatron.testing` itself: ranks, faults, texts and golden archives."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.testing import (
    FAULT_ENV,
    Fault,
    RankFailure,
    RankTimeout,
    inject,
    rank_outcomes,
    ranks,
    run_ranks,
)

GOLDEN = Path(__file__).parent / "golden"
LONGER_THAN_A_TEST_S = 3600.0


def _report(rank: int, world_size: int, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return rank, world_size, args, kwargs, os.environ["OMP_NUM_THREADS"]


def _all_reduce(rank: int, world_size: int) -> int:
    import torch
    import torch.distributed as dist

    total = torch.tensor([rank + 1])
    dist.all_reduce(total)
    return int(total)


def _collectives(rank: int) -> list[Any]:
    """What each collective gives on two ranks; some write into a part of what they read."""
    import torch
    import torch.distributed as dist

    def given() -> Any:
        return torch.arange(4.0) + 10 * rank

    summed, told, scattered, gathered, many = given(), given(), given(), given(), given()
    dist.all_reduce(summed, op=dist.ReduceOp.MAX)
    dist.broadcast(told, src=1)
    dist.reduce_scatter_tensor(scattered[2 * rank :][:2], scattered)
    work = dist.all_gather_into_tensor(gathered, gathered[2 * rank :][:2].clone(), async_op=True)
    work.wait()
    with dist.distributed_c10d._coalescing_manager(dist.group.WORLD, async_ops=True) as both:
        dist.all_reduce(many[:2])
        dist.all_reduce(many[2:])
    both.wait()
    parts = [torch.empty(4), torch.empty(4)]
    dist.all_gather(parts, given())
    mine = scattered[2 * rank :][:2]
    return [each.tolist() for each in (summed, told, mine, gathered, many, *parts)]


def _by_host(rank: int, world_size: int) -> tuple[list[Any], list[Any], int]:
    import torch

    from pma_megatron.testing import by_host

    plain, staged = _collectives(rank), 0

    def is_staged(_: torch.Tensor) -> bool:
        nonlocal staged
        staged += 1
        return True

    by_host.install(is_staged)
    return plain, _collectives(rank), staged


def _one_fails(rank: int, world_size: int, how: str, folder: Path) -> None:
    if rank == 1 and how == "raise":
        raise ValueError("the cause, as rank one tells it")
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "exit":
        os._exit(3)
    _where_it_hangs(folder / f"hangs{rank}")


def _where_it_hangs(said: Path) -> None:
    said.touch()
    time.sleep(LONGER_THAN_A_TEST_S)


def _only_rank_one_dies(rank: int, world_size: int) -> str:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return "alive"


def _leave_child_behind(rank: int, world_size: int) -> int:
    return subprocess.Popen(["sleep", str(LONGER_THAN_A_TEST_S)]).pid


def _read_fault(rank: int, world_size: int) -> str | None:
    return os.environ.get(FAULT_ENV)


def test_results_come_back_by_rank():
    results = run_ranks(_report, 3, "a", init=False, key=1)
    assert results == [(rank, 3, ("a",), {"key": 1}, "1") for rank in range(3)]


def test_ranks_form_a_process_group():
    assert run_ranks(_all_reduce, 2) == [3, 3]


def test_collectives_by_way_of_the_host_are_the_same():
    for rank, (plain, staged, count) in enumerate(run_ranks(_by_host, 2)):
        assert plain == staged and count == 7
        assert plain[0] == [10.0, 11.0, 12.0, 13.0]
        assert plain[2] == [[10.0, 12.0], [14.0, 16.0]][rank]


@pytest.mark.parametrize(
    ("how", "said", "exitcode", "signal_name"),
    [
        ("raise", "ValueError: the cause, as rank one tells it", None, None),
        ("kill", "was killed by SIGKILL", -9, "SIGKILL"),
        ("exit", "exit code 3", 3, None),
    ],
)
def test_first_failure_ends_the_others(how, said, exitcode, signal_name, tmp_path):
    """Or the test does not end: nothing else ends the other rank."""
    with pytest.raises(RankFailure, match=said) as caught:
        run_ranks(_one_fails, 2, how, tmp_path, init=False, timeout_s=LONGER_THAN_A_TEST_S)
    failure = caught.value
    assert (failure.rank, failure.exitcode, failure.signal) == (1, exitcode, signal_name)
    assert ("_one_fails" in failure.traceback) == (how == "raise")


def test_timeout_kills_all_and_shows_where_they_were(tmp_path, monkeypatch):
    """The time is over when both hang, whenever that is."""

    class Clock:
        sleep = staticmethod(time.sleep)

        @staticmethod
        def monotonic() -> float:
            both_hang = len(list(tmp_path.iterdir())) == 2
            return time.monotonic() + (2 * LONGER_THAN_A_TEST_S if both_hang else 0.0)

    monkeypatch.setattr(ranks, "time", Clock)
    with pytest.raises(RankTimeout, match="_where_it_hangs"):
        run_ranks(_one_fails, 2, "hang", tmp_path, init=False, timeout_s=LONGER_THAN_A_TEST_S)


def test_outcomes_tell_each_rank_apart():
    alive, dead = rank_outcomes(_only_rank_one_dies, 2, init=False)
    assert (alive.ok, alive.result, alive.signal) == (True, "alive", None)
    assert (dead.ok, dead.signal) == (False, "SIGTERM")


def _say_and_sleep(rank: int, world_size: int, file: str) -> None:
    long_s = LONGER_THAN_A_TEST_S
    helper = multiprocessing.get_context("fork").Process(target=time.sleep, args=(long_s,))
    helper.start()
    Path(f"{file}.new").write_text(f"{os.getpid()} {helper.pid}")
    Path(f"{file}.new").rename(file)
    time.sleep(long_s)


def _run_and_wait(file: str) -> None:
    run_ranks(_say_and_sleep, 1, file, init=False, timeout_s=LONGER_THAN_A_TEST_S)


def _assert_gone(pid: int) -> None:
    until_s = time.monotonic() + 200
    while time.monotonic() < until_s:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail(f"process {pid} is still there")


def test_what_a_rank_started_goes_with_it():
    (pid,) = run_ranks(_leave_child_behind, 1, init=False)
    _assert_gone(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal that Linux alone sends")
def test_ranks_and_what_they_forked_end_with_the_job_that_started_them(tmp_path):
    file = tmp_path / "pid"
    job = multiprocessing.get_context("spawn").Process(target=_run_and_wait, args=(str(file),))
    job.start()
    while not file.exists():
        assert job.is_alive()
        time.sleep(0.05)
    job.kill()
    job.join()
    for pid in file.read_text().split():
        _assert_gone(int(pid))


def test_fault_reaches_ranks_and_is_taken_back():
    with inject("write", rank=1, action="kill") as fault:
        assert run_ranks(_read_fault, 1, init=False) == ["write:1:kill"]
        assert fault == Fault("write", 1, "kill")
    assert FAULT_ENV not in os.environ


@pytest.mark.parametrize(
    "fault", [("a:b", 0, "kill"), ("", 0, "kill"), ("a", -1, "kill"), ("a", 0, "x")]
)
def test_fault_must_make_sense(fault):
    with pytest.raises(ValueError, match="fault"):
        Fault(*fault)


def test_import_is_free_of_side_effects():
    code = "import sys, pma_megatron.testing; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_samples_depend_on_their_number_alone():
    torch = pytest.importorskip("torch")
    from pma_megatron.testing import corpus

    one = corpus.batch([5, 6], seq_length=32, seed=1)
    two = corpus.sample(6, seq_length=32, seed=1)
    assert torch.equal(one[0][1], two[0])
    assert torch.equal(two[0][1:], two[1][:-1])
    assert not torch.equal(two[0], corpus.sample(6, seq_length=32, seed=2)[0])
    assert len(corpus.tokens(held_out=True)) > 10_000


@pytest.mark.parametrize("archive", sorted(GOLDEN.glob("*.tar.xz")), ids=lambda path: path.name)
def test_golden_archives_are_whole_runs(archive, tmp_path):
    with tarfile.open(archive) as tar:
        names = set(tar.getnames())
        about = json.load(tar.extractfile("about.json"))
        last = int(tar.extractfile("latest_checkpointed_iteration.txt").read())
    assert f"iter_{last:07d}/.metadata" in names
    assert {"live_rank0.pt", "live_rank1.pt"} <= names
    assert about["config"]["optim_format"] in archive.name
    assert archive.name in (GOLDEN / "README.md").read_text()
