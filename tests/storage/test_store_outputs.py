"""Averages are put into a store whole, or not at all as far as anybody looks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, folder_of
from pma_megatron import MergeRequest, SelectionRequest, list_checkpoints, merge, verify
from pma_megatron.errors import PublishError
from pma_megatron.formats.marker import MARKER_FILE, UPLOADING_FILE
from pma_megatron.formats.output import Folder
from pma_megatron.merging import uploading
from pma_megatron.merging.job import plan
from pma_megatron.runs.describe import describe
from pma_megatron.storage import claims, spool
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.testing import TinyConfig, TinyTrainer, run_ranks
from s3 import keys

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
CONFIG = TinyConfig(warmup_iters=2)  # the dense run's
TRACKER = "latest_checkpointed_iteration.txt"
PATIENCE_S = 100.0
FAULTS = [
    ("part", 1), ("uploading", 0), ("uploaded", 0), ("upload_marker", 0), ("upload_tracker", 0),
    ("upload_end", 0),
    *(pytest.param(*each, marks=(pytest.mark.slow, pytest.mark.thorough)) for each in (
        ("merge", 1), ("begin", 0), ("part", 0), ("upload", 0), ("publish", 0),
    )),
]  # fmt: skip


def request(load: object, save: str, **settings: Any) -> MergeRequest:
    settings.setdefault("selection", SelectionRequest(last=2))
    return MergeRequest(load=str(load), save=save, **settings)


def payloads(root: Path) -> dict[str, str]:
    """All files but those that say where sources lay."""
    own = (MARKER_FILE, f"{MARKER_FILE}.sha256", "common.pt")
    return {n: d for n, d in digests(root).items() if Path(n).name not in own}


@pytest.fixture(scope="module")
def expected(dense_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The average on a disk."""
    root = tmp_path_factory.mktemp("expected")
    merge(request(dense_run, str(root)))
    return root


def resumed(rank: int, world_size: int, root: str) -> bool:
    """Megatron loads it, and trains on."""
    trainer = TinyTrainer(CONFIG)
    trainer.load(root)
    trainer.train(1)
    return True


def pma(ranks: int, *words: str, fault: str = "") -> subprocess.CompletedProcess[str]:
    """A command of its own, by torchrun where it has several ranks."""
    start = [sys.executable, "-m", "pma_megatron"]
    if ranks > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        start += [f"--nproc-per-node={ranks}", "-m", "pma_megatron"]
    env = {**os.environ, "PMA_MEGATRON_FAULT": fault, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *words], capture_output=True, text=True, env=env, check=False)


def test_two_ranks_from_a_store_to_a_store_and_megatron_resumes_from_a_copy(
    dense_run: Path, expected: Path, put: Put, got: Got, bucket: str, tmp_path: Path, spools: Path
) -> None:
    load, save = put(dense_run, "run"), f"s3://{bucket}/averages"
    done = pma(2, "merge", "--load", load, "--save", save, "--last", "2")
    assert done.returncode == 0, done.stderr
    assert f"published {save}/iter_0000008" in done.stdout
    copy = got("averages", tmp_path / "copy")
    assert payloads(copy) == payloads(expected)
    assert (copy / TRACKER).read_text() == "8"
    assert not list(copy.rglob(UPLOADING_FILE))
    said = json.loads((folder_of(copy, 8) / MARKER_FILE).read_text())["request"]
    assert (said["load"], said["save"]) == (load, save)
    assert run_ranks(resumed, 2, str(copy)) == [True, True]
    assert verify(save).files
    assert not spools.exists() or [p for p in spools.rglob("*") if "outputs" in p.parts] == []


def test_from_a_disk_and_to_a_disk_by_way_of_a_store(
    dense_run: Path, expected: Path, bucket: str, tmp_path: Path, got: Got
) -> None:
    save = f"s3://{bucket}/averages"
    report = merge(request(dense_run, save))
    assert report.outputs == (f"{save}/iter_0000008",)
    assert payloads(got("averages", tmp_path / "copy")) == payloads(expected)
    assert [ref.complete for ref in list_checkpoints(save)] == [True]


