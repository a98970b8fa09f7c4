"""How many requests a merge makes of a store: each of them takes its time, however short it is."""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from test_store_uploads import put as put_snapshot
from test_store_uploads import writer

from conftest import folder_of
from pma_megatron import MergeRequest, SelectionRequest, list_checkpoints, merge
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.merging import engine
from pma_megatron.merging.policy import Policy
from pma_megatron.storage import contents, spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import path_of
from pma_megatron.storage.protocol import IN_FLIGHT
from pma_megatron.storage.requests import Requests, When

Put = Callable[[Path, str], str]
PATIENCE_S = 100.0
OPERATIONS = ("listed", "beside", "head", "got", "read", "put", "put_file", "delete")


class Asked:
    """What was asked of stores.

    Attributes:
        calls: how often, by operation.
        reads, read_bytes, longest: ranges, by key; all bytes of them, and of the longest.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()
        self.read_bytes: Counter[str] = Counter()
        self.longest: dict[str, int] = {}
        for name in OPERATIONS:
            monkeypatch.setattr(ObjectStore, name, self._noting(name, getattr(ObjectStore, name)))

    def _noting(self, name: str, real: Any) -> Any:
        def noted(store: ObjectStore, *given: Any, **how: Any) -> Any:
            self.calls[name] += 1
            if name == "read":
                self.reads[given[0]] += 1
                self.read_bytes[given[0]] += given[2]
                self.longest[given[0]] = max(given[2], self.longest.get(given[0], 0))
            return real(store, *given, **how)

        return noted


def sizes(root: Path) -> list[int]:
    """Bytes of every file."""
    return [path.stat().st_size for path in root.rglob("*") if path.is_file()]


def asked_for(load: str, save: str, last: int = 4) -> MergeRequest:
    return MergeRequest(load=load, save=save, selection=SelectionRequest(last=last))


def test_a_merge_of_small_files_reads_each_once_and_puts_each_once(
    dense_run: Path, put: Put, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address, files = put(dense_run, "run"), sizes(dense_run)
    assert max(files) <= contents.WHOLE_BYTES
    asked = Asked(monkeypatch)
    merge(asked_for(address, f"s3://{bucket}/averages"))
    assert asked.calls["read"] <= len(files) + 1 and set(asked.reads.values()) == {1}
    made = [path for path in folder_of(dense_run, 8).iterdir() if path.is_file()]
    assert asked.calls["put_file"] <= len(made) + 2  # pma.json and its checksum
    assert asked.calls["put"] <= 2  # the sign, the tracker
    held_back, sources = 5, 4
    assert asked.calls["got"] <= held_back + 6  # whose the folder is, before each of these
    assert asked.calls["listed"] + asked.calls["beside"] <= sources + 12
    assert asked.calls["head"] <= 2 and asked.calls["delete"] <= 3


@pytest.mark.parametrize("kept", [True, False])
def test_larger_files_come_in_large_requests(
    dense_run: Path, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kept: bool
) -> None:
    """Whether all of them can be kept or not."""
    page, part = 1 << 10, 1 << 14
    address, files = put(dense_run, "run"), sizes(dense_run)
    monkeypatch.setattr(contents, "PAGE_BYTES", page)
    monkeypatch.setattr(contents, "PART_BYTES", part)
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0)
    if not kept:
        monkeypatch.setattr(spool, "_OF_EACH", 4 * part)
        monkeypatch.setattr(contents, "KEPT_BYTES", max(sum(files) // 2, 16 * part))
    asked = Asked(monkeypatch)
    merge(asked_for(address, str(tmp_path / "made")))
    least, total = sum(math.ceil(size / part) for size in files), sum(files)
    nbytes = sum(asked.read_bytes.values())
    if kept:
        assert asked.calls["read"] <= least + len(files) and nbytes <= total
    else:
        assert nbytes <= 3 * total  # what is let go too early is chance; 1.6 to 1.9 were seen


def test_checkpoints_that_are_only_listed_are_not_read_in_large_parts(
    dense_run: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contents, "PAGE_BYTES", 1 << 10)
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0)
    address, asked = put(dense_run, "run"), Asked(monkeypatch)
    assert len(list_checkpoints(address)) == 4
    there = {p.name: p.stat().st_size for p in folder_of(dense_run, 8).glob("*.distcp")}
    longest = max(size for key, size in asked.longest.items() if key.endswith(".distcp"))
    assert longest < max(there.values()) / 2


@pytest.mark.parametrize("thin", [False, True])
def test_checkpoints_are_looked_at_side_by_side(
    dense_run: Path, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, thin: bool
) -> None:
    """Each look is several questions, one after the other: the first ones of two checkpoints are
    under way together."""
    run = dense_run
    if thin:
        run = tmp_path / "run"
        to = writer(run / SNAPSHOTS)
        for iteration in (2, 4, 6):
            put_snapshot(to, iteration)
    address, read, met = put(run, "run"), ObjectStore.read, threading.Barrier(2)
    begun, lock = set[str](), threading.Lock()

    def meeting(store: ObjectStore, key: str, *given: Any) -> memoryview:
        folder = key.split("/")[-2]
        with lock:
            waits = folder.startswith("iter_") and folder not in begun and len(begun) < 2
            begun.update({folder} if waits else ())
        if waits:
            met.wait(PATIENCE_S)
        return read(store, key, *given)

    monkeypatch.setattr(ObjectStore, "read", meeting)
    found, expected = list_checkpoints(address), list_checkpoints(run)
    assert [(r.iteration, r.complete, r.consumed_samples) for r in found] == [
        (r.iteration, r.complete, r.consumed_samples) for r in expected
    ]


def test_short_questions_do_not_wait_behind_what_is_asked_ahead(
    dense_run: Path, put: Put, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the newest source all is asked for while the merge is planned, of the others when it has
    looked where it may write; at a server that answers one after the other that is a second."""
    address, said = put(dense_run, "run"), list[set[str]]()
    listed, expect = ObjectStore.listed, contents.Contents.expect

    def looking(store: ObjectStore, prefix: str) -> Any:
        if prefix.endswith("averages/"):
            said.append(set())
        return listed(store, prefix)

    def asking(self: contents.Contents, files: Sequence[contents.Content], *, soon: bool) -> None:
        if soon:
            said.append({each.key.split("/")[-2] for each in files})
        expect(self, files, soon=soon)

    monkeypatch.setattr(ObjectStore, "listed", looking)
    monkeypatch.setattr(contents.Contents, "expect", asking)
    policy = Policy(optimizer_state="average")
    monkeypatch.setattr(engine, "_DENSE", 0.1)  # tensors are small: their headers count
    merge(replace(asked_for(address, f"s3://{bucket}/averages"), policy=policy))
    every = {folder_of(dense_run, number).name for number in (2, 4, 6, 8)}
    assert said[:3] == [{"iter_0000008"}, set(), set()]
    assert [each for each in said[3:] if each] == [every]


