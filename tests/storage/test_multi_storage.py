"""`msc://` addresses: profiles of the Multi-Storage Client, on a disk and on an S3 server."""

from __future__ import annotations

import atexit
import concurrent.futures.thread
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from test_snapshot_writer import until
from test_store_outputs import pma
from test_store_uploads import average, made
from test_stores import Creates

from conftest import after_first_unit, digests, folder_of, request_for
from pma_megatron import MergeRequest, SelectionRequest, list_checkpoints, merge
from pma_megatron.base import remote_paths
from pma_megatron.base.comm import Comm
from pma_megatron.cli import main
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.online.average_upload import AveragePlace
from pma_megatron.storage import addresses, multi_storage
from pma_megatron.storage.multi_storage import MultiStorage
from pma_megatron.storage.posix import PosixStore
from pma_megatron.storage.protocol import Store
from pma_megatron.testing.store_conformance import StoreConformance
from s3 import keys

__all__ = ["made"]

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
PATIENCE_S = 100.0
OWN = ("pma.json", "pma.json.sha256", "common.pt", ".metadata")
"""Files of an output that name its sources."""


@pytest.fixture
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spools: Path) -> Path:
    """A folder, and the configuration of MSC: the profile `disk` is that folder."""
    folder = tmp_path / "msc"
    folder.mkdir()
    own = {"type": "file", "options": {"base_path": str(folder)}}
    _configure(tmp_path, monkeypatch, {"disk": {"storage_provider": own}})
    return folder


@pytest.fixture
def bucket_profile(
    s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Any]:
    """The same with the profile `bucket`; returns what it says."""
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    options = {"base_path": bucket, "endpoint_url": endpoint, "region_name": "us-east-1"}
    own: dict[str, Any] = {"storage_provider": {"type": "s3", "options": options}}
    _configure(tmp_path, monkeypatch, {"bucket": own})
    return own


def _configure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profiles: dict[str, Any], **more: Any
) -> None:
    file = tmp_path / "msc.json"
    file.write_text(json.dumps({"profiles": profiles, **more}))
    monkeypatch.setenv("MSC_CONFIG", str(file))
    addresses.opened.cache_clear()


class Filled(MultiStorage):
    """Reads by MSC; what is read is put there as on any disk."""

    def __init__(self, profile: str, other: Store) -> None:
        super().__init__(profile)
        self._other = other

    def put(self, key: str, data: bytes, *, create: bool = False) -> None:
        self._other.put(key, data, create=create)

    def put_file(self, key: str, path: Path) -> str:
        return self._other.put_file(key, path)

    def delete(self, keys: Iterable[str]) -> None:
        self._other.delete(keys)


class TestDisk(StoreConformance):
    @pytest.fixture
    def store(self, profiles: Path) -> Store:
        return Filled("disk", PosixStore(profiles))


class TestS3(Creates, StoreConformance):
    @pytest.fixture
    def store(self, bucket: str, bucket_profile: dict[str, Any]) -> Store:
        return MultiStorage("bucket")