@pytest.mark.parametrize("kind", ["dense_run", "flat"])
def test_what_is_held_back_is_what_makes_it_whole(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, spools: Path
) -> None:
    """Without any of what is put last, no format takes the folder for a whole checkpoint."""
    run = request.getfixturevalue(kind)
    asked = MergeRequest(load=str(run), save=f"{tmp_path}/x", selection=SelectionRequest(last=2))
    made = plan(asked)
    folder = Path(merge(asked).outputs[0])
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    late = uploading.held_back(made.layouts[Folder.CHECKPOINT], names)
    for number in range(len(late)):
        left = shutil.copytree(folder, tmp_path / f"left-{number}" / folder.name)
        for name in late[number:]:
            (left / name).unlink()
        assert not describe(left).complete, late[number:]


@pytest.mark.parametrize(("stage", "rank"), FAULTS)
def test_killed_at_any_moment_and_run_again(
    dense_run: Path, expected: Path, bucket: str, s3: Any, tmp_path: Path, got: Got,
    stage: str, rank: int, spools: Path,
) -> None:  # fmt: skip
    save = f"s3://{bucket}/averages"
    words = ("merge", "--load", str(dense_run), "--save", save, "--last", "2")
    ended = pma(1 + rank, *words, "--timeout", "20s", fault=f"{stage}:{rank}:kill")
    assert ended.returncode != 0
    there = keys(s3, bucket)
    complete = "averages/iter_0000008/metadata.json" in there
    assert complete == (stage in ("upload_tracker", "upload_end"))
    assert (f"averages/{TRACKER}" in there) == (stage == "upload_end")
    if there:
        assert [ref.complete for ref in list_checkpoints(save)] == [False]
        half = got("averages/iter_0000008", tmp_path / "half")
        assert not describe(half).complete
        (half / UPLOADING_FILE).unlink()  # which no trainer knows
        assert describe(half).complete == complete
    merge(request(dense_run, save))
    copy = got("averages", tmp_path / "copy")
    assert payloads(copy) == payloads(expected) and not list(copy.rglob(UPLOADING_FILE))
    assert (copy / TRACKER).read_text() == "8"
    spool.forget()
    assert [path for path in spools.rglob("*") if path.is_file()] == []


def test_what_a_job_killed_after_its_upload_left_on_the_disk_goes_with_the_next_merge(
    dense_run: Path, expected: Path, bucket: str, tmp_path: Path, got: Got, spools: Path
) -> None:
    save = f"s3://{bucket}/averages"
    words = ("merge", "--load", str(dense_run), "--save", save, "--last", "2")
    assert pma(1, *words, fault="upload_left:0:kill").returncode != 0
    assert payloads(got("averages", tmp_path / "copy")) == payloads(expected)
    assert [ref.complete for ref in list_checkpoints(save)] == [True]
    left = [path for path in spools.rglob("*.distcp") if "outputs" in path.parts]
    assert left and all(".pma-spent-iter_0000008" in path.parts for path in left)
    earlier = SelectionRequest(last=2, end_iteration=6)
    merge(request(dense_run, save, selection=earlier))
    spool.forget()
    assert [path for path in spools.rglob("*") if path.is_file()] == []


def test_an_upload_that_fails_is_gone_on_with(
    dense_run: Path, expected: Path, bucket: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, got: Got,
) -> None:  # fmt: skip
    save = f"s3://{bucket}/averages"
    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, "put_file", broken)
        with pytest.raises(PublishError, match=r"the line went dead.*same command") as caught:
            merge(request(dense_run, save))
    assert caught.value.kept is not None and Path(caught.value.kept).is_dir()
    report = merge(request(dense_run, save))
    assert report.reused["units"] > 0 and report.bytes["read"] < 100_000
    assert payloads(got("averages", tmp_path / "copy")) == payloads(expected)


