"""What goes on to a store from a disk that is full, that fails, or that somebody else tidies."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_store_leftovers import Down, Places, tag, versions
from test_store_uploads import (
    PATIENCE_S,
    address,
    average,
    down,
    made,
    new_place,
    put,
    there,
    writer,
)

from pma_megatron.base.openfiles import folders_in
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE
from pma_megatron.megatron import save
from pma_megatron.online import average_upload, origin, uploads
from pma_megatron.online.average_folder import AverageFolder
from pma_megatron.online.average_upload import NotSavedError
from pma_megatron.online.removal import REMOVED
from pma_megatron.online.snapshots import name_of

__all__ = ["address", "down", "made", "new_place"]


def full(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = SimpleNamespace(total=1000, free=free)
    monkeypatch.setattr(
        average_upload, "shutil", SimpleNamespace(disk_usage=lambda _: usage, rmtree=shutil.rmtree)
    )


def test_without_room_nothing_is_removed(
    address: str, made: Path, down: Down, new_place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in the store nor on the disk; there is none, too, where nothing waits."""
    place = new_place()
    average(place, 100, made)
    place.wait(PATIENCE_S)
    with monkeypatch.context() as patch:
        full(patch, 1)
        with pytest.raises(NotSavedError):
            place.begin(name_of(100))
        assert there(address) == [100]
        down(True)
    average(place, 60, made)
    with monkeypatch.context() as patch:
        full(patch, 1)
        with pytest.raises(NotSavedError, match=name_of(60)):
            place.begin(name_of(100))
    place.wait(0)
    down(False)
    place.begin(name_of(100))
    place.wait(PATIENCE_S)
    assert there(address) == [60, 100]


def test_what_got_there_is_removed_under_another_name(
    address: str, new_place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that no save takes the rest of a tag for one of the run; the next job removes it."""
    place = new_place()
    with monkeypatch.context() as patch:
        patch.setattr(average_upload.shutil, "rmtree", lambda *_, **__: None)  # as if killed
        place.begin("mine")
        tag(place.folder / "mine", 1.0)
        place.saved("mine")
        place.wait(PATIENCE_S)
        (left,) = place.folder.glob(f"{REMOVED}*")
        (left / MARKER_FILE).unlink()
        AverageFolder(place.folder).prepare()
    place = new_place()
    assert not folders_in(place.folder)


def test_what_an_earlier_release_left_of_a_tag_is_removed(address: str, new_place: Places) -> None:
    folder = tag(new_place().folder / "mine", 1.0)
    (folder / MARKER_FILE).unlink()
    new_place()
    assert not folder.exists()


def test_a_deletion_of_snapshots_that_was_cut_off_is_ended(address: str) -> None:
    rest = writer(address).root / f"{REMOVED}{name_of(50)}-1-1"
    (rest / "below").mkdir(parents=True)
    writer(address)
    assert not rest.exists()


@pytest.mark.parametrize("what", ["entry", "average"])
def test_a_disk_that_fails_ends_no_training(
    address: str,
    made: Path,
    down: Down,
    new_place: Places,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    """What cannot be removed is not put there after all; no average is saved over another one."""

    def refused(folder: Path) -> Path:
        raise OSError(5, "the disk fails", str(folder))

    entries, place = writer(address, keeps_whole=True), new_place()
    down(True)
    if what == "entry":
        put(entries, 50)
    else:
        average(place, 50, made)
    entries.wait_for_uploads(PATIENCE_S)
    place.wait(PATIENCE_S)
    with monkeypatch.context() as patch:
        patch.setattr(uploads, "hide", refused)
        if what == "entry":
            entries.give_up({50})
        else:
            with pytest.raises(NotSavedError, match="cannot be removed"):
                place.begin(name_of(50))
    down(False)
    entries.wait_for_uploads(PATIENCE_S)
    place.wait(PATIENCE_S)
    assert not any(key.endswith(MARKER_FILE) for key in versions(address))
    shutil.rmtree(entries.root)


def test_an_average_that_somebody_else_removed_is_forgotten(
    address: str, made: Path, down: Down, new_place: Places, caplog: pytest.LogCaptureFixture
) -> None:
    """Two jobs on one disk, or a person who did what the warning says."""
    down(True)
    first = new_place()
    average(first, 100, made)
    first.wait(PATIENCE_S)
    second = new_place()
    second.wait(PATIENCE_S)
    down(False)
    first.wait(PATIENCE_S)
    caplog.clear()
    second.begin(name_of(60))
    second.wait(PATIENCE_S)
    assert there(address) == [100] and not caplog.records


def test_what_is_not_marked_as_an_average_is_not_put_there(
    address: str, made: Path, new_place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next job would be refused for it. The mark is tried again."""
    place = new_place()
    place.begin(name_of(50))
    folder = Path(shutil.copytree(made / name_of(50), place.folder / name_of(50)))
    for path in folder.glob(f"{MARKER_FILE}*"):
        path.unlink()
    place.saved(folder.name)
    place.wait(PATIENCE_S)
    assert versions(address) == {}

    def refused(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(save, "mark", refused)
    monkeypatch.setattr(origin, "record_sums", refused)
    monkeypatch.setattr(save, "origin_of", lambda _: {"kind": ONLINE_AVERAGE})
    save.note_origin(folder, None, place, at_exit=True)  # type: ignore[arg-type]
    place.wait(PATIENCE_S)
    assert there(address) == [50]
    new_place()


@pytest.mark.parametrize("file", [MARKER_FILE, ".metadata"])
def test_what_cannot_be_read_now_is_not_removed(
    address: str,
    made: Path,
    down: Down,
    new_place: Places,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
) -> None:
    """As if it had been cut off: the next job finds it whole."""
    down(True)
    place = new_place()
    folder = average(place, 50, made)
    place.wait(PATIENCE_S)
    down(False)
    opened = os.open

    def refused(path: str, *given: Any, **how: Any) -> int:
        if str(path).endswith(file):
            raise OSError(5, "an OST is away", path)
        return opened(path, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refused)
        new_place().wait(PATIENCE_S)
    assert folder.is_dir() and versions(address).keys() <= {f"run/{name_of(50)}/.pma-uploading"}
    new_place().wait(PATIENCE_S)
    assert there(address) == [50]
