"""Every store does what `testing.store_conformance` says, and fails in words."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.storage import object_store
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.posix import PosixStore
from pma_megatron.storage.protocol import PART_BYTES, Store
from pma_megatron.testing.store_conformance import StoreConformance

_NUMBERS = itertools.count()


class Creates:
    """What signs of uploads need, of every store."""

    def test_what_is_there_is_not_replaced_by_one_who_creates(self, store: Store) -> None:
        store.put("sign", b"first", create=True)
        with pytest.raises(FileExistsError):
            store.put("sign", b"second", create=True)
        assert bytes(store.read("sign", 0, 5)) == b"first"
        assert [each.key for each in store.listed("")] == ["sign"]

    @pytest.mark.parametrize("nbytes", [5, 2 * PART_BYTES + 1])
    def test_the_version_of_a_file_is_the_one_that_is_listed(
        self, store: Store, tmp_path: Path, nbytes: int
    ) -> None:
        (tmp_path / "file").write_bytes(os.urandom(nbytes))
        version = store.put_file("file", tmp_path / "file")
        assert version.strip('"') == store.listed("")[0].version.strip('"') != ""


class TestPosix(Creates, StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Store:
        return PosixStore(tmp_path / "root")


class TestMemory(Creates, StoreConformance):
    @pytest.fixture
    def store(self) -> Store:
        return ObjectStore("memory", f"conformance-{next(_NUMBERS)}")


class TestS3(Creates, StoreConformance):
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


@pytest.mark.parametrize("told", [False, True], ids=["by itself", "by the environment"])
def test_a_request_that_sends_a_file_has_a_time_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: bool
) -> None:
    """Of a server that is slow to answer; what the environment says goes before."""
    over = threading.Event()

    class Slow(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            return

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            over.wait(5.0)
            with contextlib.suppress(OSError):  # nobody waits for it any more
                self.send_response(200)
                self.send_header("ETag", '"a1"')
                self.send_header("Content-Length", "0")
                self.end_headers()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(object_store, "_PATIENCE", {**object_store._PATIENCE, "max_retries": 0})
    (tmp_path / "file").write_bytes(b"x" * 100)
    try:
        assert ObjectStore("s3", "slow").put_file("run/file", tmp_path / "file") == '"a1"'
        monkeypatch.setattr(object_store, "_SENT_S", 3600.0 if told else 0.5)
        if told:
            monkeypatch.setenv("AWS_TIMEOUT", "1 second")
        with pytest.raises(OSError, match="run/file"):
            ObjectStore("s3", "slow").put_file("run/file", tmp_path / "file")
    finally:
        over.set()
        server.shutdown()
        server.server_close()