@pytest.mark.parametrize("operation", ["put", "delete"])
def test_a_failure_after_the_marker_is_up_is_gone_on_with(
    dense_run: Path, expected: Path, bucket: str, monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path, got: Got, operation: str,
) -> None:  # fmt: skip
    """Of the tracker, or of the removal of the sign."""
    save, whole = f"s3://{bucket}/averages", getattr(ObjectStore, operation)

    def fails(self: ObjectStore, keys: Any, *given: Any, **how: Any) -> Any:
        asked = [keys] if isinstance(keys, str) else list(keys)
        tracker = any(key.endswith(TRACKER) for key in asked)
        if tracker or (operation == "delete" and asked == [SIGN]):
            broken()
        return whole(self, keys if isinstance(keys, str) else asked, *given, **how)

    with monkeypatch.context() as patch:
        patch.setattr(ObjectStore, operation, fails)
        with pytest.raises(PublishError, match="the line went dead") as caught:
            merge(request(dense_run, save))
    assert caught.value.published == () and caught.value.kept is not None
    assert [ref.complete for ref in list_checkpoints(save)] == [False]
    report = merge(request(dense_run, save))
    assert report.reused["units"] > 0
    copy = got("averages", tmp_path / "copy")
    assert payloads(copy) == payloads(expected) and (copy / TRACKER).read_text() == "8"
    assert not list(copy.rglob(UPLOADING_FILE))


def broken(*_: object) -> None:
    raise OSError(5, "the line went dead")


