"""What every object store must do: subclass `StoreConformance`, and give it an empty store."""

from __future__ import annotations

import errno
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pma_megatron.storage.protocol import PART_BYTES, Store


class StoreConformance:
    """Tests of one kind of store.

    A subclass has a fixture `store`: an empty `Store`, a new one for each test.
    """

    def test_what_was_put_is_listed_and_read(self, store: Store) -> None:
        before_ns = time.time_ns()
        store.put("run/iter_1/a", b"hello")
        store.put("run/iter_10/b", b"")
        store.put("run/latest", b"10")
        store.put("running", b"no part of run/")
        found = store.listed("run/")
        assert [(each.key, each.nbytes) for each in found] == [
            ("run/iter_1/a", 5),
            ("run/iter_10/b", 0),
            ("run/latest", 2),
        ]
        assert [each.key for each in store.listed("run/iter_1/")] == ["run/iter_1/a"]
        assert len(store.listed("")) == 4
        assert store.listed("nothing/") == []
        assert before_ns - 60e9 < found[0].modified_ns < time.time_ns() + 60e9
        assert store.head("run/iter_1/a") == found[0]
        assert store.got("run/iter_1/a") == (found[0], b"hello")
        assert store.got("run/iter_10/b") == (found[1], b"")

    def test_beside_is_what_lies_directly_there(self, store: Store) -> None:
        for key in ("top", "run/latest", "run/iter_1/a"):
            store.put(key, b"x")
        assert [each.key for each in store.beside("run/")] == ["run/latest"]
        assert [each.key for each in store.beside("")] == ["top"]
        assert store.beside("nothing/") == []

    def test_folders_are_what_lies_one_below(self, store: Store) -> None:
        for key in ("top", "run/latest", "run/iter_1/a", "run/iter_2/b/c", "run-pma/x"):
            store.put(key, b"x")
        assert store.folders("run/") == ["iter_1", "iter_2"]
        assert store.folders("") == ["run", "run-pma"]
        assert store.folders("nothing/") == []

    def test_ranges(self, store: Store) -> None:
        data = os.urandom(1000)
        store.put("a", data)
        for start, nbytes in ((0, 1000), (0, 1), (999, 1), (17, 400), (990, 100)):
            assert bytes(store.read("a", start, nbytes)) == data[start : start + nbytes]

    def test_ranges_by_many_threads(self, store: Store) -> None:
        data = os.urandom(1 << 20)
        store.put("a", data)
        with ThreadPoolExecutor(8) as pool:
            parts = pool.map(lambda at: bytes(store.read("a", at, 4096)), range(0, 1 << 20, 4096))
            assert b"".join(parts) == data

    def test_a_large_file_is_put_in_parts(self, store: Store, tmp_path: Path) -> None:
        path = tmp_path / "large"
        path.write_bytes(os.urandom(2 * PART_BYTES + 12345))
        store.put_file("deep/large", path)
        size = path.stat().st_size
        assert store.head("deep/large").nbytes == size
        assert bytes(store.read("deep/large", 0, size)) == path.read_bytes()
        (tmp_path / "empty").write_bytes(b"")
        store.put_file("deep/empty", tmp_path / "empty")
        assert store.head("deep/empty").nbytes == 0

    def test_another_content_has_another_version(self, store: Store) -> None:
        store.put("a", b"one")
        before = store.head("a").version
        assert before
        assert bytes(store.read("a", 0, 3, before)) == b"one"
        store.put("a", b"two")
        assert store.head("a").version != before
        assert bytes(store.read("a", 0, 3)) == b"two"
        assert self._number(store.read, "a", 0, 3, before) == errno.ESTALE

    def test_what_is_not_there(self, store: Store) -> None:
        assert self._number(store.head, "a") == errno.ENOENT
        assert self._number(store.read, "a", 0, 1) == errno.ENOENT
        assert self._number(store.got, "a") == errno.ENOENT

    def test_deleted_is_gone_and_may_be_deleted_again(self, store: Store) -> None:
        for key in ("a", "b/c", "b/d"):
            store.put(key, b"x")
        store.delete(["a", "nothing", "b/c"])
        assert [each.key for each in store.listed("")] == ["b/d"]
        store.delete(["a", "b/d"])
        store.delete([])
        assert store.listed("") == []

    @staticmethod
    def _number(call: Any, *arguments: Any) -> int | None:
        try:
            call(*arguments)
        except OSError as error:
            return error.errno
        raise AssertionError("it should have been refused")