def test_what_has_one_name_in_all_sources_comes_first(
    dense_run: Path, put: Put, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums wait for a part of every source: they would all come at the end otherwise."""
    address, ask, order = put(dense_run, "run"), contents.Contents._ask, list[str]()
    monkeypatch.setattr(contents, "PAGE_BYTES", 1 << 10)
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0)

    def noting(self: contents.Contents, file: contents.Content, pages: Any, when: When) -> None:
        order.extend([file.key] if pages else [])
        ask(self, file, pages, when)

    list_checkpoints(address)
    roots = [path_of(f"{address}/{folder_of(dense_run, n).name}") for n in (8, 6, 4, 2)]
    monkeypatch.setattr(contents.Contents, "_ask", noting)
    assert spool.expect(roots, soon=True)
    names = [key.split("/")[-1] for key in order]
    assert len(names) == 8 and names == sorted(names)  # two files of four


def test_what_is_asked_ahead_is_dropped_when_the_job_fails(
    dense_run: Path, put: Put, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A process that failed must not go on to fetch what nobody will read."""
    monkeypatch.setattr(contents, "PAGE_BYTES", 1 << 10)
    monkeypatch.setattr(contents, "PART_BYTES", 1 << 10)
    monkeypatch.setattr(contents, "WHOLE_BYTES", 0)
    address, expect, fetch = put(dense_run, "run"), contents.Contents.expect, contents.Content.fetch
    left, gate = list[int](), threading.Event()
    gate.set()

    def held_up(self: contents.Content, first: int, last: int) -> None:
        assert gate.wait(PATIENCE_S)
        fetch(self, first, last)

    def failing(self: contents.Contents, *given: Any, soon: bool) -> None:
        if soon:
            gate.clear()
        expect(self, *given, soon=soon)
        if soon:
            left.append(len(self._coming))
            raise CheckpointError("it is refused")

    monkeypatch.setattr(contents.Content, "fetch", held_up)
    monkeypatch.setattr(contents.Contents, "expect", failing)
    with pytest.raises(CheckpointError, match="it is refused"):
        merge(asked_for(address, str(tmp_path / "made")))
    made = spool.active()
    assert made is not None and left[0] > 2 * IN_FLIGHT
    assert len(made.contents._coming) <= IN_FLIGHT
    gate.set()
    made.contents._requests.close()
    assert len(made.contents._unread) < left[0] / 2


def test_what_is_waited_for_goes_first() -> None:
    """Though it was asked for last, or became urgent later."""
    requests, order = Requests(), list[str]()
    gates = [threading.Event() for _ in range(IN_FLIGHT)]
    begun = threading.Semaphore(0)

    def block(gate: threading.Event) -> None:
        begun.release()
        assert gate.wait(PATIENCE_S)

    blocked = [requests.ask(partial(block, gate), When.NOW) for gate in gates]
    for _ in gates:
        assert begun.acquire(timeout=PATIENCE_S)
    asked = {
        name: requests.ask(partial(order.append, name), when)
        for name, when in (("late", When.SOON), ("hurried", When.SOON), ("now", When.NOW))
    }
    requests.hurry(asked["hurried"])
    dropped = requests.ask(partial(order.append, "dropped"), When.SOON)
    gates[0].set()  # one thread for all of them
    for each in asked.values():
        each.result(PATIENCE_S)
    assert dropped.result(PATIENCE_S) is None
    assert order.index("late") > max(order.index("now"), order.index("hurried"))
    for gate in gates:
        gate.set()
    for each in blocked:
        each.result(PATIENCE_S)
    requests.close()
