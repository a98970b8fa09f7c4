"""What a watch does where something around it is amiss: it says so once, and goes on or refuses."""

from __future__ import annotations

import errno
import os
import shutil
import time
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_watch import TRACKER, kinds, looked, merged, payload, request_of

from conftest import digests, folder_of
from pma_megatron import MergeRequest, SelectionRequest, merge, watch
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats.json_files import read_json
from pma_megatron.merging import job, locks, provenance, targets
from pma_megatron.watching import follow, own, state
from pma_megatron.watching.commands import CommandError

HOUR_NS = 3600 * 10**9


def test_once_without_events_evaluates_what_it_made_and_nothing_else(
    run: Path, tmp_path: Path
) -> None:
    """Nothing says what was evaluated before, so cron's looks do not do it again and again."""
    save, log = tmp_path / "averages", tmp_path / "log"
    command = f'echo "$PMA_ITERATION" >> {log}'
    time.sleep(2.5)  # sources that are hardly older than their average are taken for newer
    for _ in range(3):
        looked(run, save, evaluate=command)
    assert log.read_text().splitlines() == ["8"]
    (run / TRACKER).write_text("6")
    looked(run, save, evaluate=command)
    assert log.read_text().splitlines() == ["8", "6"]


def test_a_disk_that_is_full_at_the_start(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No room for the lock is refused in words; none for the events is said, and stops nothing."""
    save = tmp_path / "averages"

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(locks.os, "pwrite", full)
        with pytest.raises(PublishError, match=f"cannot write to {save}: No space left"):
            looked(run, save)
    assert not list(save.iterdir()), "nor is anything left of it"
    outcome, found = looked(run, save, events=Path("/dev/full"))
    assert kinds(found) == ["started", "published"] and outcome.failed is None
    assert "/dev/full cannot be written (No space left on device)" in caplog.text
    assert payload(folder_of(save, 8)) == merged(run, tmp_path / "other")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo '{broken'; echo '{\"published\": '; echo '[0]: {}'", "no report of a merge"),
        ('echo \'{"published": [], "note": 1}\'', "no report of a merge"),
        ("printf '\\377\\376{\\n'", "no report of a merge"),
        ("exit 7", "exit code 7"),
        (None, "cannot be started"),
    ],
)
def test_a_launch_command_whose_report_cannot_be_read(
    run: Path, tmp_path: Path, script: str | None, words: str
) -> None:
    launch = tmp_path / "launch"
    if script is not None:
        launch.write_text(f"#!/bin/sh\n{script}\n")
        launch.chmod(0o755)
    outcome, found = looked(run, tmp_path / "averages", launch=str(launch))
    assert kinds(found) == ["started", "failed"] and words in str(outcome.failed)
    assert found[1]["iteration"] == 8 and outcome.iteration is None


def test_it_tries_again_less_and_less_often_until_the_run_changes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s, tried_s, limit_s = 0.0, [], 12_000.0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds
        if now_s == limit_s:
            (folder_of(run, 2) / "note").write_text("a change")  # no source, but of the run
            os.utime(folder_of(run, 2) / ".metadata")
        if now_s > limit_s + 120:
            raise KeyboardInterrupt

    def fail(*_: Any, **__: Any) -> None:
        tried_s.append(now_s)
        raise CheckpointError("damaged")

    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: now_s))
    monkeypatch.setattr(follow, "merge", fail)
    found: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        watch(request_of(run, tmp_path / "averages", once=False), tell=found.append)
    assert tried_s == [0, 600, 1800, 4200, 7800, 11400, limit_s]
    assert kinds(found) == ["started", *["failed"] * 7]


@pytest.mark.parametrize("trouble", ["no report", "no listing"])
def test_what_is_published_is_not_made_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A launcher prefixes each line, so that nothing tells of the average; or a store does not
    list it. Whoever reads it then is not to find it deleted, and it is evaluated once."""
    save, log = tmp_path / "averages", tmp_path / "log"
    made, path_of, looks = [], follow.path_of, iter(range(3))

    def merged_by(launch: str, words: Any, request: Any) -> Any:
        made.append(request.overwrite)
        report = job.merge(request)
        if trouble == "no report":
            raise CommandError("its output has no report of a merge")
        return report.published

    def listed(text: str, *, again: bool = False) -> Path:
        if again:
            raise SelectionError("it cannot be listed: 503 SlowDown")
        return path_of(text)

    def step(_: float) -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    monkeypatch.setattr(follow, "merged_by", merged_by)
    monkeypatch.setattr(follow, "path_of", listed)
    monkeypatch.setattr(follow, "_RETRY_S", 0.0)
    time.sleep(2.5)  # sources that are hardly older than their average are taken for newer
    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=step, monotonic=time.monotonic))
    found: list[dict[str, Any]] = []
    settings = {"launch": "launch", "evaluate": f"echo $PMA_ITERATION >> {log}", "once": False}
    with pytest.raises(KeyboardInterrupt):
        watch(request_of(run, save, **settings), tell=found.append)
    first = ["failed", "current"] if trouble == "no report" else ["published"]
    assert kinds(found) == ["started", *first, "evaluated"] and made == [False]
    assert log.read_text().splitlines() == ["8"]


def test_an_average_that_cannot_be_read_is_not_taken_for_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    average: Any = SimpleNamespace(final=tmp_path)
    monkeypatch.setattr(Path, "read_text", fail)
    with pytest.raises(CheckpointError, match=r"pma.json could not be read"):
        targets.is_of(average, SimpleNamespace())  # type: ignore[arg-type]


