"""The running average with its folders in an object store: what is there is what a disk would hold,
a run goes on from it, and nothing that only looks whole is ever left."""

from __future__ import annotations

import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_hooks import keep
from test_megatron_flags import parse
from test_online import BASE, EMA, LAST, METHODS, TOKENS, assert_same, held, online, resume, train
from test_snapshot_writer import assert_whole, simple_chunks, simple_data

from conftest import DENSE, folder_of
from pma_megatron import compare, list_checkpoints, verify
from pma_megatron.base.comm import Comm
from pma_megatron.errors import PmaError, UsageError
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.megatron import argument_parser, hooks
from pma_megatron.megatron.online import OnlineAverage
from pma_megatron.megatron.save import note_origin
from pma_megatron.megatron.trees import global_vars
from pma_megatron.online.average_upload import AveragePlace, NotSavedError
from pma_megatron.online.snapshots import SnapshotWriter
from pma_megatron.storage.object_store import ObjectStore
from pma_megatron.testing import TinyTrainer, inject, rank_outcomes, run_ranks
from s3 import files_in, keys

Put = Callable[[Path, str], str]
Got = Callable[[str, Path], Path]
PATIENCE_S = 200.0


def iterations(s3: Any, bucket: str, prefix: str) -> list[int]:
    """Of the folders `iter_*` below a key."""
    found = {key.removeprefix(prefix).split("/")[0] for key in keys(s3, bucket, prefix)}
    return sorted(int(name.removeprefix("iter_")) for name in found if name.startswith("iter_"))


def files_left(spools: Path) -> list[Path]:
    return [path for path in files_in(spools) if "outputs" in path.parts]


# The state of the window.


def run_on(rank: int, world_size: int, method: Any, root: str, state: str) -> Any:
    """As on a disk: saved after 7, in the middle of a window, and after 10, which is given up."""
    trainer = TinyTrainer(BASE)
    average = online(trainer, method)
    train(trainer, 7, average)
    trainer.save(root)
    average.save_state(state)
    train(trainer, 3, average)
    with average.averaged_state():
        found = held(trainer)
    average.save_state(state)
    average.wait_for_uploads(PATIENCE_S)
    return found


def go_on(rank: int, world_size: int, method: Any, root: str, state: str) -> Any:
    """Resume, and train to iteration 10 again."""
    trainer = TinyTrainer(BASE)
    average = online(trainer, method)
    notes = resume(trainer, average, root, state)
    before = [entry.iteration for entry in average.entries]
    train(trainer, 3, average)
    with average.averaged_state():
        found = held(trainer)
    average.save_state(state)
    average.wait_for_uploads(PATIENCE_S)
    return found, before, notes


@pytest.mark.parametrize("method", [METHODS["wma"], EMA], ids=["wma", "ema"])
def test_a_run_goes_on_from_its_window(
    method: Any, s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path
) -> None:
    """What was given up is replaced, older entries go once all others are there."""
    root, state = str(tmp_path / "run"), f"s3://{bucket}/run-pma/window"
    ranks = 1 if method is EMA else 2
    expected = run_ranks(run_on, ranks, method, root, state)
    etags = {key: s3.head_object(Bucket=bucket, Key=key)["ETag"] for key in keys(s3, bucket)}
    assert iterations(s3, bucket, "run-pma/window/") == (
        [6, 10] if method is EMA else [2, 4, 6, 8, 10]
    )
    resumed = run_ranks(go_on, ranks, method, root, state)
    for (found, before, notes), wanted in zip(resumed, expected, strict=True):
        assert_same(found, wanted)
        assert before == ([6] if method is EMA else [2, 4, 6])
        assert len(notes) == 1 and "given up" in notes[0]
    kept = [6, 10] if method is EMA else [2, 4, 6, 8, 10]
    assert iterations(s3, bucket, "run-pma/window/") == kept
    for iteration in kept:
        copy = got(f"run-pma/window/iter_{iteration:07d}", tmp_path / f"copy/iter_{iteration:07d}")
        verify(copy)
    marker = f"run-pma/window/iter_{10:07d}/pma.json"
    assert s3.head_object(Bucket=bucket, Key=marker)["ETag"] != etags[marker], "the old one is gone"
    assert not any(key.endswith(UPLOADING_FILE) for key in keys(s3, bucket))
    assert files_left(spools) == []


def window_of(rank: int, world_size: int, state: str, saves: int) -> list[int]:
    """A new run that saves its window so many times, every second iteration."""
    trainer = TinyTrainer(BASE)
    average = online(trainer, METHODS["sma"])
    for _ in range(saves):
        train(trainer, 2, average)
        average.save_state(state)
    average.wait_for_uploads(PATIENCE_S)
    return [entry.iteration for entry in average.entries]