def test_what_the_store_holds_is_compared_before_it_is_made_whole(
    dense_run: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    put_file = ObjectStore.put_file

    def short(self: ObjectStore, key: str, path: Path) -> str:
        if key.endswith("__0_0.distcp"):
            self.put(key, path.read_bytes()[:-1])
            return ""
        return put_file(self, key, path)

    monkeypatch.setattr(ObjectStore, "put_file", short)
    with pytest.raises(PublishError, match=r"does not hold what was uploaded: __0_0.distcp"):
        merge(request(dense_run, f"s3://{bucket}/averages"))
    assert "averages/iter_0000008/metadata.json" not in keys(s3, bucket)
    monkeypatch.setattr(ObjectStore, "put_file", put_file)
    merge(request(dense_run, f"s3://{bucket}/averages"))
    assert "averages/iter_0000008/metadata.json" in keys(s3, bucket)


@pytest.fixture
def kept(spools: Path) -> Iterator[None]:
    """For tests whose merge is not gone on with."""
    yield
    shutil.rmtree(spools / "outputs", ignore_errors=True)


SIGN = f"averages/iter_0000008/{UPLOADING_FILE}"
FOREIGN = json.dumps({"by": "process 7 on elsewhere", "token": "x", "work": "y"}).encode()


def test_where_another_job_uploads_nothing_is_put_until_its_sign_is_old(
    dense_run: Path, expected: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3: Any,
    tmp_path: Path, got: Got,
) -> None:  # fmt: skip
    save = f"s3://{bucket}/averages"
    s3.put_object(Bucket=bucket, Key=SIGN, Body=FOREIGN)
    with pytest.raises(PublishError, match=r"process 7 on elsewhere.*in 15 minutes"):
        merge(request(dense_run, save))
    assert keys(s3, bucket) == [SIGN]
    monkeypatch.setattr(claims, "FRESH_S", 0.0)
    merge(request(dense_run, save))
    assert payloads(got("averages", tmp_path / "copy")) == payloads(expected)
    assert SIGN not in keys(s3, bucket)


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("at", ["__0_0.distcp", "metadata.json"])
def test_a_job_whose_upload_was_taken_over_makes_nothing_whole(
    dense_run: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3: Any, at: str
) -> None:
    put_file = ObjectStore.put_file

    def taken(self: ObjectStore, key: str, path: Path) -> str:
        if key.endswith(at):
            s3.put_object(Bucket=bucket, Key=SIGN, Body=FOREIGN)
        return put_file(self, key, path)

    monkeypatch.setattr(ObjectStore, "put_file", taken)
    with pytest.raises(PublishError, match=r"took over .*process 7 on elsewhere"):
        merge(request(dense_run, f"s3://{bucket}/averages"))
    assert s3.get_object(Bucket=bucket, Key=SIGN)["Body"].read() == FOREIGN
    assert f"averages/{TRACKER}" not in keys(s3, bucket)
    whole = "averages/iter_0000008/metadata.json" in keys(s3, bucket)
    assert whole == (at == "metadata.json")


@pytest.mark.usefixtures("kept")
def test_an_object_of_the_same_length_by_somebody_else_is_seen(
    dense_run: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    put_file = ObjectStore.put_file

    def replaced(self: ObjectStore, key: str, path: Path) -> str:
        version = put_file(self, key, path)
        if key.endswith("__0_0.distcp"):
            s3.put_object(Bucket=bucket, Key=key, Body=bytes(path.stat().st_size))
        return version

    monkeypatch.setattr(ObjectStore, "put_file", replaced)
    with pytest.raises(PublishError, match=r"__0_0.distcp \(another object"):
        merge(request(dense_run, f"s3://{bucket}/averages"))
    assert "averages/iter_0000008/metadata.json" not in keys(s3, bucket)


@pytest.mark.usefixtures("kept")
def test_what_another_job_made_in_the_meantime_stays(
    dense_run: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    upload, other = uploading.upload, "averages/iter_0000008/metadata.json"

    def late(*given: Any) -> Any:
        s3.put_object(Bucket=bucket, Key=other, Body=b"{}")
        return upload(*given)

    monkeypatch.setattr(uploading, "upload", late)
    with pytest.raises(PublishError, match="exists by now"):
        merge(request(dense_run, f"s3://{bucket}/averages"))
    assert keys(s3, bucket) == [other]


@pytest.mark.usefixtures("kept")
def test_a_staged_file_that_was_cut_short_is_not_put(
    dense_run: Path, bucket: str, monkeypatch: pytest.MonkeyPatch, s3: Any
) -> None:
    begin = uploading.begin

    def cut(plan: Any, target: Any, files: Any) -> Any:
        os.truncate(target.staging / "__0_0.distcp", 1)
        return begin(plan, target, files)

    monkeypatch.setattr(uploading, "begin", cut)
    with pytest.raises(PublishError, match=r"__0_0.distcp has 1 bytes"):
        merge(request(dense_run, f"s3://{bucket}/averages"))
    there = keys(s3, bucket)
    assert not [key for key in there if key.endswith(("__0_0.distcp", "metadata.json"))]


def test_what_is_there_is_replaced_only_where_that_was_asked_for(
    dense_run: Path, bucket: str, s3: Any, tmp_path: Path, got: Got
) -> None:
    save = f"s3://{bucket}/averages"
    merge(request(dense_run, save))
    before = {key: s3.head_object(Bucket=bucket, Key=key)["ETag"] for key in keys(s3, bucket)}
    with pytest.raises(PublishError, match=r"exists. Use .*overwrite"):
        merge(request(dense_run, save))
    s3.put_object(Bucket=bucket, Key="averages/iter_0000008/mine.txt", Body=b"x")
    with pytest.raises(PublishError, match=r"mine\.txt.*would be lost"):
        merge(request(dense_run, save, overwrite=True))
    s3.delete_object(Bucket=bucket, Key="averages/iter_0000008/mine.txt")
    after = {key: s3.head_object(Bucket=bucket, Key=key)["ETag"] for key in keys(s3, bucket)}
    assert after == before
    other = SelectionRequest(last=3, end_iteration=8)
    merge(request(dense_run, save, overwrite=True, selection=other))
    made = json.loads(
        (got("averages", tmp_path / "copy") / "iter_0000008" / MARKER_FILE).read_text()
    )
    assert len(made["plan"]["sources"]) == 3


@pytest.mark.usefixtures("kept")
def test_a_replacement_that_was_cut_off_goes_on(
    dense_run: Path, bucket: str, s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its two deletions, where the one before held what this one does not."""
    run, save = tmp_path / "run", f"s3://{bucket}/averages"
    shutil.copytree(dense_run, run)
    extra = run / "iter_0000008" / "tokenizer.model"
    extra.write_bytes(b"of the one before")
    merge(request(run, save))
    assert f"averages/iter_0000008/{extra.name}" in keys(s3, bucket)
    extra.unlink()
    delete, calls = ObjectStore.delete, []

    def failing(self: ObjectStore, gone: Any) -> None:
        gone = [*gone]
        if any(key.endswith(extra.name) for key in gone):
            calls.append(gone)
            raise OSError(5, "slow down")
        delete(self, gone)

    with monkeypatch.context() as patch, pytest.raises(PublishError):
        patch.setattr(ObjectStore, "delete", failing)
        merge(request(run, save, overwrite=True))
    assert calls and f"averages/iter_0000008/{MARKER_FILE}" not in keys(s3, bucket)
    merge(request(run, save, overwrite=True))
    assert f"averages/iter_0000008/{extra.name}" not in keys(s3, bucket)
    assert [ref.complete for ref in list_checkpoints(save)] == [True]


@pytest.mark.usefixtures("kept")
def test_what_nobody_knows_is_not_left_in_a_new_checkpoint(
    dense_run: Path, bucket: str, s3: Any, tmp_path: Path, got: Got
) -> None:
    """What an average that cannot be read any more consisted of; a console's folder is nothing."""
    save, folder = f"s3://{bucket}/averages", "averages/iter_0000008"
    merge(request(dense_run, save))
    s3.put_object(Bucket=bucket, Key=f"{folder}/{MARKER_FILE}", Body=b"{}")
    s3.put_object(Bucket=bucket, Key=f"{folder}/__9_0.distcp", Body=b"an old shard")
    there = keys(s3, bucket)
    with pytest.raises(PublishError, match=r"holds __9_0.distcp, which was not written with it"):
        merge(request(dense_run, save, overwrite=True))
    assert keys(s3, bucket) == there
    s3.delete_object(Bucket=bucket, Key=f"{folder}/__9_0.distcp")
    s3.put_object(Bucket=bucket, Key=f"{folder}/", Body=b"")
    merge(request(dense_run, save, overwrite=True))
    assert [ref.complete for ref in list_checkpoints(save)] == [True]


def test_a_run_and_a_foreign_folder_are_left_alone(dense_run: Path, put: Put) -> None:
    load = put(dense_run, "run")
    for save, said in (
        (load, "the run's own folder"),
        (f"{load}/iter_0000002/below", "a checkpoint"),
        (put(dense_run, "other"), "did not write"),
    ):
        with pytest.raises(PublishError, match=said):
            plan(request(load, save))


def test_several_averages_and_an_export_are_put_there_together(
    dense_run: Path, bucket: str, s3: Any
) -> None:
    report = merge(
        request(
            dense_run, f"s3://{bucket}/averages", selection=SelectionRequest(), sweep=("sma,wma:2",)
        )
    )
    assert sorted(report.outputs) == [
        f"s3://{bucket}/averages/{name}/iter_0000008" for name in ("sma-last2", "wma-last2")
    ]
    assert not [key for key in keys(s3, bucket) if key.endswith(UPLOADING_FILE)]


def test_ranks_that_do_not_see_one_folder_are_refused(
    dense_run: Path, bucket: str, tmp_path: Path, s3: Any
) -> None:
    said = run_ranks(_apart, 2, str(dense_run), f"s3://{bucket}/averages", str(tmp_path))
    assert all("PMA_MEGATRON_SPOOL" in each or "rank 1" in each for each in said), said
    assert not keys(s3, bucket)


def _apart(rank: int, world_size: int, load: str, save: str, folder: str) -> str:
    os.environ[spool.VARIABLE] = f"{folder}/node-{rank}"
    try:
        merge(request(load, save))
    except Exception as error:
        return str(error)
    return ""


def test_the_sign_is_renewed_while_the_file_that_makes_it_whole_takes_its_time(
    dense_run: Path, spools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all files together do so, it is one with weights."""
    put_file, put_object, signed = ObjectStore.put_file, ObjectStore.put, threading.Event()

    def slow(self: ObjectStore, key: str, path: Path) -> str:
        if path.name == "metadata.json":
            signed.clear()
            assert signed.wait(PATIENCE_S)
        return put_file(self, key, path)

    def noted(self: ObjectStore, key: str, data: bytes, **how: bool) -> None:
        put_object(self, key, data, **how)
        if key.endswith(UPLOADING_FILE):
            signed.set()

    for name in ("_RENEWED_S", "_LOOKED_S"):
        monkeypatch.setattr(claims, name, 0.01)
    monkeypatch.setattr(ObjectStore, "put_file", slow)
    monkeypatch.setattr(ObjectStore, "put", noted)
    save = f"memory://{tmp_path.name}/averages"
    merge(request(dense_run, save))
    assert [ref.complete for ref in list_checkpoints(save)] == [True]
