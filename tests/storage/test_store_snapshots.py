"""Thin snapshots in an object store: made on a disk, put there behind training, whole or not."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_megatron_flags import parse
from test_snapshot_writer import assert_whole, simple_chunks, simple_data

from pma_megatron import list_checkpoints, verify
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PmaError, PublishError
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.formats.torch_dist.completeness import completeness
from pma_megatron.megatron import argument_parser
from pma_megatron.online import snapshot_upload
from pma_megatron.online.snapshots import SnapshotWriter
from pma_megatron.storage import spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.storage.paths import place_of, workplace
from pma_megatron.testing import run_ranks
from s3 import files_in, keys

Got = Callable[[str, Path], Path]
PATIENCE_S = 200.0
OTHER = 500
"""Added to an iteration, of which the data is then that of another branch."""


def written(
    rank: int,
    size: int,
    address: str,
    iterations: tuple[int, ...],
    keep: Any,
    trained_from: int | None = None,
    shift: int = 0,
) -> None:
    """Snapshots by this rank, until all is in the store."""
    chunks = simple_chunks(rank, size)
    writer = SnapshotWriter(
        address, chunks, torch.float32, Comm(), keep_in_store=keep, trained_from=trained_from
    )
    for iteration in iterations:
        writer.write(iteration, simple_data(chunks, iteration + shift), {})
        writer.wait(PATIENCE_S)
    writer.wait_for_uploads(PATIENCE_S)


def folders(s3: Any, bucket: str) -> set[str]:
    return {key.split("/")[1] for key in keys(s3, bucket, "snapshots/iter_")}


def files_left(spools: Path) -> list[Path]:
    return [path for path in files_in(spools) if "outputs" in path.parts]


def test_two_ranks(s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path) -> None:
    """The newest stay; what is there is whole, and nothing of it is left on the disk."""
    address = f"s3://{bucket}/snapshots"
    run_ranks(written, 2, address, (1, 2, 3), 2)
    assert folders(s3, bucket) == {"iter_0000002", "iter_0000003"}
    copy = got("snapshots", tmp_path / "copy")
    for iteration in (2, 3):
        assert_whole(copy / f"iter_{iteration:07d}", iteration)
    found = list_checkpoints(address)
    assert [(r.iteration, r.complete, r.snapshot) for r in found] == [
        (2, True, True),
        (3, True, True),
    ]
    assert files_left(spools) == []
    left = [path.name for path in (spools / "outputs").rglob("iter_*")]
    assert left == ["iter_0000003"]  # empty: rank 1 may have looked for it as late as that


def test_a_run_that_resumes_keeps_what_it_wrote(s3: Any, bucket: str, spools: Path) -> None:
    address = f"s3://{bucket}/snapshots"
    written(0, 1, address, (1, 2), None)
    before = {key: s3.head_object(Bucket=bucket, Key=key)["ETag"] for key in keys(s3, bucket)}
    written(0, 1, address, (3,), None, 2)
    after = {key: s3.head_object(Bucket=bucket, Key=key)["ETag"] for key in keys(s3, bucket)}
    assert before.items() <= after.items() and folders(s3, bucket) >= {"iter_0000003"}
    assert [ref.state for ref in list_checkpoints(address)] == ["complete"] * 3


def test_a_run_that_goes_back_writes_them_again(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of more ranks, which wrote the one before, are in nobody's way."""
    address = f"s3://{bucket}/snapshots"
    written(0, 1, address, (1, 2, 3), None)
    s3.put_object(Bucket=bucket, Key="snapshots/iter_0000002/__1_0.distcp", Body=b"of rank 1")
    with caplog.at_level(logging.WARNING):
        written(0, 1, address, (2,), None, 1, OTHER)
    assert "2, 3" in caplog.text and "given up" in caplog.text
    states = [ref.state for ref in list_checkpoints(address)]
    assert states == ["complete", "complete", "given up"]
    copy = got("snapshots", tmp_path / "copy")
    for iteration, data in ((1, 1), (2, 2 + OTHER), (3, 3)):
        assert_whole(copy / f"iter_{iteration:07d}", data)
    assert not (copy / "iter_0000002" / "__1_0.distcp").exists()
    assert files_left(spools) == []


