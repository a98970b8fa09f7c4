"""What cannot be read now may be whole: it is not called damaged, not deleted, and stands for no
other one; nor is anything deleted because of what it may say."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_snapshot_branches import job, train

from pma_megatron import PruneRequest, SelectionRequest, list_checkpoints, prune
from pma_megatron.errors import SelectionError
from pma_megatron.formats import holding
from pma_megatron.formats.marker import MARKER_FILE, SNAPSHOTS
from pma_megatron.retention import decision
from pma_megatron.runs.discover import choose
from pma_megatron.storage import spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import path_of

_NUMBER = itertools.count()
Fails = Callable[[str], None]


@pytest.fixture(params=["disk", "store"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A folder on a disk, and one in a store."""
    monkeypatch.setenv("PMA_MEGATRON_SPOOL", str(tmp_path / "spools"))
    monkeypatch.setattr(decision, "SETTLED_S", -60)
    monkeypatch.setattr(holding, "_seen_by_all", lambda descriptor: True)
    spool.forget()
    remote = request.param == "store"
    yield f"memory://unreadable{next(_NUMBER)}/run" if remote else str(tmp_path / "run")
    spool.forget()


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Fails:
    """Reads of files whose paths end so fail from then on, on a disk or in a store."""
    told: list[str] = []
    opened, read = os.open, ObjectStore.read

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
    monkeypatch.setattr(ObjectStore, "read", in_store)

    def begin(end: str) -> None:
        spool.forget()
        told.append(end)

    return begin


def written(root: str | Path, *iterations: int, trained_from: int = 0) -> None:
    writer = job(root, trained_from)
    train(writer, *iterations)
    writer.wait_for_uploads(60)


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
    fails(f"iter_0000050/{MARKER_FILE}")
    found = states(root)
    assert found.pop(50) == "unreadable" and set(found.values()) == {"not judged"}
    with pytest.raises(SelectionError, match="iter_0000050"):
        choose(list_checkpoints(root), SelectionRequest(last=2), root)
    with pytest.raises(SelectionError, match="iter_0000050"):
        deleted(root, keep_last=1)
    assert set(states(root)) == {20, 40, 50, 100, 200}


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
