"""What jobs that were cut off leave, names that are taken, and sweeps that were half published."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import after_first_unit, as_a_user, digests, folder_of, refused, request_for
from pma_megatron import Method, SelectionRequest, merge, verify
from pma_megatron.base.faults import InjectedFault
from pma_megatron.errors import PmaError, PublishError
from pma_megatron.formats.marker import MARKER_FILE, OWN_FILES, SEAL_FILE
from pma_megatron.merging import leftovers, locks, publish
from pma_megatron.testing import inject
from small_disks import mount, unmount

TRACKER = "latest_checkpointed_iteration.txt"
OTHER = "iter_0000099"


def listing(folder: Path) -> dict[str, str]:
    """Every name below `folder`, and what it is."""
    found = {}
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        found[str(path.relative_to(folder))] = kind
    return found


def names(save: Path) -> list[str]:
    return sorted(path.name for path in save.iterdir())


def left_by(save: Path, name: str, token: str = "0badcafe") -> list[Path]:
    """What a job for `name` leaves that was killed while it wrote."""
    staging = save / f".pma-staging-{name}-{token}"
    (staging / "sub").mkdir(parents=True)
    (staging / "sub" / "__0_0.distcp").write_bytes(b"half")
    lock = save / f".pma-lock-{name}"
    lock.write_text("process 1 on gone writing")
    return [staging, lock]


# Debris.


def test_debris_of_other_targets_is_collected(dense_run: Path, save: Path) -> None:
    left_by(save, OTHER)
    left_by(save, "iter_0000050", token="00000001")
    left_by(save, "iter_0000008")
    merge(request_for(dense_run, save))
    assert names(save) == ["iter_0000008", TRACKER]


def test_debris_in_the_folders_of_a_sweep(dense_run: Path, save: Path) -> None:
    left_by(save / "sma-last2", OTHER)
    left_by(save / "elsewhere", OTHER)
    merge(request_for(dense_run, save, sweep=("sma,wma:2",)))
    assert names(save / "sma-last2") == ["iter_0000008", TRACKER]
    assert len(names(save / "elsewhere")) == 2  # no folder of this job


def test_a_cut_off_job_keeps_all_that_it_staged_in_a_folder(tmp_path: Path) -> None:
    """A merge of something else removes no part of it, whichever target its journal names first."""
    for name in ("iter_0000010", "hf"):
        (tmp_path / f".pma-staging-{name}-0badcafe").mkdir()
    journal = tmp_path / ".pma-journal-iter_0000010-0badcafe"
    journal.mkdir()
    targets = [[str(tmp_path / "iter_0000010")], [str(tmp_path / "hf")]]
    (journal / "job.json").write_text(json.dumps({"targets": targets}))
    before = {path.name for path in tmp_path.iterdir()}
    other = leftovers.Target(tmp_path, tmp_path / "iter_0000020", tmp_path / ".pma-staging-x")
    with leftovers.locked([other]):
        pass
    assert before <= {path.name for path in tmp_path.iterdir()}


def test_debris_of_a_job_that_lives_stays(dense_run: Path, save: Path) -> None:
    """Another job is writing there for another iteration, as its lock says."""
    staging, lock = left_by(save, OTHER)
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        merge(request_for(dense_run, save))
        assert {staging.name, lock.name} < set(names(save))
        assert (staging / "sub" / "__0_0.distcp").read_bytes() == b"half"
    merge(request_for(dense_run, save, overwrite=True))
    assert names(save) == ["iter_0000008", TRACKER]


def test_a_cleaner_is_waited_for(
    dense_run: Path, save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who only puts right what another job left holds its lock for a moment."""
    save.mkdir()
    lock = save / ".pma-lock-iter_0000008"
    lock.write_text("process 1 on here cleaning")
    held = lock.open()
    fcntl.flock(held, fcntl.LOCK_EX)

    def done(seconds: float) -> None:
        lock.unlink()
        held.close()

    monkeypatch.setattr(locks.time, "sleep", done)
    merge(request_for(dense_run, save))
    assert names(save) == ["iter_0000008", TRACKER]