def test_a_process_that_goes_back_writes_them_again(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path
) -> None:
    """The one that it wrote last too, whose empty folder is still on the disk."""
    chunks = simple_chunks(0, 1)
    writer = SnapshotWriter(f"s3://{bucket}/snapshots", chunks, torch.float32, Comm())
    for number, iteration in enumerate((1, 2, 2, 1)):
        writer.write(iteration, simple_data(chunks, iteration + number * OTHER), {})
        writer.wait(PATIENCE_S)
        assert writer._uploads is not None
        writer._uploads.wait(PATIENCE_S)
    writer.wait_for_uploads(PATIENCE_S)
    copy = got("snapshots", tmp_path / "copy")
    assert_whole(copy / "iter_0000001", 1 + 3 * OTHER)
    assert_whole(copy / "iter_0000002", 2 + 2 * OTHER)
    assert files_left(spools) == []


def test_keep_never_deletes_what_this_branch_wrote(s3: Any, bucket: str, spools: Path) -> None:
    address = f"s3://{bucket}/snapshots"
    written(0, 1, address, (30, 100, 200), 3)
    written(0, 1, address, (50,), 2, 40)
    assert folders(s3, bucket) == {f"iter_{i:07d}" for i in (30, 50, 100, 200)}
    written(0, 1, address, (60, 110), 2, 50)
    assert folders(s3, bucket) == {f"iter_{i:07d}" for i in (60, 110, 200)}


