"""`pma prune` in an object store: objects go, markers first, and nothing that a run still needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from conftest import folder_of
from pma_megatron import (
    MergeRequest,
    PruneRequest,
    SelectionRequest,
    list_checkpoints,
    merge,
    prune,
)
from pma_megatron.cli import main
from pma_megatron.errors import SelectionError
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.retention import decision, pruning, signs
from pma_megatron.retention.signs import delete as delete_objects
from pma_megatron.storage import claims
from pma_megatron.storage.object_store import ObjectStore
from s3 import keys

Put = Callable[[Path, str], str]
TRACKER = "latest_checkpointed_iteration.txt"
RUN = "runs/dense"


@pytest.fixture
def address(dense_run: Path, put: Put) -> str:
    return put(dense_run, RUN)


def rows(address: str, **rules: Any) -> dict[int | None, str]:
    found = prune(PruneRequest(root=address, **rules)).rows
    return {row.ref.iteration: "; ".join(row.kept) for row in found}


def deleted(address: str, **rules: Any) -> list[int | None]:
    report = prune(PruneRequest(root=address, **rules), delete=True)
    return [row.ref.iteration for row in report.rows if row.deleted]


def there(s3: Any, bucket: str) -> dict[str, str]:
    """Keys of the bucket, and what tells their objects."""
    return {key: s3.head_object(Bucket=bucket, Key=key)["ETag"] for key in keys(s3, bucket)}


def killed(stage: str, *words: str) -> None:
    """A command of its own, which a fault kills."""
    command = [sys.executable, "-m", "pma_megatron", *words]
    env = {**os.environ, "PMA_MEGATRON_FAULT": f"{stage}:0:kill"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr


def test_first_dry_then_for_good(
    address: str, dense_run: Path, s3: Any, bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = there(s3, bucket)
    words = ["prune", address, "--keep-window", "last=2,interval-iterations=2", "--keep-last", "1"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["may_go"] for row in found["checkpoints"]] == [True, True, False, False]
    sizes = [sum(p.stat().st_size for p in folder_of(dense_run, i).iterdir()) for i in (2, 4, 6, 8)]
    assert [row["bytes"] for row in found["checkpoints"]] == sizes
    assert any("no store has locks" in note for note in found["notes"])
    assert there(s3, bucket) == before

    assert main([*words, "--yes"]) == 0
    assert "deleted 2 of 4 checkpoints" in capsys.readouterr().out
    gone = (f"{RUN}/iter_0000002/", f"{RUN}/iter_0000004/")
    assert there(s3, bucket) == {k: v for k, v in before.items() if not k.startswith(gone)}
    assert [ref.iteration for ref in list_checkpoints(address)] == [6, 8]
    assert main([*words, "--yes"]) == 0


def test_what_training_resumes_from_stays(
    address: str, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tracker goes back to another one once it is decided, and before anything is deleted."""

    def resumes_at(iteration: int) -> None:
        s3.put_object(Bucket=bucket, Key=f"{RUN}/{TRACKER}", Body=str(iteration).encode())

    def moved_before(folder: Path, seen: signs.Moment) -> list[str]:
        resumes_at(4)
        return delete_objects(folder, seen)

    before = there(s3, bucket)
    monkeypatch.setattr(pruning, "delete_objects", moved_before)
    assert deleted(address, keep_last=1) == []
    assert set(before) == set(keys(s3, bucket))
    assert TRACKER in rows(address, keep_last=1)[4]


