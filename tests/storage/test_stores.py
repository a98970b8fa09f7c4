"""Every store does what `testing.store_conformance` says, and fails in words."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.posix import PosixStore
from pma_megatron.storage.protocol import Store
from pma_megatron.testing.store_conformance import StoreConformance

_NUMBERS = itertools.count()


class TestPosix(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return PosixStore(tmp_path / "root")


class TestMemory(StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return ObjectStore("memory", f"conformance-{next(_NUMBERS)}")


class TestS3(StoreConformance):
    @pytest.fixture
    def store(self, bucket: str) -> Store:
        return ObjectStore("s3", bucket)


def test_two_that_open_one_memory_store_see_the_same() -> None:
    ObjectStore("memory", "shared").put("a", b"x")
    assert [each.key for each in ObjectStore("memory", "shared").listed("")] == ["a"]


def test_a_bucket_that_is_not_there(s3: Any) -> None:
    for call in (lambda store: store.listed(""), lambda store: store.put("a", b"")):
        with pytest.raises(FileNotFoundError, match="the bucket does not exist"):
            call(ObjectStore("s3", "no-such-bucket"))


def test_no_credentials(s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    with pytest.raises(OSError, match="AccessKeyId"):
        ObjectStore("s3", bucket).listed("")
