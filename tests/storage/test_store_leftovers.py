"""What an earlier job left on a disk for a store, and what is there already."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_store_uploads import (
    PATIENCE_S,
    TRACKER,
    address,
    average,
    down,
    made,
    new_place,
    put,
    there,
    tracker,
    writer,
)

from pma_megatron.formats import marker
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE
from pma_megatron.online.average_upload import AveragePlace
from pma_megatron.online.removal import ASIDE
from pma_megatron.online.snapshots import name_of
from pma_megatron.storage import spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import place_of, stored

__all__ = ["address", "down", "made", "new_place"]

Places = Callable[[], AveragePlace]
Down = Callable[[bool], None]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spools: Path) -> Callable[[str], Path]:
    """What follows runs on that node, with a disk of its own."""

    def on(name: str) -> Path:
        spool.forget()
        monkeypatch.setenv(spool.VARIABLE, str(tmp_path / name))
        return tmp_path / name

    return on


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Minutes: every look at the time is one later, for what is written here."""
    minutes = itertools.count()

    def now(zone: timezone) -> datetime:
        return datetime(2026, 1, 1, tzinfo=zone) + timedelta(minutes=next(minutes))

    monkeypatch.setattr(marker, "datetime", SimpleNamespace(now=now))
    return minutes


def created(at: Iterator[int]) -> str:
    """What an average says that is saved now."""
    return f"2026-01-01T00:{next(at):02d}:00+00:00"


def versions(address: str) -> dict[str, str]:
    store, key = stored(place_of(address))
    return {each.key: each.version for each in store.listed(f"{key}/")}


def aside(disk: Path) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in disk.rglob(f"{ASIDE}/*"))


@pytest.mark.parametrize("keeps_whole", [False, True], ids=["snapshots", "window"])
def test_a_leftover_replaces_nothing_newer(
    address: str, down: Down, node: Callable[[str], Path], keeps_whole: bool
) -> None:
    """Nor does one of a branch that was given up come between those of the run."""
    disk = node("a")
    first = writer(address, keeps_whole=keeps_whole)
    put(first, 40)
    first.wait_for_uploads(PATIENCE_S)
    down(True)
    for iteration in (50, 55):
        put(first, iteration)
    first.wait_for_uploads(PATIENCE_S)
    down(False)
    node("b")
    second = writer(address, keeps_whole=keeps_whole)
    for iteration in (50, 60):
        put(second, iteration)
    second.wait_for_uploads(PATIENCE_S)
    before = versions(address)
    node("a")
    writer(address, keeps_whole=keeps_whole).wait_for_uploads(PATIENCE_S)
    assert versions(address) == before and there(address) == [40, 50, 60]
    assert aside(disk) == [name_of(50), name_of(55)]


def test_a_leftover_that_is_newer_gets_there(address: str, down: Down) -> None:
    """The run went back and came by again, and the store was away by then."""
    first = writer(address, keeps_whole=True)
    put(first, 50)
    first.wait_for_uploads(PATIENCE_S)
    before = versions(address)
    down(True)
    again = writer(address, trained_from=40)
    put(again, 50)
    again.wait_for_uploads(PATIENCE_S)
    down(False)
    writer(address, trained_from=40).wait_for_uploads(PATIENCE_S)
    assert there(address) == [50]
    assert not {*versions(address).items()} & {*before.items()}


def test_an_average_that_was_left_takes_the_place_of_none_that_is_newer(
    address: str,
    made: Path,
    down: Down,
    node: Callable[[str], Path],
    new_place: Places,
    clock: Iterator[int],
) -> None:
    disk = node("a")
    down(True)
    first = new_place()
    for iteration in (50, 100):
        average(first, iteration, made, created=created(clock))
    first.wait(PATIENCE_S)
    down(False)
    node("b")
    second = new_place()
    for iteration in (50, 60):
        average(second, iteration, made, created=created(clock))
    second.wait(PATIENCE_S)
    before = versions(address)
    node("a")
    new_place().wait(PATIENCE_S)
    assert versions(address) == before and there(address) == [50, 60]
    assert tracker(address) == b"60" and aside(disk) == [name_of(50), name_of(100)]


