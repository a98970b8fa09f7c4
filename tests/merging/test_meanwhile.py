"""What comes to be where a merge is about to publish, while it is at work, and is not lost."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, folder_of, request_for
from pma_megatron import SelectionRequest, merge, verify
from pma_megatron.errors import PublishError
from pma_megatron.formats import holding
from pma_megatron.merging import job, publish

TRACKER = "latest_checkpointed_iteration.txt"


def trained(run: Path, save: Path, iteration: int) -> None:
    """A trainer has saved into that folder."""
    shutil.copytree(folder_of(run, iteration), folder_of(save, iteration), dirs_exist_ok=True)
    (folder_of(save, iteration) / "notes.txt").write_text("of somebody")
    (save / TRACKER).write_text(str(iteration))


def first(module: Any, name: str, work: Callable[[], None], patch: pytest.MonkeyPatch) -> None:
    """Have `work` done before a function is called for the first time."""
    real, todo = getattr(module, name), [work]

    def called(*given: Any, **settings: Any) -> Any:
        if todo:
            todo.pop()()
        return real(*given, **settings)

    patch.setattr(module, name, called)


@pytest.mark.parametrize(("iteration", "when"), [(8, "verified"), (8, "renamed"), (6, "verified")])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_trainer_that_saves_there_loses_nothing(
    dense_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    iteration: int,
    overwrite: bool,
    when: str,
) -> None:
    """By the name of the output, or beside it, where the tracker would go back."""
    save = tmp_path / "merged"
    request = request_for(dense_run, save, overwrite=overwrite)
    if overwrite:
        merge(request)
    state: dict[str, str] = {}

    def saved() -> None:
        if overwrite and iteration == 8:  # as a trainer does that deletes before it writes
            shutil.rmtree(folder_of(save, 8))
        trained(dense_run, save, iteration)
        state.update(digests(folder_of(save, iteration)))

    with monkeypatch.context() as patch:
        if when == "verified":
            first(job.verification, "verify_output", saved, patch)
        else:
            first(publish, "_rename", saved, patch)
        with pytest.raises(PublishError) as caught:
            merge(request)
    assert digests(folder_of(save, iteration)) == state
    assert (save / TRACKER).read_text() == str(iteration)
    assert caught.value.published == ()
    # What was made is kept, and once that is elsewhere the same command goes on.
    assert caught.value.kept is not None and Path(caught.value.kept).is_dir()
    shutil.move(folder_of(save, iteration), tmp_path / "moved")
    (save / TRACKER).unlink()
    report = merge(request)
    assert report.reused["units"] > 0
    verify(folder_of(save, 8))
    assert (save / TRACKER).read_text() == "8"


def test_another_merge_that_publishes_there_first_is_not_replaced(
    dense_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ran on a machine that does not see the lock."""
    save, other = tmp_path / "merged", tmp_path / "other"
    merge(request_for(dense_run, other, selection=SelectionRequest(last=3)))
    first(
        job.verification,
        "verify_output",
        lambda: shutil.copytree(folder_of(other, 8), folder_of(save, 8)) and None,
        monkeypatch,
    )
    with pytest.raises(PublishError, match="has come to be while this merge") as caught:
        merge(request_for(dense_run, save))
    assert caught.value.published == ()
    assert digests(folder_of(save, 8)) == digests(folder_of(other, 8))


@pytest.mark.parametrize(
    ("mounted", "goes"), [("lustre x rw,localflock", False), ("ext4 x rw", True)]
)
def test_a_lock_that_other_machines_do_not_see_tells_not_that_a_job_is_gone(
    dense_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    mounted: str,
    goes: bool,
) -> None:
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    file = tmp_path / "mountinfo"
    file.write_text("\n".join(f"{line.partition(' - ')[0]} - {mounted}" for line in table))
    monkeypatch.setattr(holding, "_MOUNTS", file)
    save = tmp_path / "merged"
    staging = save / ".pma-staging-iter_0000008-0badcafe"
    staging.mkdir(parents=True)
    (staging / "__0_0.distcp").write_bytes(b"of a job on another machine")
    with caplog.at_level(logging.WARNING):
        merge(request_for(dense_run, save))
    assert staging.exists() is not goes
    assert ("nothing tells here whether a job still uses it" in caplog.text) is not goes
    verify(folder_of(save, 8))


@pytest.fixture
def twice(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """One folder by two names that no link tells of."""
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.mkdir()
    try:
        subprocess.run(["mount", "--bind", one, other], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a bind mount is not permitted here")
    yield one, other
    subprocess.run(["umount", other], check=True)


def test_a_source_by_another_mount_is_a_source(dense_run: Path, twice: tuple[Path, Path]) -> None:
    one, other = twice
    for iteration in (6, 8):
        selection = SelectionRequest(last=2, end_iteration=iteration)
        merge(request_for(dense_run, one / "averages", selection=selection))
    before = digests(one)
    for save in (other / "averages", other / "averages" / "iter_0000006" / "below"):
        with pytest.raises(PublishError):
            merge(request_for(one / "averages", save, overwrite=True))
    assert digests(one) == before
    assert not os.path.samestat(one.stat(), one.parent.stat())