def test_a_checkpoint_that_is_written_again_stays(
    address: str, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One object of it is another by the time that the folder is signed."""

    def written(folder: Path, seen: signs.Moment) -> list[str]:
        if folder.name == "iter_0000002":
            s3.put_object(Bucket=bucket, Key=f"{RUN}/{folder.name}/common.pt", Body=b"anew")
        return delete_objects(folder, seen)

    before = set(keys(s3, bucket))
    monkeypatch.setattr(pruning, "delete_objects", written)
    assert deleted(address, keep_last=2) == [4]
    assert {key for key in before if "/iter_0000002/" in key} <= set(keys(s3, bucket))


def test_the_sign_of_an_upload_is_never_made_that_of_a_deletion(
    address: str, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes after the look, of a job that is gone: what it says must stay for its command."""
    sign = f"{RUN}/iter_0000002/{UPLOADING_FILE}"
    said = json.dumps({"by": "process 1 on elsewhere", "process": "x 1 1 1", "token": "its own"})

    def written(folder: Path, seen: signs.Moment) -> list[str]:
        if folder.name == "iter_0000002":
            s3.put_object(Bucket=bucket, Key=sign, Body=said.encode())
            monkeypatch.setattr(claims, "FRESH_S", 0.0)
        return delete_objects(folder, seen)

    before = set(keys(s3, bucket))
    monkeypatch.setattr(pruning, "delete_objects", written)
    assert 2 not in deleted(address, keep_last=1)
    assert {key for key in before if "/iter_0000002/" in key} <= set(keys(s3, bucket))
    assert s3.get_object(Bucket=bucket, Key=sign)["Body"].read() == said.encode()


@pytest.mark.parametrize("stage", ["prune", "signed", "unmarked", "pruned"])
def test_killed_at_any_moment(
    address: str, s3: Any, bucket: str, stage: str, dense_run: Path
) -> None:
    """What is deleted in part is whole for nobody; the next one finishes, but for new things."""
    request = PruneRequest(root=address, keep_last=3)
    killed(stage, "prune", address, "--keep-last", "3", "--yes")
    own = {key.rpartition("/")[2] for key in keys(s3, bucket) if "/iter_0000002/" in key}
    whole = {path.name for path in folder_of(dense_run, 2).iterdir()}
    listed = {ref.iteration: ref.complete for ref in list_checkpoints(address)}
    assert [listed.get(i) for i in (4, 6, 8)] == [True] * 3
    if stage == "prune":
        assert own == whole and listed[2]
    else:
        assert UPLOADING_FILE in own and not listed.get(2)
        assert (own >= whole) == (stage == "signed")
        assert stage == "signed" or not own & {".metadata", "metadata.json"}
        assert list(prune(request).leftovers) == [f"{address}/iter_0000002"]
    new = f"{RUN}/iter_0000002/written-since"
    s3.put_object(Bucket=bucket, Key=new, Body=b"x")
    assert prune(request, delete=True).leftovers == ()
    left = [key for key in keys(s3, bucket) if "/iter_0000002/" in key]
    assert left == ([] if stage == "prune" else [new])


def test_a_deletion_that_training_came_back_to_is_not_finished(
    address: str, s3: Any, bucket: str
) -> None:
    request = PruneRequest(root=address, keep_last=3)
    killed("signed", "prune", address, "--keep-last", "3", "--yes")
    s3.put_object(Bucket=bucket, Key=f"{RUN}/{TRACKER}", Body=b"2")
    before = there(s3, bucket)
    with pytest.raises(SelectionError, match="training resumes from by now"):
        prune(request, delete=True)
    assert there(s3, bucket) == before


def test_where_a_job_uploads_nothing_goes(
    address: str, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An upload that is at work beside the run, one that was cut off, and one elsewhere."""
    save = f"s3://{bucket}/runs/dense-pma"
    request = MergeRequest(load=address, save=save, selection=SelectionRequest(last=2))
    killed("upload_marker", "merge", "--load", address, "--save", save, "--last", "2")
    found = rows(address, keep_last=1)
    assert all("uploads there now" in found[i] for i in (2, 4, 6))
    assert deleted(address, keep_last=1) == []
    monkeypatch.setattr(claims, "FRESH_S", 0.0)
    monkeypatch.setattr(signs, "FRESH_S", 0.0)
    assert "cut off" in rows(address, keep_last=1)[2]
    merge(request)
    assert deleted(address, keep_last=1, keep_iterations=(6,)) == [2, 4]
    assert deleted(save, keep_last=1) == []


def test_the_sources_of_a_merge_at_work_on_this_machine_stay(address: str, bucket: str) -> None:
    """It is made on a disk here, and has put nothing into the store yet."""
    save = f"s3://{bucket}/elsewhere/averages"
    request = MergeRequest(load=address, save=save, selection=SelectionRequest(iterations=(2, 4)))
    words = ("merge", "--load", address, "--save", save, "--iterations", "2", "4")
    killed("sync", *words)
    found = rows(address, keep_last=1)
    assert "cut off" in found[2] and "cut off" in found[4] and found[6] == ""
    merge(request)
    assert rows(address, keep_last=1)[2] == ""


def test_old_averages_of_a_disk_run_in_a_store(dense_run: Path, bucket: str, s3: Any) -> None:
    save = f"s3://{bucket}/averages"
    for end in (4, 6, 8):
        window = SelectionRequest(last=2, end_iteration=end)
        merge(MergeRequest(load=str(dense_run), save=save, selection=window))
    assert deleted(save, keep_last=1) == [4, 6]
    assert {key.split("/")[1] for key in keys(s3, bucket)} == {"iter_0000008", TRACKER}


def test_damaged_ones_may_go_once_they_are_settled(
    address: str, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3.delete_object(Bucket=bucket, Key=f"{RUN}/iter_0000002/.metadata")
    assert "damaged" in rows(address, keep_last=1)[2]
    assert "within the last hour" in rows(address, keep_last=1, damaged=True)[2]
    before = there(s3, bucket)
    ahead = SimpleNamespace(time=lambda: time.time() + 2 * decision.SETTLED_S)
    with monkeypatch.context() as patch:  # this machine's clock is not the store's
        patch.setattr(decision, "time", ahead)
        assert deleted(address, keep_last=3, damaged=True) == []
    assert there(s3, bucket) == before
    monkeypatch.setattr(decision, "SETTLED_S", -1.0)
    assert deleted(address, keep_last=3, damaged=True) == [2]


def test_where_nothing_tells_what_lies_beside_nothing_goes(
    address: str, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights that end at the run: other merges are not seen."""

    def denied(self: ObjectStore, prefix: str) -> list[str]:
        raise PermissionError(13, "the store refuses these credentials", prefix)

    before = there(s3, bucket)
    monkeypatch.setattr(ObjectStore, "folders", denied)
    with pytest.raises(SelectionError, match="may list"):
        prune(PruneRequest(root=address, keep_last=1), delete=True)
    assert there(s3, bucket) == before