@pytest.mark.parametrize("named", ["older", "missing", "none"])
def test_the_tracker_follows_a_leftover_only_where_it_is_newer(
    address: str, made: Path, down: Down, new_place: Places, clock: Iterator[int], named: str
) -> None:
    """Its number may be less than that of the one named; where nothing is named, as in a place that
    a new run has all to itself, nothing is."""
    first = new_place()
    average(first, 100, made, created=created(clock))
    first.wait(PATIENCE_S)
    down(True)
    average(first, 60, made, created=created(clock))
    first.wait(PATIENCE_S)
    down(False)
    store, key = stored(place_of(address))
    if named == "missing":
        store.delete(each.key for each in store.listed(f"{key}/{name_of(100)}/"))
    if named == "none":
        store.delete([each.key for each in store.listed(f"{key}/")])
    new_place().wait(PATIENCE_S)
    assert there(address) == ([60, 100] if named == "older" else [60])
    if named == "none":
        assert f"{key}/{TRACKER}" not in versions(address)
    else:
        assert tracker(address) == b"60"


def test_the_tracker_alone_is_put_again(
    address: str,
    made: Path,
    new_place: Places,
    monkeypatch: pytest.MonkeyPatch,
    clock: Iterator[int],
) -> None:
    """What is there whole is not deleted because something after it failed."""
    put_file, put_small, files, fails = ObjectStore.put_file, ObjectStore.put, list[str](), [True]

    def counted(self: ObjectStore, key: str, path: Path) -> str:
        files.append(key)
        return put_file(self, key, path)

    def refused_once(self: ObjectStore, key: str, data: bytes, **how: bool) -> None:
        if key.endswith(TRACKER) and fails:
            fails.pop()
            raise OSError(5, "busy")
        put_small(self, key, data, **how)

    monkeypatch.setattr(ObjectStore, "put_file", counted)
    monkeypatch.setattr(ObjectStore, "put", refused_once)
    place = new_place()
    average(place, 100, made, created=created(clock))
    place.wait(PATIENCE_S)
    place.wait(PATIENCE_S)
    assert tracker(address) == b"100" and there(address) == [100]
    assert len(files) == len({*files})


def test_another_object_of_the_same_length_is_noticed(
    address: str, made: Path, new_place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_file = ObjectStore.put_file

    def twice(self: ObjectStore, key: str, path: Path) -> str:
        version = put_file(self, key, path)
        self.put(key, bytes(path.stat().st_size))
        return version

    place = new_place()
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", twice)
        average(place, 100, made)
        place.wait(PATIENCE_S)
        assert there(address) == []
    place.wait(PATIENCE_S)
    assert there(address) == [100]


def tag(folder: Path, value: float) -> Path:
    """A tag of DeepSpeed that holds an average."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(3):
        name = f"bf16_zero_pp_rank_{number}_mp_rank_00_optim_states.pt"
        torch.save(torch.full((4 + 100 * number,), value), folder / name)
    torch.save(torch.full((1,), value), folder / "mp_rank_00_model_states.pt")
    (folder / MARKER_FILE).write_text(json.dumps({"kind": ONLINE_AVERAGE, "value": value}))
    return folder


def test_a_tag_that_is_replaced_is_not_whole_before_the_new_one_is(
    address: str, new_place: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files have the names of the old ones, and all of them together make it whole."""
    place, put_file, seen = new_place(), ObjectStore.put_file, list[set[str]]()
    names = {path.name for path in tag(place.folder / "mine", 1.0).iterdir()}
    place.saved("mine")
    place.wait(PATIENCE_S)

    def looked(self: ObjectStore, key: str, path: Path) -> str:
        seen.append({each.key.rpartition("/")[2] for each in self.listed(key.rpartition("/")[0])})
        return put_file(self, key, path)

    monkeypatch.setattr(ObjectStore, "put_file", looked)
    place.begin("mine")
    tag(place.folder / "mine", 2.0)
    place.saved("mine")
    place.wait(PATIENCE_S)
    shards = {name for name in names if name.endswith(".pt")}
    tags = [each for each in seen if each & names]
    assert tags and not any(shards <= each for each in tags)
