"""Where averages are saved nothing else is written over, nor what another job is saving there."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_store_uploads import address, average, made, new_place, writer

from conftest import digests, request_for
from pma_megatron import MergeRequest, list_checkpoints, merge
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PublishError, SelectionError
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE, SEAL_FILE
from pma_megatron.merging import locks
from pma_megatron.online import average_folder, one_job
from pma_megatron.online.average_upload import AveragePlace, NotSavedError
from pma_megatron.online.snapshot_job import STAGING
from pma_megatron.online.snapshots import name_of
from pma_megatron.storage.paths import place_of, stored
from pma_megatron.testing import run_ranks

__all__ = ["address", "made", "new_place"]

TRACKER = "latest_checkpointed_iteration.txt"
Put = Callable[[Path], str]


@pytest.fixture(params=["disk", "store"])
def put(request: pytest.FixtureRequest, tmp_path: Path, address: str) -> Put:
    """Puts a folder where averages are to be saved, and says where that is."""

    def on_a_disk(folder: Path) -> str:
        return str(shutil.copytree(folder, tmp_path / "averages", dirs_exist_ok=True))

    def in_a_store(folder: Path) -> str:
        store, key = stored(place_of(address))
        for path in folder.rglob("*"):
            if path.is_file():
                store.put(f"{key}/{path.relative_to(folder)}", path.read_bytes())
        return address

    return on_a_disk if request.param == "disk" else in_a_store


def content(place: str) -> dict[str, object]:
    if "://" not in place:
        return dict(digests(Path(place)))
    store, key = stored(place_of(place))
    return {each.key: each.version for each in store.listed(f"{key}/")}


def whole(folder: Path, made: Path) -> None:
    shutil.copytree(made / name_of(50), folder / name_of(50))
    for name in (MARKER_FILE, SEAL_FILE):
        (folder / name_of(50) / name).unlink()
    (folder / TRACKER).write_text("50")


def begun(folder: Path, made: Path) -> None:
    (folder / name_of(50)).mkdir(parents=True)
    shutil.copy(made / name_of(50) / "__0_0.distcp", folder / name_of(50))


def averaged(folder: Path, made: Path, iteration: int) -> None:
    shutil.copytree(made / name_of(iteration), folder / name_of(iteration))
    (folder / name_of(iteration) / SEAL_FILE).unlink()
    said = json.dumps({"kind": ONLINE_AVERAGE})
    (folder / name_of(iteration) / MARKER_FILE).write_text(said)


def strange(folder: Path, made: Path) -> None:
    whole(folder, made)
    (folder / name_of(50) / MARKER_FILE).write_text('{"kind": "of another release"}')


def snapshot(folder: Path, made: Path) -> None:
    shutil.copytree(made / name_of(50), folder / name_of(50))


def tag(folder: Path, made: Path) -> None:
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "mp_rank_00_model_states.pt").write_bytes(b"weights")


@pytest.mark.parametrize("other", [whole, begun, strange, snapshot, tag])
def test_a_place_of_other_checkpoints_is_refused(
    other: Callable[[Path, Path], None], put: Put, made: Path, tmp_path: Path, spools: Path
) -> None:
    """Whatever they are, whole or not, before anything is written."""
    other(tmp_path / "other", made)
    place = put(tmp_path / "other")
    before = content(place)
    with pytest.raises(PublishError, match="is not a running average"):
        AveragePlace(place, Comm())
    assert content(place) == before


def test_a_place_of_averages_is_taken_again(
    put: Put, made: Path, tmp_path: Path, spools: Path
) -> None:
    averaged(tmp_path / "other", made, 50)
    (tmp_path / "other" / "window" / name_of(50)).mkdir(parents=True)
    (tmp_path / "other" / "window" / name_of(50) / MARKER_FILE).write_text("{}")
    place = AveragePlace(put(tmp_path / "other"), Comm())
    place.begin(name_of(50))
    place.begin(name_of(60))
    atexit.unregister(place.wait)


def test_what_a_merge_made_may_lie_there_and_stays(
    dense_run: Path, put: Put, tmp_path: Path, spools: Path
) -> None:
    """`<save>-pma` is where averages go unless it is said, and where merges are advised to go."""
    merge(request_for(dense_run, tmp_path / "other"))
    root = put(tmp_path / "other")
    before = content(root)
    place = AveragePlace(root, Comm())
    place.begin(name_of(60))
    if not place.is_remote:
        with pytest.raises(NotSavedError, match="is what `pma merge` made, and stays"):
            place.begin(name_of(8))
    after = content(root)
    assert {name: after[name] for name in before} == before
    atexit.unregister(place.wait)


def test_a_merge_is_looked_at_once_and_no_longer_one_where_training_saved_over_it(
    dense_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All ranks wait for that look at every save, and hundreds of averages may lie there."""
    save = tmp_path / "averages"
    merge(request_for(dense_run, save))
    place = AveragePlace(save, Comm())
    read, looked_at = average_folder.read_json, list[str]()

    def reading(path: Path) -> Any:
        looked_at.append(path.parent.name)
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(average_folder, "saved_over", None)  # what calls it fails
        patch.setattr(average_folder, "read_json", reading)
        place.begin(name_of(60))
    assert name_of(8) not in looked_at
    metadata = save / name_of(8) / ".metadata"
    metadata.write_bytes(metadata.read_bytes() + b"x")
    with pytest.raises(NotSavedError, match=f"{name_of(8)} is a checkpoint that is not"):
        place.begin(name_of(60))