def test_without_locks_nothing_is_collected(
    dense_run: Path, save: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where nothing tells whether a job lives, what it would have left stays, and is named."""
    staging = [left_by(save, name)[0] for name in (OTHER, "iter_0000008")]

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    merge(request_for(dense_run, save))
    for folder in staging:
        assert folder.is_dir()
        assert folder.name in caplog.text
    verify(folder_of(save, 8))


def test_a_checkpoint_that_was_being_replaced_comes_back(dense_run: Path, save: Path) -> None:
    """Of another iteration, where folders cannot be exchanged."""
    merge(request_for(dense_run, save))
    before = digests(folder_of(save, 8))
    folder_of(save, 8).rename(save / ".pma-replaced-iter_0000008")
    merge(request_for(dense_run, save, selection=SelectionRequest(iterations=(4, 6))))
    assert digests(folder_of(save, 8)) == before
    assert names(save) == ["iter_0000006", "iter_0000008", TRACKER]


def test_a_publication_without_its_tracker_is_finished(dense_run: Path, save: Path) -> None:
    """Killed right before the last step: the next job there, for another iteration, does it."""
    older = SelectionRequest(iterations=(4, 6))
    with inject("tracker", rank=0, action="raise"), pytest.raises(InjectedFault):
        merge(request_for(dense_run, save, selection=older))
    assert not (save / TRACKER).exists()
    with inject("stage", rank=0, action="raise"), pytest.raises(InjectedFault):
        merge(request_for(dense_run, save))
    assert names(save) == ["iter_0000006", TRACKER]
    assert (save / TRACKER).read_text() == "6"


@pytest.mark.parametrize("stage", ["stage", "merge", "publish"])
def test_folders_made_for_nothing_go(dense_run: Path, tmp_path: Path, stage: str) -> None:
    with inject(stage, rank=0, action="raise"), pytest.raises(InjectedFault):
        merge(request_for(dense_run, tmp_path / "new" / "deep", sweep=("sma,wma:2",)))
    assert listing(tmp_path) == {}


# Names that are taken.


def _folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")


FINAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda p: p.write_text("mine"), "is a file"),
    "dangling link": (lambda p: p.symlink_to("gone"), "is a symbolic link (to gone)"),
    "link to a folder": (lambda p: p.symlink_to(p.parent), "is a symbolic link"),
    "mount point": (lambda p: mount(p, "size=65536"), "is a mount point"),
    "foreign folder": (_folder, "did not write"),
    "empty folder": (lambda p: p.mkdir(), "did not write"),
    "pipe": (lambda p: os.mkfifo(p), "is no file"),
}
ROOT: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (lambda p: p.write_text("mine"), "is a file, no folder"),
    "dangling link": (lambda p: p.symlink_to("gone"), "is a symbolic link (to gone), no folder"),
}


@pytest.fixture
def unmounted(save: Path) -> Iterator[None]:
    yield
    final = folder_of(save, 8)
    if final.is_dir() and os.path.ismount(final):
        unmount(final)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", FINAL)
def test_final_name_is_taken(
    dense_run: Path, save: Path, unmounted: None, kind: str, overwrite: bool
) -> None:
    make, words = FINAL[kind]
    save.mkdir()
    make(folder_of(save, 8))
    before = listing(save)
    with pytest.raises(PublishError) as caught:
        merge(request_for(dense_run, save, overwrite=overwrite))
    assert words in str(caught.value) and "save=" in str(caught.value)
    assert listing(save) == before


@pytest.mark.parametrize("kind", ROOT)
def test_root_is_no_folder(dense_run: Path, save: Path, kind: str) -> None:
    make, words = ROOT[kind]
    make(save)
    before = listing(save.parent)
    with pytest.raises(PublishError) as caught:
        merge(request_for(dense_run, save))
    assert words in str(caught.value)
    assert listing(save.parent) == before


def test_tracker_is_a_folder(dense_run: Path, save: Path) -> None:
    _folder(save.parent / "aside")
    save.mkdir()
    shutil.move(save.parent / "aside", save / TRACKER)
    before = listing(save)
    with pytest.raises(PublishError, match="is a folder, and must become the file"):
        merge(request_for(dense_run, save))
    assert listing(save) == before


def test_no_output_goes_into_a_checkpoint(dense_run: Path, run: Path, save: Path) -> None:
    """Of another run, of this tool, or of DeepSpeed; a folder called `release` may be any."""
    merge(request_for(dense_run, save / "release"))
    tag = save / "tag"
    tag.mkdir()
    (tag / "mp_rank_00_model_states.pt").touch()
    for inside in (
        folder_of(run, 2),
        folder_of(run, 2) / "a" / "b",
        tag,
        tag / "sub",
        folder_of(save / "release", 8) / "out",
    ):
        with refused(PublishError, "a checkpoint", "Give merges a folder", run=run, save=save):
            merge(request_for(dense_run, inside))


def test_what_somebody_put_into_a_merge_is_not_deleted(dense_run: Path, save: Path) -> None:
    merge(request_for(dense_run, save))
    note = folder_of(save, 8) / "notes" / "mine.txt"
    note.parent.mkdir()
    note.write_text("mine")
    with refused(PublishError, "notes/mine.txt", "Move what is yours", run=dense_run, save=save):
        merge(request_for(dense_run, save, overwrite=True))
    note.unlink()
    merge(request_for(dense_run, save, overwrite=True))


@pytest.mark.parametrize("pma_json", ["as it was", "damaged", "of another seal", "without files"])
def test_what_somebody_put_into_a_merge_is_safe_whatever_its_pma_json_says(
    dense_run: Path, save: Path, pma_json: str
) -> None:
    merge(request_for(dense_run, save))
    folder = folder_of(save, 8)
    marker, seal = folder / MARKER_FILE, folder / SEAL_FILE
    if pma_json == "damaged":
        marker.write_bytes(marker.read_bytes()[:-40])
    elif pma_json == "of another seal":
        seal.write_text("0")
    elif pma_json == "without files":
        marker.write_text('{"pma_megatron": "0.1.0"}')
        seal.unlink()
    request = request_for(dense_run, save, overwrite=True)
    (folder / "backup").mkdir()
    link, file = folder / "backup" / "link", folder / "backup" / "mine"
    link.symlink_to("/nowhere")
    file.write_text("x")
    with refused(PublishError, "backup/link, backup/mine", run=dense_run, save=save):
        merge(request)
    file.unlink()
    with refused(PublishError, "backup/link", "would be lost", run=dense_run, save=save):
        merge(request)
    link.unlink()
    merge(request)
    verify(folder)
    assert not (folder / "backup").exists()


def test_what_cannot_be_removed_is_said(dense_run: Path, tmp_path: Path, save: Path) -> None:
    """By the job that replaced it, and by the next one, which claims nothing else."""
    merge(request_for(dense_run, save))
    folder_of(save, 8).chmod(0o555)
    command = f"merge --load {dense_run} --last 2 --save {save} --overwrite"
    first, second = as_a_user(tmp_path, command, command)
    (left,) = save.glob(".pma-staging-*")
    for text in (first, second):
        assert text.endswith("code 0") and f"{left} could not be removed ({left}/" in text
        assert f"chmod -R u+rwX {left} && rm -r {left}" in text
        assert "pma: removed" not in text
    assert first.count("could not") == 1
    left.chmod(0o755)
    (third,) = as_a_user(tmp_path, command)
    assert f"removed {left}" in third
    assert names(save) == ["iter_0000008", TRACKER]


def test_names_too_long(dense_run: Path, save: Path) -> None:
    for name, words in (("n" * 300, "300 bytes"), ("/".join(["n" * 200] * 21), "the system takes")):
        with refused(PublishError, words, "choose a shorter", run=dense_run, save=save):
            merge(request_for(dense_run, save / name))


def test_folders_that_may_not_be_looked_at(dense_run: Path, tmp_path: Path) -> None:
    """No traceback from anywhere, and the merge names what it may not see."""
    locked, run = tmp_path / "locked", tmp_path / "run"
    for folder in (locked, run / "a", run / "b"):
        folder.mkdir(parents=True)
        folder.chmod(0o444 if folder.name == "b" else 0)
    commands = [f"plan --load {dense_run} --last 2 --save {to}" for to in ("locked", "locked/out")]
    long = "n" * 300
    commands += ["list run", "list /proc", f"list {long}", f"inspect {long}", f"verify {long}"]
    commands += ["inspect locked/x", "verify locked/x", "list locked"]
    commands += [f"geometry --load {dense_run} --out locked/x/y"]
    told = as_a_user(tmp_path, *commands)
    assert len(told) == len(commands)
    for text in told[:2]:
        assert "locked" in text and "Permission denied" in text and "chmod" in text
    assert "no iter_* checkpoint" in told[2] and "no iter_* checkpoint" in told[3]
    assert all(text.endswith(("code 1", "code 2")) for text in told), told
    locked.chmod(0o700)
    assert not list(locked.iterdir())


@pytest.mark.parametrize("what", ["root", "staging"])
def test_folders_vanish(dense_run: Path, save: Path, what: str) -> None:
    def vanish() -> None:
        for folder in [save] if what == "root" else save.glob(".pma-staging-*"):
            shutil.rmtree(folder)

    with pytest.raises(PublishError, match="No such file"):
        merge(request_for(dense_run, save), show=after_first_unit(vanish))
    assert not save.exists()


def test_what_a_live_job_takes_away_is_not_counted(
    save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is locked while it is counted: a job that lives renames and removes its folders."""
    target = leftovers.Target(save, save / "iter_0000008", save).staged_as("0badcafe")
    plain = os.scandir
    for gone in (target.staging, target.staging / "deeper"):
        (target.staging / "deeper").mkdir(parents=True)
        for folder in (target.staging, target.staging / "deeper"):
            (folder / "file").write_bytes(bytes(8192))
        assert leftovers.staged_bytes(target) >= 2 * 8192

        def going(path: str, gone: Path = gone) -> Iterator[os.DirEntry[str]]:
            entries = plain(path)
            if Path(path) == gone:
                shutil.move(gone, save / "moved")
            return entries

        monkeypatch.setattr(os, "scandir", going)
        left = leftovers.staged_bytes(target)
        monkeypatch.setattr(os, "scandir", plain)
        assert left < 2 * 8192
        shutil.rmtree(save)


# Sweeps.

SWEEP = ("sma,wma:2",)


def half_published(dense_run: Path, save: Path, monkeypatch: pytest.MonkeyPatch) -> PmaError:
    """Make a sweep fail between its two publications."""
    plain, done = publish.publish, []

    def once(*arguments: object) -> None:
        if done:
            raise PublishError("the second one fails")
        plain(*arguments)  # type: ignore[arg-type]
        done.append(1)

    with monkeypatch.context() as patched:
        patched.setattr(publish, "publish", once)
        with pytest.raises(PublishError) as caught:
            merge(request_for(dense_run, save, sweep=SWEEP))
    return caught.value


def test_half_a_sweep_is_said_and_finished(
    dense_run: Path, save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = half_published(dense_run, save, monkeypatch)
    first, second = (folder_of(save / name, 8) for name in ("sma-last2", "wma-last2"))
    assert error.published == (str(first),) and error.unpublished == (str(second),)
    before = digests(first)
    report = merge(request_for(dense_run, save, sweep=SWEEP))
    assert report.outputs == (str(first), str(second))
    assert len(report.verification) == 2
    assert digests(first) == before
    merge(request_for(dense_run, tmp_path / "whole", sweep=SWEEP))
    for folder in (first, second):
        verify(folder)
        whole = digests(tmp_path / "whole" / folder.relative_to(save))
        found = digests(folder)
        assert {k for k in found if found[k] != whole[k]} <= {*OWN_FILES, ".metadata"}
    with pytest.raises(PublishError, match="overwrite=True"):
        merge(request_for(dense_run, save, sweep=SWEEP))


@pytest.mark.parametrize("other", ["method", "selection"])
def test_a_sweep_does_not_keep_what_another_request_made(
    dense_run: Path, save: Path, other: str
) -> None:
    requests = {
        "method": {"method": Method(name="custom", values=(0.25, 0.75))},
        "selection": {"selection": SelectionRequest(iterations=(4, 8))},
    }
    merge(replace(request_for(dense_run, save / "sma-last2"), **requests[other]))  # type: ignore[arg-type]
    before = listing(save)
    with pytest.raises(PublishError, match="exists"):
        merge(request_for(dense_run, save, sweep=SWEEP))
    assert listing(save) == before
