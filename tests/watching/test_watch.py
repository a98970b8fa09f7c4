"""`pma watch`: what it makes equals `pma merge`, and what stops it, or does not."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_cli import call

from conftest import digests, folder_of
from jobs import JOBS, nothing_goes_on  # noqa: F401
from pma_megatron import MergeRequest, Method, SelectionRequest, WatchRequest, merge, verify, watch
from pma_megatron.base.stopping import Stopped, stoppable
from pma_megatron.cli.flags import parsed
from pma_megatron.errors import PublishError, UsageError
from pma_megatron.formats.marker import OWN_FILES
from pma_megatron.testing import inject
from pma_megatron.watching import commands, follow
from pma_megatron.watching.follow import Outcome

TRACKER = "latest_checkpointed_iteration.txt"
PATIENCE_S = 200.0


def request_of(run: Path, save: Path, last: int = 2, **settings: Any) -> WatchRequest:
    of_watch = {"once": True, **settings}
    wanted = SelectionRequest(last=last)
    return WatchRequest(
        merge=MergeRequest(load=str(run), save=str(save), selection=wanted), **of_watch
    )


def looked(run: Path, save: Path, **settings: Any) -> tuple[Outcome, list[dict[str, Any]]]:
    """One look, and its events."""
    found: list[dict[str, Any]] = []
    return watch(request_of(run, save, **settings), tell=found.append), found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in found]


def payload(folder: Path) -> dict[str, str]:
    found = digests(folder)
    return {name: digest for name, digest in found.items() if Path(name).name not in OWN_FILES}


def merged(run: Path, save: Path, last: int = 2) -> dict[str, str]:
    """What `pma merge` makes of the run now."""
    shutil.rmtree(save, ignore_errors=True)
    report = merge(
        MergeRequest(load=str(run), save=str(save), selection=SelectionRequest(last=last))
    )
    return payload(Path(report.outputs[0]))


def slept(step: Callable[[float], None]) -> SimpleNamespace:
    """The module `time` for a watch alone: what it does instead of sleeping."""
    return SimpleNamespace(sleep=step, monotonic=time.monotonic)


def test_looks_again_and_again(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on, loses a checkpoint, goes back, and writes one anew: in one watch."""
    save, later = tmp_path / "averages", tmp_path / "later"
    later.mkdir()
    folder_of(run, 8).rename(later / "iter_0000008")
    (run / TRACKER).write_text("6")
    steps = iter(range(8))

    def done() -> dict[str, str]:
        named = int((save / TRACKER).read_text())
        return payload(folder_of(save, named))

    def step(_: float) -> None:
        match next(steps):
            case 0:
                assert done() == merged(run, tmp_path / "other")
                (later / "iter_0000008").rename(folder_of(run, 8))  # whole, and not yet named
            case 1:
                assert (save / TRACKER).read_text() == "6"
                (run / TRACKER).write_text("8")
            case 2:
                assert done() == merged(run, tmp_path / "other")
                shutil.rmtree(folder_of(run, 6))
            case 3:
                assert done() == merged(run, tmp_path / "other")
                (run / TRACKER).write_text("")  # for a moment
            case 4:
                assert (save / TRACKER).read_text() == "8"
                (run / TRACKER).write_text("4")
            case 5:
                assert (save / TRACKER).read_text() == "4"
                assert done() == merged(run, tmp_path / "other")
                shutil.rmtree(folder_of(save, 4))
            case 6:
                assert done() == merged(run, tmp_path / "other")
                raise KeyboardInterrupt

    monkeypatch.setattr(follow, "time", slept(step))
    found: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        watch(request_of(run, save, once=False), tell=found.append)
    assert [event["sources"] for event in found if event["event"] == "published"] == [
        [4, 6],
        [6, 8],
        [4, 8],
        [2, 4],
        [2, 4],
    ]
    assert kinds(found).count("waiting") == 1
    verify(save)


