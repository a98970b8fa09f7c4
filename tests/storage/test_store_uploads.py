"""What goes on to a store behind training, where it fails, the run goes back, or both at once."""

from __future__ import annotations

import atexit
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_snapshot_writer import simple_chunks, simple_data, until

from pma_megatron import list_checkpoints
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PublishError
from pma_megatron.formats.marker import (
    BRANCHES_FILE,
    MARKER_FILE,
    ONLINE_AVERAGE,
    SEAL_FILE,
    UPLOADING_FILE,
)
from pma_megatron.online import snapshot_upload, snapshots, uploads
from pma_megatron.online.average_upload import AveragePlace
from pma_megatron.online.snapshots import SnapshotWriter, name_of
from pma_megatron.online.store import WindowStore
from pma_megatron.storage import claims
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import place_of, stored
from pma_megatron.testing import run_ranks
from s3 import files_in

PATIENCE_S = 100.0
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture
def address(tmp_path: Path, spools: Path) -> str:
    return f"memory://{tmp_path.name}/run"


@pytest.fixture
def down(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Says whether the store refuses to take files."""
    put_file, now = ObjectStore.put_file, [False]

    def refusing(self: ObjectStore, key: str, path: Path) -> str:
        if now[0]:
            raise OSError(5, "the store is down")
        return put_file(self, key, path)

    monkeypatch.setattr(ObjectStore, "put_file", refusing)
    return lambda is_down: now.__setitem__(0, is_down)


@pytest.fixture
def new_place(address: str) -> Iterator[Callable[[], AveragePlace]]:
    """Gives the places of jobs, each of which is over when the test is: this process ends later,
    and by then nothing of theirs is there to be put anywhere."""
    made: list[AveragePlace] = []

    def new() -> AveragePlace:
        made.append(AveragePlace(address, Comm()))
        return made[-1]

    yield new
    for place in made:
        atexit.unregister(place.wait)


def writer(address: str | Path, **settings: object) -> SnapshotWriter:
    return SnapshotWriter(address, simple_chunks(0, 1), torch.float32, Comm(), **settings)


def put(to: SnapshotWriter, iteration: int) -> None:
    to.write(iteration, simple_data(simple_chunks(0, 1), iteration), {})
    to.wait(PATIENCE_S)


def there(address: str) -> list[int | None]:
    return [each.iteration for each in list_checkpoints(address) if each.complete]


def average(place: AveragePlace, iteration: int, source: Path, **said: object) -> Path:
    """Save one as a trainer does, from a snapshot of that iteration."""
    place.begin(name_of(iteration))
    folder = Path(shutil.copytree(source / name_of(iteration), place.folder / name_of(iteration)))
    (folder / SEAL_FILE).unlink()
    (folder / MARKER_FILE).write_text(json.dumps({"kind": ONLINE_AVERAGE, **said}))
    (place.folder / TRACKER).write_text(str(iteration))
    place.saved(folder.name)
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """Holds what becomes an average."""
    to = writer(tmp_path / "made")
    for iteration in (40, 50, 60, 100):
        put(to, iteration)
    return to.root


def tracker(address: str) -> bytes:
    store, key = stored(place_of(address))
    return store.got(f"{key}/{TRACKER}")[1]


def test_an_entry_that_was_deleted_is_written_again(address: str) -> None:
    """The run goes back twice: what was there at the start is not there for good."""
    first = writer(address, keeps_whole=True)
    put(first, 2)
    put(first, 4)
    first.wait_for_uploads(PATIENCE_S)
    entries = writer(address, keeps_whole=True)
    entries.expect({4, 6})
    put(entries, 6)
    entries.retain({6})
    entries.wait_for_uploads(PATIENCE_S)
    entries.give_up({6})
    entries.expect({4})
    put(entries, 4)
    entries.retain({4})
    entries.wait_for_uploads(PATIENCE_S)
    assert there(address) == [4]


def test_what_is_given_up_before_it_is_signed_for_does_not_stay(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does training wait for a request that hangs."""
    claim, asked, goes_on = uploads.claim, threading.Event(), threading.Event()
    hung = threading.Event()

    def slow(*given: object) -> object:
        asked.set()
        if not goes_on.wait(PATIENCE_S):
            hung.set()
        return claim(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(uploads, "claim", slow)
    entries = writer(address, keeps_whole=True)
    put(entries, 8)
    put(entries, 10)
    assert asked.wait(PATIENCE_S)
    entries.give_up({8})
    goes_on.set()
    entries.wait_for_uploads(PATIENCE_S)
    assert there(address) == [10] and not hung.is_set()
    store, key = stored(place_of(address))
    assert not store.listed(f"{key}/{name_of(8)}/")


def test_after_a_failure_that_filled_the_disk_all_gets_there(
    address: str, down: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    thin = writer(address, trained_from=0)
    down(True)
    put(thin, 1)
    thin.wait_for_uploads(PATIENCE_S)
    full = SimpleNamespace(disk_usage=lambda _: SimpleNamespace(total=1000, free=99))
    monkeypatch.setattr(snapshot_upload, "shutil", full)
    with pytest.raises(PublishError, match="1 snapshots wait"):
        put(thin, 2)
    down(False)
    thin.wait_for_uploads(PATIENCE_S)
    put(thin, 3)
    thin.wait_for_uploads(PATIENCE_S)
    assert there(address) == [1, 3]


@pytest.mark.parametrize("answers_again", [False, True])
def test_a_note_of_branches_that_did_not_get_there_is_tried_again(
    address: str,
    answers_again: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Nothing else waits for the store when the job ends."""
    put_small, refused = ObjectStore.put, list[str]()

    def refusing(self: ObjectStore, key: str, data: bytes, *, create: bool = False) -> None:
        if key.endswith(BRANCHES_FILE) and (not answers_again or not refused):
            refused.append(key)
            raise OSError(5, "slow down")
        put_small(self, key, data, create=create)

    job = writer(address, trained_from=0)
    for iteration in (40, 90, 99):
        put(job, iteration)
    job.wait_for_uploads(PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", refusing)
        job.train_on(97)
        until(lambda: bool(refused))
        job.wait_for_uploads(PATIENCE_S)
    assert f"{BRANCHES_FILE}, which says that snapshots after iteration 97" in caplog.text
    state = "given up" if answers_again else "complete"
    assert [ref.state for ref in list_checkpoints(address)] == ["complete", "complete", state]


def test_nothing_is_deleted_before_the_note_of_branches_is_there(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What else says so is the mark of a snapshot, which may be the next one to go."""
    put_small = ObjectStore.put

    def refusing(self: ObjectStore, key: str, data: bytes, *, create: bool = False) -> None:
        if key.endswith(BRANCHES_FILE):
            raise OSError(5, "slow down")
        put_small(self, key, data, create=create)

    job = writer(address, trained_from=0, keep_in_store=2)
    put(job, 90)
    put(job, 99)
    job.wait_for_uploads(PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put", refusing)
        job.train_on(97)
        for iteration in (98, 100):
            put(job, iteration)
            job.wait_for_uploads(PATIENCE_S)
        assert there(address) == [90, 98, 99, 100]
    put(job, 101)
    job.wait_for_uploads(PATIENCE_S)
    assert there(address) == [100, 101]


def test_a_snapshot_that_was_not_written_is_not_of_this_branch(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`keep` of two: the one that was given up does not push out one that was not."""

    def refusing(*_: object) -> None:
        raise PublishError("the disk is full")

    first = writer(address, trained_from=0)
    for iteration in (30, 40, 50):
        put(first, iteration)
    first.wait_for_uploads(PATIENCE_S)
    second = writer(address, trained_from=40, keep_in_store=2)
    with monkeypatch.context() as patch, pytest.raises(PublishError, match="disk is full"):
        patch.setattr(snapshots, "refuse_full", refusing)
        put(second, 50)
    put(second, 60)
    second.wait_for_uploads(PATIENCE_S)
    assert 40 in there(address) and 60 in there(address)


@pytest.mark.parametrize("by", ["this job", "the job before"])
def test_training_resumes_from_the_average_that_was_saved_last(
    address: str,
    made: Path,
    down: Callable[[bool], None],
    by: str,
    new_place: Callable[[], AveragePlace],
) -> None:
    """One of a branch that was given up waited for the store, and has a larger number."""
    place = new_place()
    average(place, 40, made)
    place.wait(PATIENCE_S)
    down(True)
    average(place, 100, made)
    place.wait(PATIENCE_S)
    if by == "the job before":
        place = new_place()
        place.wait(PATIENCE_S)
    average(place, 50, made)
    down(False)
    place.wait(PATIENCE_S)
    assert there(address) == [40, 50, 100]
    assert tracker(address) == b"50"


def test_a_thread_that_was_not_waited_out_is_waited_for_again() -> None:
    window = WindowStore.__new__(WindowStore)
    goes_on = threading.Event()
    window._thread = threading.Thread(target=goes_on.wait, daemon=True)
    window._thread.start()
    window.wait(0.01)
    threading.Timer(0.2, goes_on.set).start()
    window.wait()
    assert goes_on.is_set()


def test_the_sign_of_an_upload_is_renewed_while_a_file_takes_its_time(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others would take the job for one that is gone."""
    put_file, put_object, signs = ObjectStore.put_file, ObjectStore.put, threading.Semaphore(0)

    def slow(self: ObjectStore, key: str, path: Path) -> str:
        if path.name == "__0_0.distcp":
            for _ in range(3):  # the first, and two more
                assert signs.acquire(timeout=PATIENCE_S)
        return put_file(self, key, path)

    def noted(self: ObjectStore, key: str, *given: object, **how: object) -> None:
        put_object(self, key, *given, **how)  # type: ignore[arg-type]
        if key.endswith(UPLOADING_FILE):
            signs.release()

    for name in ("_RENEWED_S", "_LOOKED_S"):
        monkeypatch.setattr(claims, name, 0.01)
    monkeypatch.setattr(ObjectStore, "put_file", slow)
    monkeypatch.setattr(ObjectStore, "put", noted)
    to = writer(address)
    put(to, 1)
    to.wait_for_uploads(PATIENCE_S)
    assert there(address) == [1]


def test_a_process_that_ends_waits_no_longer_than_it_says(
    address: str, made: Path, new_place: Callable[[], AveragePlace],
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It can begin no thread any more, since Python 3.12: what puts averages there has begun."""
    goes_on, put_file, putting = threading.Event(), ObjectStore.put_file, set[threading.Thread]()

    def held_up(self: ObjectStore, key: str, path: Path) -> str:
        putting.add(threading.current_thread())
        assert threading.main_thread() in putting or goes_on.wait(PATIENCE_S)
        return put_file(self, key, path)

    def ends(self: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    place = new_place()
    monkeypatch.setattr(ObjectStore, "put_file", held_up)
    with monkeypatch.context() as at_exit:
        at_exit.setattr(threading.Thread, "start", ends)
        average(place, 50, made)
        place.wait(1.0)
        assert not goes_on.is_set() and f"{name_of(50)} of {place.folder} did not" in caplog.text
        assert threading.main_thread() not in putting  # which would not come back in time
        goes_on.set()
        place.wait(PATIENCE_S)
    assert there(address) == [50]


def looks_late(rank: int, size: int, address: str, sign: str) -> None:
    """Rank 1 looks whether a snapshot was published when it is in the store, and off the disk."""
    chunks = simple_chunks(rank, size)
    to = SnapshotWriter(address, chunks, torch.float32, Comm())
    to.write(1, simple_data(chunks, 1), {})
    if rank == 0:
        to.wait(PATIENCE_S)
        to.wait_for_uploads(PATIENCE_S)
        assert there(address) == [1] and not files_in(to.root)
        Path(sign).touch()
    else:
        until(Path(sign).exists)
        to.wait(PATIENCE_S)


def test_a_rank_that_looks_late_sees_that_a_snapshot_was_published(
    address: str, tmp_path: Path, spools: Path
) -> None:
    """As at the end of a job, where ranks come one after the other."""
    run_ranks(looks_late, 2, address, str(tmp_path / "sign"))
    writer(address).wait_for_uploads(PATIENCE_S)
    assert not [*spools.rglob("iter_*")]