def test_what_is_no_snapshot_is_not_replaced(
    s3: Any, bucket: str, spools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    key = "snapshots/iter_0000002/common.pt"
    s3.put_object(Bucket=bucket, Key=key, Body=b"of a checkpoint")
    with caplog.at_level(logging.WARNING):
        written(0, 1, f"s3://{bucket}/snapshots", (1, 2), None)
    assert "nothing there says that it is one of the snapshots" in caplog.text
    assert [k for k in keys(s3, bucket) if "iter_0000002" in k] == [key]
    s3.delete_object(Bucket=bucket, Key=key)
    written(0, 1, f"s3://{bucket}/snapshots", (3,), None, 2)
    assert [r.complete for r in list_checkpoints(f"s3://{bucket}/snapshots")] == [True] * 3


@pytest.mark.parametrize("last", ["__0_0.distcp", "metadata.json"])
def test_written_again_while_it_is_put_there(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path,
    monkeypatch: pytest.MonkeyPatch, last: str,
) -> None:  # fmt: skip
    """Held up behind one of its files: what is there in the end is of the new one alone."""
    address = f"s3://{bucket}/snapshots"
    reached, goes_on = threading.Event(), threading.Event()
    put_file = ObjectStore.put_file

    def held_up(self: ObjectStore, key: str, path: Path) -> str:
        version = put_file(self, key, path)
        if key.endswith(last) and not reached.is_set():
            reached.set()
            goes_on.wait(PATIENCE_S)
        return version

    monkeypatch.setattr(ObjectStore, "put_file", held_up)
    chunks = simple_chunks(0, 1)
    writer = SnapshotWriter(address, chunks, torch.float32, Comm())
    writer.write(1, simple_data(chunks, 1), {})
    writer.wait(PATIENCE_S)
    assert reached.wait(PATIENCE_S)
    writer.write(1, simple_data(chunks, 1 + OTHER), {})
    writer.wait(PATIENCE_S)
    goes_on.set()
    writer.wait_for_uploads(PATIENCE_S)
    assert_whole(got("snapshots", tmp_path / "copy") / "iter_0000001", 1 + OTHER)
    assert [ref.state for ref in list_checkpoints(address)] == ["complete"]
    verify(f"{address}/iter_0000001")
    assert files_left(spools) == []


def test_a_bucket_of_its_own(s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path) -> None:
    """The bucket itself is a folder too."""
    address = f"s3://{bucket}"
    written(0, 1, address, (1, 2, 3), 2)
    assert {key.split("/")[0] for key in keys(s3, bucket)} == {"iter_0000002", "iter_0000003"}
    assert [(r.iteration, r.state) for r in list_checkpoints(address)] == [
        (2, "complete"),
        (3, "complete"),
    ]
    for iteration in (2, 3):
        folder = got(f"iter_{iteration:07d}", tmp_path / str(iteration))
        assert_whole(folder, iteration)
    assert files_left(spools) == []
    s3.put_object(Bucket=bucket, Key="latest_checkpointed_iteration.txt", Body=b"8")
    with pytest.raises(PublishError, match="a trainer's own folder"):
        written(0, 1, address, (4,), None)


def test_a_store_that_fails_stops_nobody(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It is said, the files stay, and the next job there takes them along."""
    address = f"s3://{bucket}/snapshots"

    def fails(self: ObjectStore, key: str, path: Path) -> str:
        raise OSError(5, "the store is away", key)

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(ObjectStore, "put_file", fails)
        written(0, 1, address, (1, 2), None)
    assert "the store is away" in caplog.text and "did not get there" in caplog.text
    assert not any(ref.complete for ref in list_checkpoints(address))
    root = spools / "outputs" / "s3" / bucket / "snapshots"
    for iteration in (1, 2):
        assert_whole(root / f"iter_{iteration:07d}", iteration)
    written(0, 1, address, (3,), None)
    copy = got("snapshots", tmp_path / "copy")
    for iteration in (1, 2, 3):
        assert_whole(copy / f"iter_{iteration:07d}", iteration)
    assert files_left(spools) == []


def test_a_store_that_fails_does_not_fill_the_disk(
    s3: Any, bucket: str, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snapshots that wait leave room; once they are in the store, it goes on."""
    address = f"s3://{bucket}/snapshots"
    chunks = simple_chunks(0, 1)

    def fails(self: ObjectStore, key: str, path: Path) -> str:
        raise OSError(5, "the store is away", key)

    def nearly_full(folder: Path) -> Any:
        return SimpleNamespace(total=1000, used=850, free=150)

    monkeypatch.setattr(snapshot_upload.shutil, "disk_usage", nearly_full)
    writer = SnapshotWriter(address, chunks, torch.float32, Comm())
    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "put_file", fails)
        writer.write(1, simple_data(chunks, 1), {})
        writer.wait(PATIENCE_S)
        writer.write(2, simple_data(chunks, 2), {})
        with pytest.raises(PublishError, match=r"1 snapshots wait.*0 B would be free"):
            writer.wait(PATIENCE_S)
        writer.wait_for_uploads(PATIENCE_S)
    written(0, 1, address, (), None)
    written(0, 1, address, (3,), None, 2)
    assert [ref.iteration for ref in list_checkpoints(address)] == [1, 3]


@pytest.mark.parametrize(
    ("total", "free", "refused"),
    [
        (10**6, 10**5 + 10**4, False),
        (10**6, 10**5 + 10**4 - 1, True),  # a tenth of a small disk stays free
        (10**15, 11 * 10**4, False),
        (0, 0, False),  # it tells nothing
        (10**15, 11 * 10**4 - 1, True),  # ten snapshots' room on a large one that is always full
    ],
)
def test_how_much_of_a_disk_is_left_free(
    total: int, free: int, refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(total=total, free=free)
    monkeypatch.setattr(snapshot_upload, "shutil", SimpleNamespace(disk_usage=lambda _: usage))
    snapshot_upload.refuse_full(tmp_path, 10**4)  # nothing waits
    waits = tmp_path / "iter_0000010"
    waits.mkdir()
    (waits / ".metadata").touch()
    with pytest.raises(PublishError, match="iter_0000010") if refused else nullcontext():
        snapshot_upload.refuse_full(tmp_path, 10**4)


def test_what_is_not_in_the_store_is_never_removed_from_the_disk(
    s3: Any, bucket: str, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it cannot be read for a moment, and looks incomplete."""
    address = f"s3://{bucket}/snapshots"

    def fails(self: ObjectStore, key: str, path: Path) -> str:
        raise OSError(5, "the store is away", key)

    def unreadable(folder: Path) -> Any:
        return completeness(folder) if folder.name != "iter_0000001" else "cannot be read"

    with monkeypatch.context() as patched:
        patched.setattr(ObjectStore, "put_file", fails)
        written(0, 1, address, (1,), None)
        patched.setattr(snapshot_upload, "completeness", unreadable)
        written(0, 1, address, (2, 3), None)
    root = spools / "outputs" / "s3" / bucket / "snapshots"
    assert_whole(root / "iter_0000001", 1)
    written(0, 1, address, (4,), None)
    assert [ref.complete for ref in list_checkpoints(address)] == [True] * 4
    assert files_left(spools) == []


_AT_EXIT = """
import atexit, sys, torch
from pma_megatron.base.comm import Comm
from pma_megatron.online.snapshots import SnapshotWriter
from test_snapshot_writer import simple_chunks, simple_data
chunks = simple_chunks(0, 1)
writer = SnapshotWriter(sys.argv[1], chunks, torch.float32, Comm(), keep_in_store=1)
def end():
    writer.wait(120)
    writer.wait_for_uploads(120)
atexit.register(end)
for iteration in (1, 2, 3):
    writer.wait(120)
    writer.write(iteration, simple_data(chunks, iteration), {})
"""


def test_the_last_one_goes_there_as_the_job_ends(s3: Any, bucket: str, spools: Path) -> None:
    address = f"s3://{bucket}/snapshots"
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _AT_EXIT, address],
        env=env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "failed" not in done.stderr and "did not get" not in done.stderr
    assert folders(s3, bucket) == {"iter_0000003"}
    assert [ref.complete for ref in list_checkpoints(address)] == [True]


_JOB = """
import sys
from test_store_snapshots import written
written(0, 1, sys.argv[1], (1,), None)
"""


@pytest.mark.parametrize("stage", ["snapshot-part", "snapshot-put"])
def test_killed_while_it_uploads(
    s3: Any, bucket: str, got: Got, tmp_path: Path, stage: str, spools: Path
) -> None:
    address = f"s3://{bucket}/snapshots"
    env = {
        **os.environ,
        "PMA_MEGATRON_FAULT": f"{stage}:0:kill",
        "PYTHONPATH": os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-c", _JOB, address], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    listed = [ref.complete for ref in list_checkpoints(address)]
    assert listed == [stage == "snapshot-put"]
    assert any(key.endswith(UPLOADING_FILE) for key in keys(s3, bucket)) != listed[0]
    written(0, 1, address, (2,), None)
    copy = got("snapshots", tmp_path / "copy")
    for iteration in (1, 2):
        assert_whole(copy / f"iter_{iteration:07d}", iteration)
    assert files_left(spools) == []


def each_its_own(rank: int, size: int, address: str, spools: str) -> str:
    """Ranks of two nodes, each with a folder of its own where the other has one too."""
    os.environ[spool.VARIABLE] = f"{spools}/node-{rank}"
    spool.forget()
    workplace(place_of(address)).mkdir(parents=True)
    try:
        SnapshotWriter(address, simple_chunks(rank, size), torch.float32, Comm())
    except PmaError as error:
        return str(error)
    return "taken"


def test_folders_of_single_nodes_are_refused(s3: Any, bucket: str, tmp_path: Path) -> None:
    address = f"s3://{bucket}/snapshots"
    said = run_ranks(each_its_own, 2, address, str(tmp_path / "nodes"))
    assert all("need a folder that all ranks share" in each for each in said)


def test_a_trainers_own_folder_is_refused(s3: Any, bucket: str, spools: Path) -> None:
    key = "run/latest_checkpointed_iteration.txt"
    s3.put_object(Bucket=bucket, Key=key, Body=b"8")
    with pytest.raises(PublishError, match="a trainer's own folder"):
        written(0, 1, f"s3://{bucket}/run", (1,), None)
    with pytest.raises(PublishError, match="cannot go to"):
        written(0, 1, "s3://no-such-bucket-here/run", (1,), None)
    assert keys(s3, bucket) == [key]


def test_megatrons_flags_take_it() -> None:
    args = parse("--pma-snapshot-interval-tokens 8 --pma-snapshot-dir s3://b/snapshots")
    assert argument_parser.settings(args).snapshot_dir == "s3://b/snapshots"
