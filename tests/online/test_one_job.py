"""The lock of a job where something stands in its way: a file that was left, or a full disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_snapshot_writer import simple_chunks

from pma_megatron.base.comm import Comm
from pma_megatron.errors import PublishError
from pma_megatron.merging import locks
from pma_megatron.merging.locks import LOCK
from pma_megatron.online import one_job
from pma_megatron.online.snapshot_job import STAGING
from pma_megatron.online.snapshots import SnapshotWriter, name_of
from pma_megatron.testing import run_ranks
from small_disks import mount, unmount

NOBODY = 65534


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder that every user may write to."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        yield folder
        one_job.let_go()


@contextlib.contextmanager
def another_user(folder: Path) -> Iterator[None]:
    """What the block does is done by a user whom no file there belongs to."""
    if os.geteuid() != 0:
        pytest.skip("only root can act for another user")
    os.seteuid(NOBODY)
    try:
        if not os.access(folder, os.R_OK, effective_ids=True):
            pytest.skip(f"another user does not get to {folder}")
        yield
    finally:
        os.seteuid(0)


def left_by_a_job_that_was_killed(folder: Path, mode: int) -> Path:
    lock = folder / f"{LOCK}job"
    lock.write_text("process 4711 on elsewhere writing")
    lock.chmod(mode)
    return lock


def begin(folder: Path) -> SnapshotWriter:
    """As a job does that starts."""
    return SnapshotWriter(folder, simple_chunks(0, 1), torch.float32, Comm())


def test_the_lock_that_another_user_has_left_is_taken(shared: Path) -> None:
    left_by_a_job_that_was_killed(shared, 0o644)
    begun = shared / f"{STAGING}{name_of(50)}-0123-1"
    begun.mkdir()
    begun.chmod(0o777)
    shared.chmod(0o777)
    with another_user(shared):
        begin(shared)
        assert one_job.is_sure(shared)
    assert not begun.exists()


def held_by_another(rank: int, world_size: int, folder: str) -> str | None:
    with another_user(Path(folder)):
        return one_job.other_job(Path(folder))


def test_the_lock_that_another_user_holds_is_seen(shared: Path) -> None:
    assert one_job.other_job(shared) is None
    with another_user(shared):
        pass  # skips here, not in the process below
    (who,) = run_ranks(held_by_another, 1, str(shared))
    assert who is not None and f"process {os.getpid()} on" in who


def test_a_text_that_could_not_be_replaced_is_not_waited_for(
    shared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says that a job cleans up, which was true of another user's that was killed."""
    monkeypatch.setattr(locks, "_CLEANING_S", 0.2)
    assert one_job.other_job(shared) is None
    (shared / f"{LOCK}job").write_text("process 4711 on elsewhere cleaning")
    with pytest.raises(locks.HeldError, match="process 4711 on elsewhere"):
        locks.take(shared, "job", locks.WRITING)


def test_a_lock_that_cannot_be_opened_stops_no_training(
    shared: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing tells then whether another job writes there: what is begun stays."""
    lock = left_by_a_job_that_was_killed(shared, 0o600)
    begun = shared / f"{STAGING}{name_of(50)}-0123-1"
    begun.mkdir()
    with another_user(shared):
        begin(shared)
        begin(shared)
        assert not one_job.is_sure(shared)
    assert begun.exists()
    assert caplog.text.count(f"{lock} cannot be locked (Permission denied)") == 1


def test_a_folder_that_cannot_be_written_is_told_at_the_start(shared: Path) -> None:
    shared.chmod(0o755)
    with another_user(shared), pytest.raises(PublishError, match="cannot write into"):
        begin(shared)


def test_a_full_disk_has_no_lock(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = mount(tmp_path / "full", "nr_inodes=1")
    try:
        assert one_job.other_job(folder) is None and not one_job.is_sure(folder)
        assert "cannot be locked (No space left on device)" in caplog.text
    finally:
        unmount(folder)
