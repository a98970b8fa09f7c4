"""A real S3 server on loopback, and checkpoints in it."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.merging.locks import LOCK
from pma_megatron.online import one_job
from pma_megatron.storage import addresses, spool

_NUMBERS = itertools.count()


@pytest.fixture(scope="session")
def _server() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer  # slow to import

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    server.stop()


def files_in(folder: Path) -> list[Path]:
    """All files below a folder, but locks: a process that is killed leaves them."""
    found = folder.rglob("*") if folder.is_dir() else ()
    return [path for path in found if path.is_file() and not path.name.startswith(LOCK)]


@pytest.fixture
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where spools are made in the test, which must leave none."""
    folder = tmp_path / "spools"
    monkeypatch.setenv(spool.VARIABLE, str(folder))
    spool.forget()
    yield folder
    spool.forget()
    one_job.let_go()  # as the end of a process does
    assert files_in(folder) == []


@pytest.fixture
def s3(_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, spools: Path) -> Any:
    """A client of the server, by a library that the package does not use."""
    import boto3

    for name, value in _server.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3", endpoint_url=_server["AWS_ENDPOINT_URL"])
    addresses.opened.cache_clear()
    return client


@pytest.fixture
def bucket(s3: Any) -> str:
    """A bucket of the test's own."""
    name = f"bucket-{next(_NUMBERS)}"
    s3.create_bucket(Bucket=name)
    return name


@pytest.fixture
def put(s3: Any, bucket: str) -> Callable[[Path, str], str]:
    """Copies a folder to a key of the bucket; returns its address."""

    def copied(folder: Path, key: str) -> str:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                name = f"{key}/{path.relative_to(folder).as_posix()}"
                s3.upload_file(str(path), bucket, name)
        return f"s3://{bucket}/{key}"

    return copied


@pytest.fixture
def got(s3: Any, bucket: str) -> Callable[[str, Path], Path]:
    """Copies what lies under a key of the bucket to a folder."""

    def copied(key: str, folder: Path) -> Path:
        for name in keys(s3, bucket, f"{key}/"):
            path = folder / name.removeprefix(f"{key}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            s3.download_file(bucket, name, str(path))
        return folder

    return copied


def keys(s3: Any, bucket: str, prefix: str = "") -> list[str]:
    """All keys of a bucket."""
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    return [each["Key"] for page in pages for each in page.get("Contents", ())]


def environment() -> dict[str, str]:
    """For commands of their own."""
    return {**os.environ}