def test_retention_does_not_get_what_a_merge_made(
    dense_run: Path, tmp_path: Path, made: Path
) -> None:
    """Megatron deletes what the tracker names, which merges and averages take turns to be."""
    save = tmp_path / "averages"
    place = AveragePlace(save, Comm())
    assert place.begin(name_of(50))
    average(place, 50, made)
    assert place.begin(name_of(60))
    merge(request_for(dense_run, save))
    assert (save / TRACKER).read_text() == "8"
    assert not place.begin(name_of(60))
    assert not AveragePlace(save, Comm()).begin(name_of(60))
    average(place, 60, made)
    assert place.begin(name_of(70))


def test_retention_does_not_get_what_a_merge_put_in_an_averages_place(
    dense_run: Path, tmp_path: Path, made: Path
) -> None:
    """As `--overwrite` does, which is advised where an average has the name."""
    save = tmp_path / "averages"
    place = AveragePlace(save, Comm())
    shutil.copytree(made / name_of(50), made / name_of(8))
    average(place, 8, made)
    assert place.begin(name_of(50))
    average(place, 50, made)
    merge(replace(request_for(dense_run, save), overwrite=True))
    assert (save / TRACKER).read_text() == "8"
    assert not place.begin(name_of(60))


def test_a_merge_goes_where_an_average_is_being_saved(
    dense_run: Path, tmp_path: Path, made: Path
) -> None:
    """It bears no mark for minutes, and none at all where the job is killed meanwhile."""
    save = tmp_path / "averages"
    place = AveragePlace(save, Comm())
    place.begin(name_of(50))
    whole(save, made)
    before = digests(save / name_of(50))
    merge(request_for(dense_run, save))
    assert (save / name_of(8) / MARKER_FILE).is_file()
    assert digests(save / name_of(50)) == before


