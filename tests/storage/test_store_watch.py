"""`pma watch` of a run in an object store, with averages there: they are those of a merge."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import exports
import pytest
from test_watch import slept

from conftest import digests, folder_of
from jobs import JOBS, nothing_goes_on  # noqa: F401
from pma_megatron import (
    MergeRequest,
    SelectionRequest,
    WatchRequest,
    list_checkpoints,
    merge,
    verify,
    watch,
)
from pma_megatron.base.stopping import Stopped, stoppable
from pma_megatron.errors import PublishError
from pma_megatron.merging import uploading
from pma_megatron.storage import claims, spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.testing import run_ranks
from pma_megatron.watching import charge, follow, state
from s3 import keys

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
TRACKER = "latest_checkpointed_iteration.txt"
OWN = ("pma.json", "pma.json.sha256", "common.pt", ".metadata")
RUN = "runs/dense"
PATIENCE_S = 200.0


def payloads(root: Path) -> dict[str, str]:
    """What an output holds, but the files that say where its sources lay."""
    return {n: d for n, d in digests(root).items() if Path(n).name not in OWN}


def merged(run: Path, iterations: tuple[int, ...], folder: Path) -> dict[str, str]:
    """What `pma merge` makes of checkpoints on a disk."""
    shutil.rmtree(folder, ignore_errors=True)
    selection = SelectionRequest(iterations=iterations)
    report = merge(MergeRequest(load=str(run), save=str(folder), selection=selection))
    return payloads(Path(report.outputs[0]))


def request_of(load: str, save: str, **settings: Any) -> WatchRequest:
    asked = MergeRequest(load=load, save=save, selection=SelectionRequest(last=2))
    return WatchRequest(merge=asked, **{"once": True, **settings})


def looked(load: str, save: str, **settings: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    watch(request_of(load, save, **settings), tell=found.append)
    return found


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [event["event"] for event in found]


@pytest.fixture
def say(s3: Any, bucket: str) -> Callable[[int], None]:
    """Has the tracker of the run in the store name another checkpoint."""

    def said(iteration: int) -> None:
        s3.put_object(Bucket=bucket, Key=f"{RUN}/{TRACKER}", Body=str(iteration).encode())

    return said


def test_it_follows_a_run_in_a_store(
    dense_run: Path, put: Put, got: Got, s3: Any, bucket: str, tmp_path: Path,
    say: Callable[[int], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A checkpoint more, one that is written, one that is deleted, a resume: in one watch."""
    first = tmp_path / "first"
    for iteration in (2, 4, 6):
        shutil.copytree(folder_of(dense_run, iteration), folder_of(first, iteration))
    (first / TRACKER).write_text("6")
    load, save = put(first, RUN), f"s3://{bucket}/averages"
    numbers, copies = iter(range(8)), itertools.count()

    def average() -> dict[str, str]:
        named = s3.get_object(Bucket=bucket, Key=f"averages/{TRACKER}")["Body"].read()
        folder = tmp_path / f"copy-{next(copies)}"
        return payloads(got(f"averages/iter_{int(named):07d}", folder))

    def step(_: float) -> None:
        match next(numbers):
            case 0:
                assert average() == merged(dense_run, (4, 6), tmp_path / "other")
                put(folder_of(dense_run, 8), f"{RUN}/iter_0000008")  # and not yet named
                s3.delete_object(Bucket=bucket, Key=f"{RUN}/iter_0000008/metadata.json")
            case 1:
                put(dense_run, RUN)
            case 2:
                assert average() == merged(dense_run, (6, 8), tmp_path / "other")
                for key in keys(s3, bucket, f"{RUN}/iter_0000006/"):
                    s3.delete_object(Bucket=bucket, Key=key)
            case 3:
                assert average() == merged(dense_run, (4, 8), tmp_path / "other")
                say(4)
            case 4:
                assert average() == merged(dense_run, (2, 4), tmp_path / "other")
            case 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(follow, "time", slept(step))
    found: list[dict[str, Any]] = []
    with pytest.raises(KeyboardInterrupt):
        watch(request_of(load, save, once=False), tell=found.append)
    assert [event["sources"] for event in found if event["event"] == "published"] == [
        [4, 6],
        [6, 8],
        [4, 8],
        [2, 4],
    ]
    assert kinds(found).count("failed") == 0
    left = [key for key in keys(s3, bucket, "averages/") if ".pma-" in key]
    assert left == []