def test_an_outage_is_said_once(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long each attempt took: the library says so."""
    seconds = iter(range(90, 94))

    def fail(*_: Any, **__: Any) -> None:
        raise SelectionError(f"it cannot be listed: gave up after 3 retries, {next(seconds)}.5s")

    def step(_: float) -> None:
        if next(looks, None) is None:
            raise KeyboardInterrupt

    looks = iter(range(3))
    monkeypatch.setattr(state, "list_checkpoints", fail)
    monkeypatch.setattr(follow, "time", SimpleNamespace(sleep=step, monotonic=time.monotonic))
    found: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        watch(request_of(run, tmp_path / "averages", once=False), tell=found.append)
    assert kinds(found) == ["started", "waiting"]


def test_where_there_are_no_locks_it_says_so_and_works(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(locks.fcntl, "flock", none)
    outcome, found = looked(run, tmp_path / "averages")
    assert kinds(found) == ["started", "failed", "published"]
    assert "no locks" in found[1]["error"] and outcome.failed is None


def test_a_source_that_is_written_while_the_average_is_flushed_is_newer(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watch that starts later is told by the average when its merge began; the flush took longer
    than all that was before it."""
    shard, flush = folder_of(run, 6) / "__0_0.distcp", job._sync
    ahead_s, later_ns = 0.0, time.time_ns() + HOUR_NS

    def slow(*given: Any) -> None:
        nonlocal ahead_s
        flush(*given)
        shard.write_bytes(shard.read_bytes())
        ahead_s += 2 * HOUR_NS / 1e9

    class Later(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Any:
            return datetime.now(tz) + timedelta(seconds=ahead_s)

    with monkeypatch.context() as patch:
        patch.setattr(job, "_sync", slow)
        clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + ahead_s)
        patch.setattr(job, "time", clock)
        patch.setattr(provenance, "datetime", Later)
        outcome, found = looked(run, tmp_path / "averages")
    assert kinds(found) == ["started", "published"]
    assert state.begun_ns(read_json(Path(outcome.published[0]) / "pma.json")) < later_ns
    assert kinds(looked(run, tmp_path / "averages")[1]) == ["started", "published"]


def test_what_training_saved_over_an_average_is_neither_current_nor_replaced(
    run: Path, tmp_path: Path
) -> None:
    """Its `pma.json` stays, and says what the average was made of."""
    save = tmp_path / "averages"
    time.sleep(2.5)  # sources that are hardly older than their average are taken for newer
    looked(run, save)
    assert kinds(looked(run, save)[1]) == ["started", "current"]
    shutil.copytree(folder_of(run, 8), folder_of(save, 8), dirs_exist_ok=True)
    before = digests(save)
    outcome, found = looked(run, save, keep=1)
    assert kinds(found) == ["started", "failed"] and outcome.failed is not None
    assert "training has saved a checkpoint over the average" in str(found[-1])
    assert digests(save) == before


def test_an_old_average_that_cannot_be_read_keeps_no_other(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk would fill up."""
    save, tracker = tmp_path / "averages", run / TRACKER
    for iteration in ("4", "6"):
        tracker.write_text(iteration)
        looked(run, save)
    bad, look = folder_of(save, 4), own.rewritten

    def failing(folder: Path) -> tuple[str, ...]:
        if folder == bad:
            raise CheckpointError(f"{folder} cannot be read now (Input/output error)")
        return look(folder)

    monkeypatch.setattr(own, "rewritten", failing)
    tracker.write_text("8")
    found = looked(run, save, keep=1)[1]
    assert kinds(found) == ["started", "published", "failed", "deleted"]
    assert f"{bad} stays: whether it is as it was made cannot be told" in str(found[2])
    assert sorted(path.name for path in save.glob("iter_*")) == [
        folder_of(save, iteration).name for iteration in (4, 8)
    ]


def test_what_was_written_over_an_average_in_files_of_equal_sizes_stays(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the merge, while it goes on, with the time of a file set back, and in a copy."""
    save, tracker = tmp_path / "averages", run / TRACKER
    tracker.write_text("6")
    looked(run, save)
    made, folder = tmp_path / "made", folder_of(save, 6)
    shutil.copytree(folder, made)
    shard = next(folder.glob("*.distcp"))
    old = shard.stat()

    def save_over() -> None:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
        os.utime(shard, ns=(old.st_atime_ns, old.st_mtime_ns))

    again = MergeRequest(
        load=str(run), save=str(save), selection=SelectionRequest(last=3), overwrite=True
    )
    flush = job._sync

    def late(*given: Any) -> None:
        flush(*given)
        save_over()

    with monkeypatch.context() as patch:
        patch.setattr(job, "_sync", late)
        with pytest.raises(PublishError, match=rf"{shard.name} in it is not what"):
            merge(again)
    before = digests(folder)
    with pytest.raises(PublishError, match=rf"{shard.name} in it is not what"):
        merge(again)
    tracker.write_text("8")
    found = looked(run, save, keep=1)[1]
    assert kinds(found) == ["started", "published", "failed"]
    assert f"{folder} stays: {shard.name} in it is not what" in str(found[-1])
    assert digests(folder) == before
    # All that a copy's times could say is when it was made, and in which order.
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(folder)
    (tmp_path / "copy").rename(folder)
    later_ns = time.time_ns() + HOUR_NS
    for path in folder.iterdir():
        os.utime(path, ns=(later_ns, later_ns))
    marker = folder / "pma.json"
    os.utime(marker, ns=(later_ns + HOUR_NS, later_ns + HOUR_NS))
    assert kinds(looked(run, save, keep=1)[1])[-1] == "failed"
    assert digests(folder) == before
    # One that is as it was made goes, whatever its times.
    shutil.rmtree(folder)
    shutil.copytree(made, folder)
    assert kinds(looked(run, save, keep=1)[1])[-1] == "deleted"
    assert not folder.exists()