class TestBehindACache(Creates, StoreConformance):
    """What MSC kept of an object before it was replaced is not taken for what it holds."""

    @pytest.fixture
    def store(
        self,
        bucket: str,
        bucket_profile: dict[str, Any],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> Store:
        cache = {"size": "100M", "location": str(tmp_path / "cache"), "check_source_version": False}
        own = {**bucket_profile, "caching_enabled": True}
        _configure(tmp_path, monkeypatch, {"bucket": own}, cache=cache)
        return MultiStorage("bucket")


@pytest.fixture
def reads_alone(bucket_profile: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the profile `bucket` were of a kind that cannot put where nothing is (GCS, Azure)."""
    monkeypatch.setattr(multi_storage, "_CREATES", frozenset())
    addresses.opened.cache_clear()


def test_nothing_is_put_or_deleted_where_two_jobs_could_not_be_kept_apart(
    reads_alone: None, s3: Any, bucket: str, tmp_path: Path
) -> None:
    s3.put_object(Bucket=bucket, Key="a", Body=b"x")
    (tmp_path / "file").write_bytes(b"x")
    store = MultiStorage("bucket")
    for call in (
        lambda: store.put("b", b"x"),
        lambda: store.put("b", b"x", create=True),
        lambda: store.put_file("b", tmp_path / "file"),
        lambda: store.delete(["a"]),
    ):
        with pytest.raises(OSError, match="nothing would keep two jobs") as caught:
            call()
        assert caught.value.errno == errno.EROFS
    assert keys(s3, bucket) == ["a"]


def test_a_merge_into_a_profile_is_the_merge_into_a_folder(
    dense_run: Path, bucket_profile: dict[str, Any], tmp_path: Path, got: Got,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Published, verified, refused and replaced, and listed, by an address."""
    save = "msc://bucket/averages"
    words = ["merge", "--load", str(dense_run), "--save", save, "--last", "2"]
    assert main(words) == 0 and main(["verify", save]) == 0
    merge(request_for(dense_run, tmp_path / "expected"))
    made, expected = digests(got("averages", tmp_path / "copy")), digests(tmp_path / "expected")
    assert made.keys() == expected.keys()
    own = {*OWN} - {".metadata"}
    assert {Path(name).name for name in made if made[name] != expected[name]} <= own
    capsys.readouterr()
    assert main(words) == 1 and "Use --overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0 and main(["verify", save]) == 0
    assert main(["prune", str(dense_run), "--averages", save, "--keep-last", "1"]) == 0
    assert f"{save}/iter_0000008" in capsys.readouterr().out


def test_a_merge_into_a_profile_that_was_killed_is_gone_on_with(
    dense_run: Path, bucket_profile: dict[str, Any], s3: Any, bucket: str, tmp_path: Path, got: Got
) -> None:
    """It is not whole, for MSC either, until the same command has put what was missing."""
    save = "msc://bucket/averages"
    words = ("merge", "--load", str(dense_run), "--save", save, "--last", "2")
    killed = pma(1, *words, fault="part:0:kill")
    assert killed.returncode < 0 and f"averages/iter_0000008/{UPLOADING_FILE}" in keys(s3, bucket)
    assert [ref.complete for ref in list_checkpoints(save)] == [False]
    done = pma(1, *words)
    assert done.returncode == 0, done.stderr
    merge(request_for(dense_run, tmp_path / "expected"))
    expected = digests(tmp_path / "expected")
    made = digests(got("averages", tmp_path / "copy"))
    assert made.keys() == expected.keys()
    own = {*OWN} - {".metadata"}
    assert {Path(name).name for name in made if made[name] != expected[name]} <= own


def save_and_end(made: str) -> None:
    """Files are put there when Python begins no threads any more, which MSC sends parts by."""
    put_file = MultiStorage.put_file

    def late(self: MultiStorage, key: str, path: Path) -> str:
        until(lambda: bool(concurrent.futures.thread._shutdown))
        return put_file(self, key, path)

    MultiStorage.put_file = late  # type: ignore[method-assign]
    average(AveragePlace("msc://bucket/averages", Comm()), 50, Path(made))


@pytest.mark.parametrize("at_exit", [False, True])
def test_a_running_average_gets_into_a_profile(
    bucket_profile: dict[str, Any], tmp_path: Path, made: Path, s3: Any, bucket: str, at_exit: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Behind training, and as the job ends."""
    if at_exit:
        bucket_profile["storage_provider"]["options"]["multipart_threshold"] = 1024
        _configure(tmp_path, monkeypatch, {"bucket": bucket_profile})
        words = f"import {__name__} as job; job.save_and_end({str(made)!r})"
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run([sys.executable, "-c", words], check=True, env=env)
    else:
        place = AveragePlace("msc://bucket/averages", Comm())
        average(place, 50, made)
        place.wait(PATIENCE_S)
        atexit.unregister(place.wait)
    assert [ref.complete for ref in list_checkpoints("msc://bucket/averages")] == [True]
    assert "averages/latest_checkpointed_iteration.txt" in keys(s3, bucket)


def test_a_merge_from_a_profile_is_the_merge_from_a_disk(
    dense_run: Path,
    put: Put,
    bucket_profile: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put(dense_run, "runs/dense")
    address = "msc://bucket/runs/dense"
    assert main(["list", address]) == 0
    assert f"{address}: 4 checkpoints" in capsys.readouterr().out
    assert [(r.path, r.complete) for r in list_checkpoints(address)] == [
        (f"{address}/{folder_of(dense_run, n).name}", True) for n in (2, 4, 6, 8)
    ]
    merge(_request(address, tmp_path / "made"))
    merge(request_for(dense_run, tmp_path / "disk"))
    made, disk = digests(tmp_path / "made"), digests(tmp_path / "disk")
    assert made.keys() == disk.keys()
    assert {Path(name).name for name in disk if made[name] != disk[name]} <= {*OWN}
    said = json.loads((folder_of(tmp_path / "made", 8) / "pma.json").read_text())
    assert said["plan"]["sources"][0]["path"] == f"{address}/iter_0000006"


def test_a_source_that_is_overwritten_meanwhile_is_noticed(
    dense_run: Path, put: Put, s3: Any, bucket: str, bucket_profile: dict[str, Any], tmp_path: Path
) -> None:
    put(dense_run, "runs/dense")
    data = bytearray((folder_of(dense_run, 8) / "__0_0.distcp").read_bytes())
    data[-1] ^= 1

    def overwrite() -> None:
        key = "runs/dense/iter_0000008/__0_0.distcp"
        s3.put_object(Bucket=bucket, Key=key, Body=bytes(data))

    asked = _request("msc://bucket/runs/dense", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"__0_0.distcp (changed|could not be read \(it was)"):
        merge(asked, show=after_first_unit(overwrite))
    assert not (tmp_path / "out").exists()


def _request(load: str, save: Path) -> MergeRequest:
    return MergeRequest(load=load, save=str(save), selection=SelectionRequest(last=2))


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "--load", "RUN", "--save", "msc://bucket/out", "--last", "2"],
        ["merge", "--load", "RUN", "--export", "msc://bucket/out", "--last", "2"],
        ["watch", "--load", "RUN", "--save", "msc://bucket/out", "--last", "2"],
        ["export", "RUN", "--save", "msc://bucket/out"],
        ["prune", "msc://bucket/run", "--keep-last", "1", "--yes"],
    ],
)
def test_what_puts_or_deletes_is_refused_before_anything_is_read(
    dense_run: Path, reads_alone: None, s3: Any, bucket: str,
    capsys: pytest.CaptureFixture[str], words: list[str],
) -> None:  # fmt: skip
    assert main([str(dense_run) if word == "RUN" else word for word in words]) == 2
    error = capsys.readouterr().err.strip()
    assert "is read, and nothing is put there" in error and "of the type s3" in error
    assert error.count("\n") == 0
    assert keys(s3, bucket) == []


def test_what_cannot_be_read_is_one_clear_sentence(
    profiles: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for address, said in (
        ("msc://disk/nothing", "nothing is stored there"),
        ("msc://no-such-profile/run", '"no-such-profile" not found'),
        ("msc://", "names no"),
    ):
        assert main(["list", address]) in (1, 2)
        error = capsys.readouterr().err.strip()
        assert said in error and error.count("\n") == 0, error


def test_a_bucket_that_is_not_there(
    bucket_profile: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bucket_profile["storage_provider"]["options"]["base_path"] = "no-such-bucket"
    _configure(tmp_path, monkeypatch, {"bucket": bucket_profile})
    assert main(["list", "msc://bucket/run"]) == 1
    error = capsys.readouterr().err
    assert "the bucket does not exist" in error and "MSC_CONFIG" in error


def test_profiles_that_do_not_read_their_store_itself_are_refused(
    profiles: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"storage_provider": {"type": "file", "options": {"base_path": str(profiles)}}}
    copied = {**own, "replicas": [{"replica_profile": "disk", "read_priority": 1}]}
    _configure(tmp_path, monkeypatch, {"disk": own, "copied": copied})
    with pytest.raises(OSError, match="has replicas"):
        MultiStorage("copied")


def test_a_link_out_of_the_profile_is_not_passed_over(profiles: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_bytes(b"x")
    (profiles / "run").mkdir()
    (profiles / "run" / "shard").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="points outside"):
        MultiStorage("disk").listed("run/")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_paths.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'pma-megatron\[msc\]'"):
        list_checkpoints("msc://profile/run")
