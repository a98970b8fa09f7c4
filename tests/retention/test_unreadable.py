"""What cannot be read now may be whole: it is not called damaged, not deleted, and stands for no
other one; nor is anything deleted because of what it may say."""

from __future__ import annotations

import errno
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_snapshot_branches import job, train
from test_snapshot_writer import simple_chunks

from pma_megatron import PruneRequest, SelectionRequest, list_checkpoints, prune
from pma_megatron.base.comm import Comm
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats import holding
from pma_megatron.formats.marker import BRANCHES_FILE, MARKER_FILE, SNAPSHOTS, UPLOADING_FILE
from pma_megatron.megatron.thin import ThinSnapshots
from pma_megatron.online.snapshots import SnapshotWriter
from pma_megatron.online.store import WindowStore
from pma_megatron.online.window import Member
from pma_megatron.retention import decision
from pma_megatron.runs.discover import choose
from pma_megatron.storage import spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import path_of, place_of, stored

_NUMBER = itertools.count()
Fails = Callable[..., None]


@pytest.fixture(params=["disk", "store"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A folder on a disk, and one in a store."""
    monkeypatch.setenv("PMA_MEGATRON_SPOOL", str(tmp_path / "spools"))
    monkeypatch.setattr(decision, "SETTLED_S", -60)
    monkeypatch.setattr(holding, "seen_by_all", lambda descriptor, **_: True)
    spool.forget()
    remote = request.param == "store"
    yield f"memory://unreadable{next(_NUMBER)}/run" if remote else str(tmp_path / "run")
    spool.forget()


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Reads of files whose paths end so fail from then on, on a disk or in a store; until it is
    called again."""
    told: list[str] = []
    opened, read, got = os.open, ObjectStore.read, ObjectStore.got

    def refuse(name: str) -> None:
        if name.endswith(tuple(told)):
            raise OSError(errno.EIO, "Input/output error", name)

    def on_disk(path: Any, *args: Any, **settings: Any) -> int:
        if told and "dir_fd" not in settings and "mirror" not in str(path):
            refuse(str(path))
        return opened(path, *args, **settings)

    def in_store(self: ObjectStore, key: str, *args: Any) -> memoryview:
        if told:
            refuse(key)
        return read(self, key, *args)

    monkeypatch.setattr(os, "open", on_disk)

    def in_store_whole(self: ObjectStore, key: str) -> tuple[Any, bytes]:
        if told:
            refuse(key)
        return got(self, key)

    monkeypatch.setattr(ObjectStore, "read", in_store)
    monkeypatch.setattr(ObjectStore, "got", in_store_whole)

    def begin(*ends: str) -> None:
        told[:] = ends

    return begin


def written(root: str | Path, *iterations: int, trained_from: int = 0) -> None:
    writer = job(root, trained_from)
    train(writer, *iterations)
    writer.wait_for_uploads(60)
    spool.forget()


def forget_branches(root: str) -> None:
    """As an earlier release leaves a run that went back."""
    if "://" not in root:
        (Path(root) / BRANCHES_FILE).unlink()
        return
    store, key = stored(place_of(root))
    store.delete([f"{key}/{BRANCHES_FILE}"])


def states(root: str | Path) -> dict[int | None, str]:
    return {ref.iteration: ref.state for ref in list_checkpoints(root)}


def deleted(root: str | Path, **rules: Any) -> list[int | None]:
    request = PruneRequest(root=str(root), without_locks=True, **rules)
    return [row.ref.iteration for row in prune(request, delete=True).rows if row.deleted]


@pytest.mark.parametrize("file", [".metadata", "metadata.json", "common.pt", "__0_0.distcp"])
def test_what_cannot_be_read_is_not_deleted(root: str, fails: Fails, file: str) -> None:
    written(root, 10, 20, 30, 40)
    fails(f"iter_0000010/{file}")
    assert states(root)[10] == "unreadable"
    assert deleted(root, keep_last=1, damaged=True) == [20, 30]
    assert set(states(root)) == {10, 40}


def test_what_seems_damaged_is_read_before_it_goes(root: str, fails: Fails) -> None:
    """What was missed at the look may be what cannot be read."""
    written(root, 10, 20)
    fails("iter_0000010/common.pt")
    request = PruneRequest(root=root, keep_last=1, damaged=True)
    ten, twenty = (decision._damaged(path_of(r.path), request) for r in list_checkpoints(root))
    assert twenty == [] and "common.pt cannot be read now" in ten[0]


def test_what_is_said_of_a_store_helps_there(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a mount nor the rights of a file are to be looked at."""
    monkeypatch.setenv("PMA_MEGATRON_SPOOL", str(tmp_path / "spools"))
    root = f"memory://unreadable{next(_NUMBER)}/run"
    written(root, 10)
    read = ObjectStore.read
    for number, words in (
        (errno.ENOSPC, "PMA_MEGATRON_SPOOL"),
        (errno.EACCES, "credentials"),
        (errno.EIO, "once it answers"),
    ):

        def fail(*_: Any, number: int = number) -> memoryview:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(ObjectStore, "read", fail)
        (ref,) = list_checkpoints(root)
        assert ref.unreadable and words in str(ref.incomplete_because)
        assert "chmod" not in str(ref.incomplete_because)
    monkeypatch.setattr(ObjectStore, "read", read)
    spool.forget()


def test_an_average_does_not_pass_over_it(root: str, fails: Fails) -> None:
    written(root, 10, 20, 30, 40)
    fails("iter_0000030/.metadata")
    with pytest.raises(SelectionError, match=r"iter_0000030.*cannot be read now"):
        choose(list_checkpoints(root), SelectionRequest(last=2), root)
    request = SelectionRequest(last=2, allow_gaps=True)
    (left,) = choose(list_checkpoints(root), request, root).passed_over
    assert (left.iteration, left.kind, left.gap) == (30, "unreadable", True)


def test_a_mark_that_cannot_be_read_makes_none_healthy(root: str, fails: Fails) -> None:
    """Neither the one whose it is, nor those that its branch went back behind."""
    written(root, 20, 40, 100, 200)
    written(root, 50, trained_from=40)
    assert states(root)[100] == states(root)[200] == "given up"
    spool.forget()
    fails(f"iter_0000050/{MARKER_FILE}")
    found = states(root)
    assert (found[40], found[50], found[100]) == ("complete", "unreadable", "given up")
    forget_branches(root)
    found = states(root)
    assert found.pop(50) == "unreadable" and set(found.values()) == {"not judged"}
    with pytest.raises(SelectionError, match="iter_0000050"):
        choose(list_checkpoints(root), SelectionRequest(last=2), root)
    with pytest.raises(SelectionError, match="iter_0000050"):
        deleted(root, keep_last=1)
    assert set(states(root)) == {20, 40, 50, 100, 200}


def test_what_is_being_uploaded_is_whole_nowhere(tmp_path: Path) -> None:
    """On a disk too: it may be a store that is mounted, or a copy of one."""
    written(tmp_path, 10, 20)
    (tmp_path / "iter_0000010" / UPLOADING_FILE).touch()
    assert states(tmp_path) == {10: "damaged", 20: "complete"}
    (tmp_path / "iter_0000020" / UPLOADING_FILE).touch()
    assert states(tmp_path)[20] == "being written"


def test_a_full_checkpoint_that_cannot_be_read_has_no_stand_in(
    tmp_path: Path, fails: Fails
) -> None:
    written(tmp_path / SNAPSHOTS, 10, 20)
    written(tmp_path, 10)
    (tmp_path / "iter_0000010" / MARKER_FILE).unlink()
    fails(f"{tmp_path}/iter_0000010/.metadata")
    found = {ref.iteration: (ref.snapshot, ref.state) for ref in list_checkpoints(tmp_path)}
    assert found == {10: (False, "unreadable"), 20: (True, "complete")}


def test_the_newest_that_the_run_goes_on_from_stays(root: str) -> None:
    """Not only the newest by number, which a branch wrote that was given up."""
    written(root, 20, 40, 100, 200)
    written(root, 60, trained_from=40)
    assert deleted(root, keep_every_iterations=40) == [20]
    assert {i for i, state in states(root).items() if state == "complete"} == {40, 60}


def kept_few(root: str, trained_from: int) -> SnapshotWriter:
    """A writer that keeps two."""
    keep, chunks = 2 if "://" in root else None, simple_chunks(0, 1)
    settings: dict[str, Any] = {"keep_in_store": keep, "trained_from": trained_from}
    return SnapshotWriter(root, chunks, torch.float32, Comm(), **settings)


def tidied(writer: SnapshotWriter) -> None:
    writer.wait_for_uploads(60)
    if writer._uploads is None:
        writer.prune(2)


def test_snapshots_that_could_not_be_read_at_the_start_are_given_up_too(
    root: str, fails: Fails
) -> None:
    """What they hold does not matter for that; and they do not count among the newest then."""
    written(root, 20, 40, 100, 200)
    fails("iter_0000100/.metadata", "iter_0000200/.metadata")
    writer = kept_few(root, 40)
    fails()
    train(writer, 50, 60)
    tidied(writer)
    given_up = {100: "given up", 200: "given up"}
    assert states(root) == {50: "complete", 60: "complete", **given_up}


def test_no_branch_is_guessed_at_the_start(root: str, fails: Fails) -> None:
    written(root, 20, 40, 100)
    fails(f"iter_0000100/{MARKER_FILE}")
    with pytest.raises(PublishError, match="iter_0000100"):
        kept_few(root, 40)
    fails()
    written(root, 50, trained_from=40)
    assert states(root) == {20: "complete", 40: "complete", 50: "complete", 100: "given up"}


def test_no_snapshot_goes_while_a_mark_cannot_be_read(root: str, fails: Fails) -> None:
    written(root, 20, 40, 100)
    writer = kept_few(root, 40)
    fails(f"iter_0000100/{MARKER_FILE}")
    train(writer, 50, 60)
    tidied(writer)
    fails()
    assert set(states(root)) == {20, 40, 50, 60, 100}
    tidied(writer)
    train(writer, 70)
    tidied(writer)
    assert set(states(root)) == {60, 70, 100}


class _Window:
    """As much of a window and its shard as a store of them asks for."""

    last = 6

    def __init__(self, *iterations: int) -> None:
        self.parts, self.numel = [], 0
        for chunk in simple_chunks(0, 1):
            self.parts.append((chunk, self.numel))
            self.numel += chunk.box.numel
        self.entries = tuple(Member(iteration=each, tokens=each) for each in iterations)

    def chunks(self) -> list[Any]:
        return self.parts

    def clear(self) -> None:
        self.entries = ()

    def vector(self, entry: Member) -> torch.Tensor:
        return torch.full((self.numel,), float(entry.iteration))


def test_a_window_that_cannot_be_read_is_not_forgotten(root: str, fails: Fails) -> None:
    """Without those entries the next save would delete them, and the average be another one."""

    def store(window: Any) -> WindowStore:
        return WindowStore(root, window, window, Comm())

    first = store(_Window(10, 20, 30))
    first.save(wait=True)
    first.wait_for_uploads(60)
    spool.forget()
    fails("iter_0000020/.metadata")
    with pytest.raises(CheckpointError, match=r"iter_0000020 cannot be read now"):
        store(_Window()).load(30)
    again = _Window(40)
    resumed = store(again)
    with pytest.raises(CheckpointError, match=r"iter_0000020 cannot be read now"):
        resumed.load(20)
    fails()
    assert set(states(root)) == {10, 20, 30}


def test_a_snapshot_in_the_making_is_given_up_too(root: str) -> None:
    """The run goes back while one that the spike has spoiled is still being written."""
    thin = ThinSnapshots.__new__(ThinSnapshots)
    thin._writer, thin._comm, thin._keep = job(root, 0), Comm(), None
    train(thin._writer, 40)
    going_on = threading.Event()

    def late(number: int) -> torch.Tensor:
        going_on.wait(60)
        return torch.zeros(simple_chunks(0, 1)[number].box.numel)

    thin._writer.write(100, late, {})
    threading.Timer(0.2, going_on.set).start()
    thin.forget(98)
    train(thin._writer, 110)
    thin._writer.wait_for_uploads(60)
    assert states(root) == {40: "complete", 100: "given up", 110: "complete"}