@pytest.mark.parametrize("where", ["store to store", "disk to store", "store to disk"])
def test_what_is_there_is_not_made_again_and_old_ones_go(
    dense_run: Path, run: Path, put: Put, s3: Any, bucket: str, tmp_path: Path,
    say: Callable[[int], None], where: str,
) -> None:  # fmt: skip
    source, target = where.split(" to ")
    load = put(dense_run, RUN) if source == "store" else str(run)
    save = f"s3://{bucket}/averages" if target == "store" else str(tmp_path / "averages")
    events = tmp_path / "events.jsonl"
    for end in (4, 6, 8):
        say(end)
        (run / TRACKER).write_text(str(end))
        time.sleep(2.1)  # sources are older than the merge, as far as a second tells
        found = looked(load, save, keep=2, events=events)
        assert kinds(found)[:2] == ["started", "published"]
        assert kinds(found)[2:] == (["deleted"] if end == 8 else [])
    assert [ref.iteration for ref in list_checkpoints(save)] == [6, 8]
    assert kinds(looked(load, save, keep=2)) == ["started", "current"]
    said = [json.loads(line)["event"] for line in events.read_text().splitlines()]
    assert said.count("published") == 3 and said.count("deleted") == 1


@pytest.mark.parametrize("sizes", ["other", "equal"])
def test_what_training_saved_over_an_average_in_a_store_stays(
    dense_run: Path, run: Path, put: Put, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch,
    spools: Path, sizes: str,
) -> None:  # fmt: skip
    """Through a mount of the bucket, or by a trainer that writes there itself."""
    save, key = f"s3://{bucket}/averages", "averages/iter_0000006"
    shard = f"{key}/__0_0.distcp"
    (run / TRACKER).write_text("6")
    assert kinds(looked(str(run), save)) == ["started", "published"]

    def save_over() -> None:
        if sizes == "other":
            put(folder_of(dense_run, 6), key)
            return
        data = bytearray(s3.get_object(Bucket=bucket, Key=shard)["Body"].read())
        data[len(data) // 2] ^= 1
        s3.put_object(Bucket=bucket, Key=shard, Body=bytes(data))

    def there() -> dict[str, str]:
        return {k: s3.head_object(Bucket=bucket, Key=k)["ETag"] for k in keys(s3, bucket, key)}

    asked = request_of(str(run), save).merge
    upload, before = uploading.upload, {}

    def late(*given: Any) -> Any:
        save_over()
        before.update(there())
        return upload(*given)

    again = replace(asked, selection=SelectionRequest(last=3), overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(uploading, "upload", late)
        with pytest.raises(PublishError, match=r"in it (is|are) not what pma\.json lists"):
            merge(again)
    assert there() == before
    shutil.rmtree(spools / "outputs")  # which the same command would go on with
    with pytest.raises(PublishError, match=r"in it (is|are) not what pma\.json lists"):
        merge(again)
    (run / TRACKER).write_text("8")
    found = looked(str(run), save, keep=1)
    assert kinds(found)[-1] == "failed" and "training has saved a checkpoint" in str(found[-1])
    assert there() == before


def test_what_was_written_again_is_told_by_its_version(
    dense_run: Path, put: Put, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the store's clock is ahead of this machine's, or behind: here the same bytes come in
    parts, by which the object gets another ETag."""
    load, save = put(dense_run, RUN), f"s3://{bucket}/averages"
    where = {"Bucket": bucket, "Key": f"{RUN}/iter_0000006/__0_0.distcp"}
    data = (folder_of(dense_run, 6) / "__0_0.distcp").read_bytes()
    assert kinds(looked(load, save)) == ["started", "published"]
    for began_ns in (0, 2 * time.time_ns()):
        with monkeypatch.context() as patched:
            patched.setattr(state, "begun_ns", lambda _, began_ns=began_ns: began_ns)
            assert kinds(looked(load, save)) == ["started", "current"]
            by = {"UploadId": s3.create_multipart_upload(**where)["UploadId"], **where}
            tag = s3.upload_part(**by, PartNumber=1, Body=data)["ETag"]
            parts = {"Parts": [{"ETag": tag, "PartNumber": 1}]}
            s3.complete_multipart_upload(**by, MultipartUpload=parts)
            assert kinds(looked(load, save)) == ["started", "published"]
            s3.put_object(**where, Body=data)
        assert kinds(looked(load, save)) == ["started", "published"]


def test_one_watch_at_a_time(
    dense_run: Path, put: Put, s3: Any, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed, its own machine knows at once that it is gone; of another one it is waited for."""
    load, save = put(dense_run, RUN), f"s3://{bucket}/averages"
    events = tmp_path / "events.jsonl"
    words = ("watch", "--load", load, "--save", save, "--last", "2", "--poll-s", "0.2")
    words += ("--events", str(events))
    job = subprocess.Popen(
        [sys.executable, "-m", "pma_megatron", *words],
        stderr=subprocess.PIPE, text=True, start_new_session=True, env={**os.environ},
    )  # fmt: skip
    JOBS.append(job)
    sign = f"averages/{charge.SIGN}watch"
    end_s = time.monotonic() + PATIENCE_S
    while not events.is_file() or '"published"' not in events.read_text():  # it only waits then
        assert job.poll() is None and time.monotonic() < end_s
        time.sleep(0.1)
    with pytest.raises(PublishError, match="another watch keeps an average"):
        looked(load, save)
    os.kill(job.pid, signal.SIGKILL)
    job.wait()
    spool.forget()  # whoever begins another removes what the killed one left
    assert sign in keys(s3, bucket)
    assert kinds(looked(load, save))[0] == "started"
    assert sign not in keys(s3, bucket)

    elsewhere = {"by": "process 1 on elsewhere", "process": "x 1 1 1", "token": "other"}
    s3.put_object(Bucket=bucket, Key=sign, Body=json.dumps(elsewhere).encode())
    with pytest.raises(PublishError, match="process 1 on elsewhere"):
        looked(load, save)
    with monkeypatch.context() as patched:  # nor by a machine whose clock is an hour ahead
        ahead = SimpleNamespace(time=lambda: time.time() + 3600, monotonic=time.monotonic)
        patched.setattr(claims, "time", ahead)
        with pytest.raises(PublishError, match="process 1 on elsewhere"):
            looked(load, save)
    monkeypatch.setattr(claims, "FRESH_S", 0.0)
    assert kinds(looked(load, save))[0] == "started"


def test_one_that_is_stopped_as_it_begins_leaves_no_sign(
    dense_run: Path, put: Put, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On another machine the next one would wait for it for minutes."""
    load, save, real = put(dense_run, RUN), f"s3://{bucket}/averages", ObjectStore.put

    def stopped(self: ObjectStore, *given: Any, **how: Any) -> None:
        real(self, *given, **how)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(ObjectStore, "put", stopped)
    with stoppable(), pytest.raises(Stopped):
        looked(load, save)
    assert keys(s3, bucket, "averages/") == []


def test_one_that_was_taken_over_ends(
    dense_run: Path, put: Put, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, save = put(dense_run, RUN), f"s3://{bucket}/averages"
    sign = f"averages/{charge.SIGN}watch"

    def taken(_: float) -> None:
        s3.put_object(Bucket=bucket, Key=sign, Body=b'{"by": "another", "token": "its own"}')

    monkeypatch.setattr(follow, "time", slept(taken))
    found: list[dict[str, Any]] = []
    with pytest.raises(charge.TakenOverError, match="another"):
        watch(request_of(load, save, once=False), tell=found.append)
    assert kinds(found) == ["started", "published", "failed"]
    assert sign in keys(s3, bucket)


def test_a_model_on_a_disk_is_there_to_be_evaluated(
    bucket: str, tmp_path: Path, put: Put, s3: Any
) -> None:
    """Averages in a store, and the exported model on a disk, for evaluations that take folders."""
    run, like, model = tmp_path / "run", exports.template(tmp_path / "like"), tmp_path / "model"
    run_ranks(exports.train, 2, str(run), 3, str(like), str(tmp_path / "trained"))
    save, said = f"s3://{bucket}/averages", tmp_path / "said"
    asked = MergeRequest(
        load=put(run, RUN),
        save=save,
        export=str(model),
        like=str(like),
        selection=SelectionRequest(last=2),
    )
    command = f'ls "$PMA_EXPORT" > {said}; echo "$PMA_AVERAGE" >> {said}'
    found: list[dict[str, Any]] = []
    watch(WatchRequest(merge=asked, once=True, evaluate=command), tell=found.append)
    assert kinds(found) == ["started", "published", "evaluated"]
    *files, average = said.read_text().splitlines()
    assert {"config.json", "model.safetensors"} <= set(files)
    assert average == f"{save}/iter_0000006"
    verify(model, files_only=True)
