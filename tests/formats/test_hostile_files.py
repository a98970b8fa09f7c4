"""Hostile files and folders: nothing is opened or written elsewhere, whatever names say."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from conftest import folder_of, request_for
from pma_megatron import SelectionRequest, list_checkpoints, merge, verify
from pma_megatron.base.openfiles import create_inside, open_inside, open_source
from pma_megatron.cli import main
from pma_megatron.errors import PublishError
from pma_megatron.formats.inert import fields_of
from pma_megatron.formats.pickles import dump_inert, load_inert

ATTACK = Path(__file__).parents[2] / "launch" / "attack"


def test_nothing_is_written_outside_the_staging_folder(tmp_path: Path) -> None:
    staging, outside = tmp_path / "staging", tmp_path / "outside"
    outside.mkdir()
    create_inside(staging, "a/b", 3)
    assert (staging / "a" / "b").stat().st_size == 3
    (staging / "link").symlink_to(outside)
    (staging / "file").symlink_to(outside / "file")
    for name in ("../outside/x", f"{outside}/x", "link/x", "file", "a/../../outside/x", "", "a\0"):
        with pytest.raises(OSError):
            open_inside(staging, name, os.O_CREAT | os.O_RDWR)
    assert not list(outside.iterdir())


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "device"])
def test_sources_are_plain_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "source"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    with pytest.raises(OSError):
        open_source(path)
    assert path.exists() == (kind != "missing")


def test_shards_may_be_links(run: Path, save: Path, tmp_path: Path) -> None:
    """Old shards on other storage, with links in their place: followed, and only read."""
    shard = folder_of(run, 6) / "__0_0.distcp"
    moved = tmp_path / "cold"
    shard.rename(moved)
    shard.symlink_to(moved)
    moved.chmod(0o400)
    merge(request_for(run, save))
    verify(folder_of(save, 8))


def test_a_name_that_leaves_the_folder_is_refused_before_anything_is_made(
    run: Path, save: Path, tmp_path: Path
) -> None:
    """The way in of old: `PosixPath` is changed first, so that no path seems absolute."""
    path = folder_of(run, 8) / ".metadata"
    value = load_inert(path.read_bytes(), what=".metadata", walked=False)
    for info in fields_of(value)["storage_data"].values():  # type: ignore[index]
        info.state["relative_path"] = str(tmp_path / "escaped")
    times = path.stat()
    path.write_bytes(dump_inert(value))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    (bad,) = [ref for ref in list_checkpoints(run) if not ref.complete]
    assert bad.iteration == 8 and "points outside the checkpoint" in str(bad.incomplete_because)
    merge(request_for(run, save, selection=SelectionRequest(last=2, exclude=(8,))))
    assert folder_of(save, 6).is_dir() and not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("late", [False, True])
def test_the_publisher_makes_no_folder_of_a_link(
    save: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Another user of a shared folder waits for the staging folder, and puts a link into it.

    One that is there already is removed; one that comes once that was looked at is refused.
    """
    from pma_megatron.merging import publish

    outside = tmp_path / "outside"
    outside.mkdir()
    target = publish.Target(save, folder_of(save, 8), save / ".pma-staging-x")
    target.staging.mkdir(parents=True)
    (target.staging / "__0_0.distcp").symlink_to(outside / "x")
    plan: Any = Namespace(layouts={target.folder: Namespace(files={"__0_0.distcp": 10})})
    if late:
        monkeypatch.setattr(publish, "_only", lambda folder, files: set())
        with pytest.raises(PublishError, match="cannot write"):
            publish.stage(plan, [target])
    else:
        publish.stage(plan, [target])
        made = target.staging / "__0_0.distcp"
        assert not made.is_symlink() and made.stat().st_size == 10
    assert not list(outside.iterdir())


def test_a_long_name_is_no_folder(tmp_path: Path) -> None:
    from pma_megatron.errors import SelectionError

    with pytest.raises(SelectionError, match="is not a folder"):
        list_checkpoints(tmp_path / ("x" * 5000))


def test_thousands_of_hostile_checkpoints(dense_run: Path, tmp_path: Path) -> None:
    """A part of `launch/attack/mutations.py`, which says what it watches."""
    runs = tmp_path / "runs"
    for iteration in (4, 6, 8):
        shutil.copytree(folder_of(dense_run, iteration), folder_of(runs / "megatron", iteration))
    done = subprocess.run(
        [sys.executable, ATTACK / "mutations.py", "--count", "120", "--runs", runs],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["outcomes"]["refused"] > 30 and found["outcomes"]["merged"] > 10


def test_names_are_no_markup(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What people see is what the file says, and no instruction to the terminal."""
    for text in ("[/a]", "[bold]", ":smile:"):
        path = folder_of(run, 8) / "metadata.json"
        path.write_text(json.dumps({"sharded_backend": text}))
        assert main(["list", str(run)]) == 0
        assert repr(text) in capsys.readouterr().out