def test_what_is_there_is_not_made_again(run: Path, tmp_path: Path) -> None:
    """But it is if a source was written since, with the same name, size and metadata."""
    save = tmp_path / "averages"
    before = time.time_ns() - 10**10
    for path in run.rglob("*"):
        os.utime(path, ns=(before, before))
    assert kinds(looked(run, save)[1]) == ["started", "published"]
    made = digests(save)
    outcome, found = looked(run, save)
    # ctimes of a copy made just now are younger than a moment ago: at most one merge more
    if kinds(found) == ["started", "published"]:
        time.sleep(2.5)
        looked(run, save)
        made = digests(save)
        outcome, found = looked(run, save)
    assert kinds(found) == ["started", "current"] and digests(save) == made
    assert outcome.iteration == 8 and outcome.published == (str(folder_of(save, 8)),)
    shard = folder_of(run, 6) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes())
    assert kinds(looked(run, save)[1]) == ["started", "published"]
    (save / TRACKER).unlink()
    ends = {"once": False, "poll_s": 0.01, "until_iteration": 8}
    assert kinds(looked(run, save, **ends)[1]) == ["started", "published"]
    assert (save / TRACKER).read_text() == "8"


def test_waits_for_a_run_and_for_enough_of_it(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    outcome, found = looked(tmp_path / "later", tmp_path / "a")
    assert kinds(found) == ["started", "waiting"] and outcome.published == ()
    outcome, found = looked(run, tmp_path / "a", last=9)
    assert kinds(found) == ["started", "waiting"] and "found 4" in str(outcome.waiting)
    words = ("--save", tmp_path / "a", "--last", 9, "--once", "--json")
    code, out, err = call(capsys, "watch", "--load", run, *words)
    assert code == 0 and [json.loads(line)["event"] for line in out.splitlines()] == kinds(found)
    assert "waiting: " in err


def test_a_failure_is_tried_again_at_the_next_change(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = folder_of(run, 8) / "__0_0.distcp"
    good = shard.read_bytes()
    bad = bytearray(good)
    for at in range(len(good) // 4, len(good) // 2, 16):
        bad[at] ^= 1
    shard.write_bytes(bad)
    looks = 0

    def sleep(_: float) -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            shard.write_bytes(good)
        if looks == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(follow, "time", slept(sleep))
    found: list[dict[str, Any]] = []
    save = tmp_path / "averages"
    with pytest.raises(KeyboardInterrupt):
        watch(request_of(run, save, once=False), tell=found.append)
    assert kinds(found) == ["started", "failed", "published"]
    assert "__0_0.distcp" in found[1]["error"]
    assert payload(folder_of(save, 8)) == merged(run, tmp_path / "other")
    with inject("verify", rank=0, action="raise"):
        outcome, _ = looked(run, tmp_path / "b")
    assert "InjectedFault" in str(outcome.failed)


def test_what_is_done_with_each(run: Path, tmp_path: Path) -> None:
    """Evaluated once, whatever becomes of the watch; old averages go; the model is the newest."""
    save, log, events = tmp_path / "averages", tmp_path / "log", tmp_path / "events.jsonl"
    command = f'echo "$PMA_ITERATION $PMA_AVERAGE" >> {log}; exit 3'
    settings = {"evaluate": command, "events": events, "keep": 2}
    for end in (4, 6, 8):
        (run / TRACKER).write_text(str(end))
        if end == 6:  # killed after the merge, before the evaluation
            words = ("--load", run, "--save", save, "--last", 2, "--once", "--keep", 2)
            with inject("watched", rank=0, action="kill"):
                job = pma(*words, "--evaluate", command, "--events", events)
            job.communicate(timeout=PATIENCE_S)
            assert job.returncode == -signal.SIGKILL
            assert (save / TRACKER).read_text() == "6"
            assert len(log.read_text().splitlines()) == 1
        looked(run, save, **settings)
    looked(run, save, **settings)
    assert log.read_text().splitlines() == [f"{i} {folder_of(save, i)}" for i in (4, 6, 8)]
    assert sorted(path.name for path in save.glob("iter_*")) == ["iter_0000006", "iter_0000008"]
    with events.open("a") as stream:
        stream.write('{"torn')
    looked(run, save, **settings)
    lines = events.read_text().splitlines()
    told = [json.loads(line) for line in lines if line != '{"torn']
    assert [e["code"] for e in told if e["event"] == "evaluated"] == [3, 3, 3]
    assert sum(e["event"] == "deleted" for e in told) == 1


def test_one_at_a_time_and_of_what_follows(run: Path, tmp_path: Path) -> None:
    save = tmp_path / "averages"
    with follow._in_charge(request_of(run, save)), pytest.raises(PublishError, match="watch"):
        looked(run, save)
    wanted = MergeRequest(load=str(run), export=str(tmp_path / "m"), like=str(run))
    both = replace(wanted, save=str(save))
    with follow._in_charge(WatchRequest(merge=wanted)), pytest.raises(PublishError, match="watch"):
        watch(WatchRequest(merge=both, once=True))
    with pytest.raises(UsageError, match="several"):
        WatchRequest(merge=replace(both, sweep=("sma:2,3",)), evaluate="true")
    with pytest.raises(UsageError, match="own folder"):
        request_of(run, run)
    for selection in ({"iterations": (2, 4)}, {"end_iteration": 4}, {"paths": ("a",)}):
        wanted = MergeRequest(load="a", save="b", selection=SelectionRequest(**selection))
        with pytest.raises(UsageError, match="for good"):
            WatchRequest(merge=wanted)
    for settings in ({"keep": 0}, {"evaluate": " "}, {"launch": "'"}, {"poll_s": 0.0}):
        with pytest.raises(UsageError):
            request_of(run, save, **settings)


def test_one_file_for_merge_and_watch(run: Path, tmp_path: Path) -> None:
    path = tmp_path / "average.yaml"
    path.write_text(
        f"load: {run}\nlast: 3\nmerge:\n  save: {tmp_path / 'a'}\n  method: wma\n"
        "  overwrite: true\nwatch:\n  keep: 4\nevaluate:\n  lasts: [2]\n"
    )

    def asked(*words: str) -> Any:
        arguments = parsed([*words, "--from", str(path)])
        return arguments.request_of(arguments)

    of_merge, of_watch = asked("merge"), asked("watch")
    assert of_merge.overwrite and of_watch.keep == 4
    assert of_watch.merge.method.name == "wma" and of_watch.merge.selection.last == 3
    again = parsed(["merge", *of_watch.words])
    assert again.request_of(again) == of_watch.merge


def test_a_command_ends_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with what does not hear of it."""
    monkeypatch.setattr(commands, "_GRACE_S", 0.5)
    pids = tmp_path / "pids"
    command = (
        f"(trap '' TERM; echo $BASHPID >> {pids}; sleep 77 & echo $! >> {pids}; wait; wait) & "
    )
    command = f"exec bash -c {shlex.quote(command + 'wait')}"

    ended = threading.Event()

    def stop() -> None:
        until(lambda: pids.is_file() and len(pids.read_text().split()) == 2)
        while not ended.is_set():  # a signal may come right before the main thread waits
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
            ended.wait(5)

    with stoppable():
        stopper = threading.Thread(target=stop)
        stopper.start()
        try:
            with pytest.raises(Stopped):
                commands.run(command, {}, read=False)
        finally:
            ended.set()
            stopper.join()
    assert [pid for pid in pids.read_text().split() if runs(pid)] == []


def runs(pid: str) -> bool:
    """Whether there is such a process, other than as a zombie."""
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def pma(*words: object) -> subprocess.Popen[str]:
    """A watch as systemd starts it."""
    job = subprocess.Popen(
        [sys.executable, "-m", "pma_megatron", "watch", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    JOBS.append(job)
    return job


def until(done: Callable[[], object], job: subprocess.Popen[str] | None = None) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not done():
        assert job is None or job.poll() is None, job.communicate()
        assert time.monotonic() < end_s
        time.sleep(0.02)


def ended(job: subprocess.Popen[str]) -> Iterator[str]:
    os.kill(job.pid, signal.SIGTERM)
    yield from job.communicate(timeout=PATIENCE_S)


def test_sigterm_ends_it_between_merges_and_inside_of_one(run: Path, tmp_path: Path) -> None:
    flags = ("--load", run, "--last", 2, "--poll-s", 600)
    save, events = tmp_path / "a", tmp_path / "events.jsonl"
    job = pma(*flags, "--save", save, "--events", events)
    until(lambda: events.is_file() and '"published"' in events.read_text(), job)
    _, err = ended(job)
    assert job.returncode == 143 and err.splitlines()[-1] == "pma: stopped by SIGTERM"
    assert json.loads(events.read_text().splitlines()[-1])["event"] == "stopped"
    other = tmp_path / "b"
    with inject("merge", rank=0, action="hang"):
        job = pma(*flags, "--save", other)
    until(lambda: list(other.glob(".pma-staging-*")), job)
    _, err = ended(job)
    assert job.returncode == 143 and "stopped by SIGTERM" in err
    assert not list(other.glob("iter_*")) and not list(other.glob(".pma-lock-*"))
    assert kinds(looked(run, other)[1])[-1] == "published"
    assert payload(folder_of(other, 8)) == payload(folder_of(save, 8))


@pytest.mark.slow
def test_ranks_that_it_launches(run: Path, tmp_path: Path) -> None:
    launch = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2"
    words = ("--load", run, "--save", tmp_path / "a", "--last", 2, "--once", "--json")
    job = pma(*words, "--launch", launch)
    out, err = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, err
    made = [json.loads(line) for line in out.splitlines()][-1]
    assert made["event"] == "published" and made["published"] == [str(folder_of(tmp_path / "a", 8))]
    report = json.loads((folder_of(tmp_path / "a", 8) / "pma.json").read_text())
    assert report["ranks"] == 2
    assert payload(folder_of(tmp_path / "a", 8)) == merged(run, tmp_path / "other")


def by_hand(run: Path, save: Path, end: int, method: str = "sma") -> dict[str, str]:
    """An average that somebody else keeps in the folder of a watch."""
    wanted = SelectionRequest(last=2, end_iteration=end)
    merge(MergeRequest(load=str(run), save=str(save), selection=wanted, method=Method(name=method)))
    return digests(folder_of(save, end))


def test_only_what_it_made_is_replaced_or_deleted(run: Path, tmp_path: Path) -> None:
    """Averages of others stay, of the same settings too, and with names that it wants."""
    save = tmp_path / "averages"
    first, last = by_hand(run, save, 4), by_hand(run, save, 8, "wma")
    (run / TRACKER).write_text("6")
    assert kinds(looked(run, save, keep=1)[1]) == ["started", "published"]
    (run / TRACKER).write_text("8")
    outcome, found = looked(run, save, keep=1)
    assert kinds(found) == ["started", "failed"] and "move it" in str(outcome.failed)
    assert digests(folder_of(save, 4)) == first and digests(folder_of(save, 8)) == last
    shutil.rmtree(folder_of(save, 8))
    assert kinds(looked(run, save, keep=1)[1]) == ["started", "published", "deleted"]
    assert digests(folder_of(save, 4)) == first and not folder_of(save, 6).exists()


def test_what_was_just_made_stays_after_a_rollback(run: Path, tmp_path: Path) -> None:
    """No tracker says which average is meant, and newer ones of a given-up branch are there."""
    save = tmp_path / "averages"
    for end in (6, 8):
        (run / TRACKER).write_text(str(end))
        looked(run, save)
    (run / TRACKER).write_text("4")
    (save / TRACKER).unlink()
    looked(run, save, keep=1)
    (save / TRACKER).unlink()
    request = follow.marked(request_of(run, save).merge)
    assert follow.old_of_own(save, request, end=4, keep=1) == (frozenset(), {})
    old = frozenset(str(folder_of(save, end)) for end in (4, 6))
    assert follow.old_of_own(save, request, end=8, keep=1) == (old, {})
    assert sorted(path.name[-1] for path in save.glob("iter_*")) == ["4", "6", "8"]