def test_an_average_that_is_saved_over_is_none_until_it_is_whole(
    tmp_path: Path, made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After a run went back; a job that is killed meanwhile leaves parts of both."""
    root = tmp_path / "averages"
    place = AveragePlace(root, Comm())
    folder = average(place, 50, made)
    assert not list(root.glob(".pma-saving-*"))
    place.begin(name_of(50))
    AveragePlace(root, Comm())
    assert f"{folder} is an average that a job was cut off at" in caplog.text
    (sign,) = root.glob(".pma-saving-*")
    assert str(sign) in caplog.text
    # What was not written over by then are files of the older one, and nobody takes them for it.
    assert [ref.complete for ref in list_checkpoints(root)] == [False]
    with pytest.raises(SelectionError):
        merge(MergeRequest(load=str(root), save=str(tmp_path / "merged")))


def test_a_sign_goes_where_nothing_came_after_it(tmp_path: Path, made: Path) -> None:
    """What training saves later by that name is no average."""
    root = tmp_path / "averages"
    average(AveragePlace(root, Comm()), 40, made)
    AveragePlace(root, Comm()).begin(name_of(50))
    (sign,) = root.glob(".pma-saving-*")
    AveragePlace(root, Comm())
    assert not sign.exists()
    whole(root, made)
    with pytest.raises(
        PublishError, match=f"{name_of(50)} is a checkpoint in a folder of averages"
    ):
        AveragePlace(root, Comm())


def test_a_tracker_alone_is_that_of_training(tmp_path: Path) -> None:
    """Its checkpoints may lie elsewhere, or not be there yet; beside a window it is of averages."""
    (tmp_path / TRACKER).write_text("50")
    with pytest.raises(PublishError, match=f"delete {TRACKER}"):
        AveragePlace(tmp_path, Comm())
    (tmp_path / "window").mkdir()
    AveragePlace(tmp_path, Comm()).begin(name_of(60))


def test_an_average_without_a_mark_is_known_by_its_sign(tmp_path: Path, made: Path) -> None:
    """One that is saved in the background, or that a killed job left; without a sign, of an earlier
    release, it is said what to do, and that helps."""
    root = tmp_path / "averages"
    place = AveragePlace(root, Comm())
    average(place, 40, made)
    for iteration in (50, 60):
        place.begin(name_of(iteration))
        whole(root, made) if iteration == 50 else None
    again = AveragePlace(root, Comm())
    average(again, 60, made)
    assert not [path for path in root.glob(".pma-*") if path.name.endswith(name_of(60))]
    (sign,) = root.glob(".pma-*")
    sign.unlink()
    with pytest.raises(PublishError, match=f"{name_of(50)} .*delete it or move it elsewhere"):
        AveragePlace(root, Comm())
    shutil.rmtree(root / name_of(50))
    AveragePlace(root, Comm()).begin(name_of(50))


def test_a_rest_of_an_average_stops_no_job(
    put: Put, made: Path, tmp_path: Path, spools: Path
) -> None:
    """A job may be killed while Megatron's retention deletes an old one. It is not saved over."""
    begun(tmp_path / "other", made)
    averaged(tmp_path / "other", made, 40)
    place = AveragePlace(put(tmp_path / "other"), Comm())
    atexit.unregister(place.wait)
    place.begin(name_of(60))
    if not place.is_remote:
        with pytest.raises(NotSavedError, match=name_of(50)):
            place.begin(name_of(50))


@pytest.mark.parametrize("name", [name_of(50), name_of(60), "mine"])
def test_what_came_there_since_is_not_saved_over(name: str, tmp_path: Path, made: Path) -> None:
    """Training goes on without that average, and is told."""
    root = tmp_path / "averages"
    place = AveragePlace(root, Comm())
    average(place, 40, made)
    if name == "mine":
        (root / name).mkdir()
        (root / name / "notes").touch()
    else:
        whole(root, made)
    before = digests(root)
    with pytest.raises(NotSavedError, match=name_of(50) if name != "mine" else name):
        place.begin(name)
    assert digests(root) == before


# Two jobs at one place.


def second_job(rank: int, world_size: int, address: str) -> list[str]:
    """What a job is told that saves an average there, and what lies on the disk then."""
    place = AveragePlace(address, Comm())
    told = "saved"
    try:
        place.begin(name_of(60))
    except NotSavedError as error:
        told = str(error)
    return [told, *sorted(path.name for path in Path(place.folder).glob("iter_*"))]


def test_what_another_job_is_saving_stays(
    address: str, spools: Path, new_place: Callable[[], AveragePlace]
) -> None:
    """Until that job has ended: then it is what a job that was cut off has left."""
    place = new_place()
    place.begin(name_of(50))
    (place.folder / name_of(50)).mkdir()
    (place.folder / name_of(50) / "__0_0.distcp").write_bytes(b"a part")
    ((told, *left),) = run_ranks(second_job, 1, address)
    assert f"process {os.getpid()} on" in told and left == [name_of(50)]
    one_job.let_go()
    ((told, *left),) = run_ranks(second_job, 1, address)
    assert told == "saved" and left == []


def second_writer(rank: int, world_size: int, root: str) -> None:
    writer(root)


def test_a_snapshot_that_another_job_is_writing_stays(tmp_path: Path) -> None:
    root = writer(tmp_path / "snapshots").root
    staging = root / f"{STAGING}{name_of(50)}-0123-1"
    staging.mkdir()
    run_ranks(second_writer, 1, str(root))
    assert staging.exists()
    one_job.let_go()
    run_ranks(second_writer, 1, str(root))
    assert not staging.exists()


def test_what_no_lock_tells_of_stays(
    address: str,
    spools: Path,
    new_place: Callable[[], AveragePlace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where other machines do not see a lock, one that is held says nothing of their jobs."""
    monkeypatch.setattr(locks, "seen_by_all", lambda *_, **__: False)
    staging = tmp_path / "snapshots" / f"{STAGING}{name_of(50)}-0123-1"
    begun = new_place().folder / name_of(50)
    for folder in (staging, begun):
        folder.mkdir(parents=True)
    one_job.let_go()
    writer(tmp_path / "snapshots")
    new_place()
    assert staging.exists() and begun.exists()


ENDS = """
import os, signal, sys
from pathlib import Path
from pma_megatron.online.one_job import other_job
assert other_job(Path(sys.argv[1])) is None
if os.fork():
    os.kill(os.getpid(), signal.SIGKILL)
print("child", flush=True)
sys.stdin.read()
os._exit(0)
"""


def test_a_child_that_outlives_its_job_holds_nothing(tmp_path: Path) -> None:
    """A data loader's worker, for instance, where the trainer was killed."""
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as job:
        assert job.stdout is not None and job.stdout.readline() == b"child\n"
        assert job.wait() == -signal.SIGKILL
        assert one_job.other_job(tmp_path) is None