def test_entries_that_are_needed_stay_and_nothing_of_others_goes(
    s3: Any, bucket: str, spools: Path
) -> None:
    """Those of this save and of the one before; what is no entry is not touched."""
    state = f"s3://{bucket}/window"
    strange = {"window/iter_0000001/notes.txt", "window/keep/me.txt", "windows/iter_0000002/x"}
    for key in strange:
        s3.put_object(Bucket=bucket, Key=key, Body=b"mine")
    run_ranks(window_of, 1, state, 6)
    assert iterations(s3, bucket, "window/") == [1, 6, 8, 10, 12]
    assert strange <= {*keys(s3, bucket)}
    assert files_left(spools) == []


def away(rank: int, world_size: int, state: str, spools: str) -> Any:
    """A store that is away for some saves: what is there whole, what is on the disk, and after."""
    trainer, put_file, said = TinyTrainer(BASE), ObjectStore.put_file, list[str]()
    average = online(trainer, METHODS["sma"])

    def fails(self: ObjectStore, key: str, path: Path) -> str:
        raise OSError(5, "the store is away", key)

    def save(count: int) -> list[int | None]:
        for _ in range(count):
            train(trainer, 2, average)
            average.save_state(state)
        average.wait_for_uploads(PATIENCE_S)
        return [ref.iteration for ref in list_checkpoints(state) if ref.complete]

    class Told(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("pma_megatron.online").addHandler(Told())
    save(2)
    ObjectStore.put_file = fails  # type: ignore[method-assign]
    there = save(4)
    on_disk = sorted(path.parent.name for path in Path(spools).rglob("iter_*/metadata.json"))
    ObjectStore.put_file = put_file  # type: ignore[method-assign]
    return there, on_disk, save(1), said


def test_what_is_not_in_the_store_keeps_older_entries_there(
    s3: Any, bucket: str, spools: Path
) -> None:
    """It is told, nothing is deleted, and the next save goes on with what the window needs."""
    outputs = str(spools / "outputs")
    ((there, on_disk, after, said),) = run_ranks(away, 1, f"s3://{bucket}/window", outputs)
    assert there == [2, 4] and after == [8, 10, 12, 14]
    assert on_disk == [f"iter_{each:07d}" for each in (6, 8, 10, 12)]
    assert any("the store is away" in each for each in said)
    assert any("did not get to" in each for each in said)
    assert files_left(spools) == []


def window_after(rank: int, world_size: int, state: str) -> list[int]:
    """What a job goes on with that resumes much later."""
    trainer = TinyTrainer(BASE)
    average = online(trainer, METHODS["sma"])
    average.load_state(state, 100, 100 * TOKENS)
    return [entry.iteration for entry in average.entries]


@pytest.mark.parametrize("stage", ["snapshot-part", "snapshot-put", "snapshot-old"])
def test_killed_on_its_way(
    s3: Any, bucket: str, got: Got, tmp_path: Path, stage: str, spools: Path
) -> None:
    """Whatever is listed as whole is, and the next job goes on from all that was on the disk.

    How far training got by then is chance: only what is old has more saves than a window holds.
    """
    state, saves = f"s3://{bucket}/window", 6 if stage == "snapshot-old" else LAST
    with inject(stage, rank=0, action="kill"):
        (end,) = rank_outcomes(window_of, 1, state, saves)
    assert end.signal == "SIGKILL"
    refs = list_checkpoints(state)
    for ref in (each for each in refs if each.complete):
        name = f"iter_{ref.iteration:07d}"
        verify(got(f"window/{name}", tmp_path / "copy" / name))
    cut_off = [ref for ref in refs if not ref.complete]
    assert len(cut_off) == (stage != "snapshot-put")
    (entries,) = run_ranks(window_after, 1, state)
    assert len(entries) == LAST if stage == "snapshot-old" else entries[0] == 2, entries
    assert files_left(spools) == []


def test_an_entry_that_is_given_up_on_its_way_is_not_mixed_with_the_next(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is the new one deleted for the old one's sake, whichever file is under way."""
    put_file, chunks = ObjectStore.put_file, simple_chunks(0, 1)

    def slow(self: ObjectStore, key: str, path: Path) -> str:
        time.sleep(0.1)
        return put_file(self, key, path)

    monkeypatch.setattr(ObjectStore, "put_file", slow)
    writer = SnapshotWriter(f"s3://{bucket}/window", chunks, torch.float32, Comm())
    for number in range(4):
        writer.write(5, simple_data(chunks, 100 + number), {})
        writer.wait(PATIENCE_S)
        time.sleep(0.12 * number)
        writer.give_up([5])
    for iteration in (5, 6):
        writer.write(iteration, simple_data(chunks, iteration), {})
        writer.wait(PATIENCE_S)
    writer.wait_for_uploads(PATIENCE_S)
    for iteration in (5, 6):
        name = f"iter_{iteration:07d}"
        assert_whole(got(f"window/{name}", tmp_path / name), iteration)
    assert [ref.complete for ref in list_checkpoints(f"s3://{bucket}/window")] == [True, True]
    assert files_left(spools) == []


# Averages as checkpoints.

FLAGS = "--pma-save --pma-last 2 --pma-interval-tokens {tokens} --pma-save-dir {place}"


def trained(rank: int, world_size: int, root: str, place: str, late: bool) -> None:
    """A job with Megatron's hooks that saves after 2 and after 4 iterations."""
    tokens = DENSE.global_batch_size * DENSE.seq_length
    flags = FLAGS.format(tokens=tokens, place=place)
    args = parse(flags, save=root, seq_length=DENSE.seq_length)
    args.consumed_train_samples = 0
    keep(args)
    unfinished: list[Path] = []

    def save_average() -> None:
        folder = trainer.save(global_vars().get_args().save)
        if late and rank == 0:  # as with --async-save
            config = folder / "metadata.json"
            unfinished.append(config.rename(config.with_suffix(".late")))

    trainer = TinyTrainer(DENSE)
    hooks.ready(trainer.models, trainer.optimizer, trainer.scheduler)
    for iteration in range(1, 5):
        trainer.train(1)
        args.consumed_train_samples = trainer.consumed_samples
        hooks.stepped({"iteration": iteration})
        if iteration % 2 == 0:
            hooks.saving()
            trainer.save(root)
            saved = {"iteration": iteration, "optimizer": trainer.optimizer}
            hooks.saved(lambda **_: save_average(), saved)
    trainer.close()
    for path in unfinished:
        path.rename(path.with_suffix(".json"))


def loaded(rank: int, world_size: int, root: str) -> Any:
    trainer = TinyTrainer(DENSE)
    trainer.load(root)
    found = held(trainer)
    trainer.close()
    return found


@pytest.fixture(scope="module")
def on_a_disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The averages of such a job in a folder."""
    folder = tmp_path_factory.mktemp("disk")
    run_ranks(trained, 2, str(folder / "run"), str(folder / "averages"), False)
    return folder / "averages"


@pytest.mark.parametrize("late", [False, True])
def test_averages_are_those_of_a_disk(
    late: bool, s3: Any, bucket: str, got: Got, on_a_disk: Path, tmp_path: Path, spools: Path
) -> None:
    """Bit for bit, whole, with checksums; a trainer goes on from a copy; the disk is empty."""
    place = f"s3://{bucket}/averages"
    ranks = 1 if late else 2
    run_ranks(trained, ranks, str(tmp_path / "run"), place, late, preloaded=False)
    refs = list_checkpoints(place)
    assert [(ref.iteration, ref.complete) for ref in refs] == [(2, True), (4, True)]
    copy = got("averages", tmp_path / "copy")
    tracker = "latest_checkpointed_iteration.txt"
    assert (copy / tracker).read_text() == (on_a_disk / tracker).read_text() == "4"
    for iteration in (2, 4):
        verify(folder_of(copy, iteration))
        assert compare(folder_of(copy, iteration), folder_of(on_a_disk, iteration)).same
    pairs = zip(*(run_ranks(loaded, 2, str(root)) for root in (copy, on_a_disk)), strict=True)
    for one, other in pairs:
        assert_same(one, other)
    assert files_left(spools) == []


def test_a_folder_of_another_run_is_taken_by_no_flag(
    dense_run: Path, on_a_disk: Path, tmp_path: Path
) -> None:
    """Nothing is written there, which the run's own fixture looks at; a restart goes on."""
    for end in rank_outcomes(trained, 2, str(tmp_path / "run"), str(dense_run), False):
        assert not end.ok and "is not a running average" in end.traceback
    averages = shutil.copytree(on_a_disk, tmp_path / "averages")
    run_ranks(trained, 2, str(tmp_path / "run"), str(averages), False)
    assert sorted(path.name for path in averages.glob("iter_*")) == ["iter_0000002", "iter_0000004"]
    assert not [*averages.glob(".pma-*")]


def test_an_average_that_was_cut_off_goes_there_with_the_next_job(
    s3: Any, bucket: str, got: Got, tmp_path: Path, spools: Path
) -> None:
    """Nothing that is listed as whole is not; the tracker names what is there."""
    place = f"s3://{bucket}/averages"
    with inject("snapshot-part", rank=0, action="kill"):
        (end,) = rank_outcomes(saved_alone, 1, place, (3, 4))
    assert end.signal == "SIGKILL"
    assert not any(ref.complete for ref in list_checkpoints(place))
    tracker = "averages/latest_checkpointed_iteration.txt"
    assert tracker not in keys(s3, bucket)
    run_ranks(saved_alone, 1, place, (6,))
    copy = got("averages", tmp_path / "copy")
    refs = list_checkpoints(place)
    assert [ref.iteration for ref in refs if ref.complete] == [3, 6]
    for iteration in (3, 6):
        verify(folder_of(copy, iteration))
    assert s3.get_object(Bucket=bucket, Key=tracker)["Body"].read() == b"6"
    assert files_left(spools) == []


def saved_alone(rank: int, world_size: int, place: str, iterations: tuple[int, ...]) -> None:
    """Averages that are saved as hooks do it, by hand: one by one, and put there one by one."""
    trainer = TinyTrainer(DENSE)
    average = OnlineAverage(trainer.models, trainer.optimizer, METHODS["sma"], 2, 1)
    there = average.place(place)
    for iteration in range(1, max(iterations) + 1):
        trainer.train(1)
        average.step(iteration, iteration)
        if iteration in iterations:
            there.begin(f"iter_{iteration:07d}")
            made = average.average()
            assert made is not None
            with average.averaged_state():
                folder = trainer.save(str(there.folder))
            note_origin(folder, made, there, at_exit=True)
            there.wait(PATIENCE_S)


def full(rank: int, world_size: int, place: str) -> list[int]:
    """A job whose store is away for a while, on a disk with room for one average."""
    trainer, put_file, usage = TinyTrainer(DENSE), ObjectStore.put_file, shutil.disk_usage
    average = OnlineAverage(trainer.models, trainer.optimizer, METHODS["sma"], 2, 1)
    there, saved = average.place(place), list[int]()

    def fails(self: ObjectStore, key: str, path: Path) -> str:
        raise OSError(5, "the store is away", key)

    def save(iteration: int) -> None:
        trainer.train(1)
        average.step(iteration, iteration)
        made = average.average()
        with contextlib.suppress(NotSavedError):
            there.begin(f"iter_{iteration:07d}")
            assert made is not None
            with average.averaged_state():
                folder = trainer.save(str(there.folder))
            if rank == 0:  # as the hooks do: another rank would write into what is on its way
                note_origin(folder, made, there, at_exit=True)
            saved.append(iteration)
        there.wait(PATIENCE_S)

    trainer.train(1)
    average.step(1, 1)
    ObjectStore.put_file = fails  # type: ignore[method-assign]
    save(2)
    waits = there.folder / "iter_0000002"
    shutil.disk_usage = lambda path: (  # type: ignore[assignment]
        usage(path)._replace(free=1000) if waits.exists() else usage(path)
    )
    save(3)
    ObjectStore.put_file = put_file  # type: ignore[method-assign]
    save(4)  # the one before is on its way by now
    save(5)
    return saved


def test_a_full_disk_ends_no_training(s3: Any, bucket: str, spools: Path) -> None:
    """What waits for the store stays, and none is saved where it would not fit."""
    place = f"s3://{bucket}/averages"
    saved, other = run_ranks(full, 2, place)
    assert saved == other and saved[0] == 2 and 3 not in saved and saved[-1] == 5
    assert [ref.iteration for ref in list_checkpoints(place) if ref.complete] == saved
    assert files_left(spools) == []


def begun(rank: int, world_size: int, place: str) -> str:
    """What a job with its averages there is told."""
    try:
        AveragePlace(place, Comm())
    except PmaError as error:
        return str(error)
    return "taken"


def test_a_place_with_other_checkpoints_is_refused(
    s3: Any, bucket: str, put: Put, dense_run: Path, spools: Path
) -> None:
    """By all ranks, before anything is put there."""
    address = put(dense_run, "run")
    before = keys(s3, bucket)
    for said in run_ranks(begun, 2, address):
        assert "is a checkpoint that is not a running average" in said
    assert "a whole bucket" in begun(0, 1, f"s3://{bucket}")
    assert "cannot go to" in begun(0, 1, "s3://no-such-bucket-here/averages")
    assert '"profile" not found' in begun(0, 1, "msc://profile/averages")
    assert keys(s3, bucket) == before


def test_what_flags_take() -> None:
    """A window in use is no file of a store: what to give instead is said before anything is."""
    flags = "--pma-save --pma-interval-tokens 8B"
    found = argument_parser.settings(parse(f"{flags} --pma-save-dir s3://b/averages"))
    assert found.save_dir == "s3://b/averages"
    with pytest.raises(UsageError, match="folder of a node-local disk"):
        argument_parser.settings(parse(f"{flags} --pma-window-dir s3://b/window"))
    same = parse(f"{flags} --pma-save-dir s3://b/a --pma-snapshot-dir s3://b/a/ "
                 "--pma-snapshot-interval-tokens 1B", save="/ckpts/run")  # fmt: skip
    with pytest.raises(UsageError, match="is the folder of"):
        argument_parser.validate(same)
