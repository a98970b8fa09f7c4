"""`pma prune` on real checkpoints: what is gone, what is left, and whom it waits for."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import call

from conftest import digests, folder_of, request_for
from pma_megatron import PruneRequest, SelectionRequest, list_checkpoints, merge, prune
from pma_megatron.errors import CheckpointError, SelectionError
from pma_megatron.formats import holding as locks
from pma_megatron.formats import registry
from pma_megatron.formats.holding import alone_with, holding
from pma_megatron.retention import decision, pruning
from pma_megatron.retention.decision import SETTLED_S
from pma_megatron.retention.request import parse_window
from pma_megatron.testing import inject

TRACKER = "latest_checkpointed_iteration.txt"
NEWEST = {"keep_last": 1}
PATIENCE_S = 200.0


def left(run: Path) -> list[int]:
    """Iterations of the folders that bear a checkpoint's name."""
    return sorted(int(folder.name[5:]) for folder in run.glob("iter_*"))


def reasons(run: Path, **rules: Any) -> dict[int | None, str]:
    rows = prune(PruneRequest(root=str(run), **rules)).rows
    return {row.ref.iteration: "; ".join(row.kept) for row in rows}


def deleted(run: Path, **rules: Any) -> list[int | None]:
    report = prune(PruneRequest(root=str(run), **rules), delete=True)
    return [row.ref.iteration for row in report.rows if row.deleted]


def test_a_window_is_the_same_afterwards(
    capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path
) -> None:
    """The dry run touches nothing; the deletion frees what was said, and nothing that a merge of
    the window takes."""
    window = SelectionRequest(last=2, interval_iterations=2)
    merge(request_for(run, tmp_path / "before", selection=window))
    before = digests(run)
    words = ("prune", run, "--keep-window", "last=2,interval-iterations=2", "--keep-last", 1)
    code, out, _ = call(capsys, *words)
    assert code == 0 and digests(run) == before
    assert "2 of 4 checkpoints may go" in out and "Nothing was deleted" in out
    assert call(capsys, *words, "--dry-run", "--yes")[0] == 2
    code, out, _ = call(capsys, *words, "--dry-run", "--json")
    rows = json.loads(out)["checkpoints"]
    assert code == 0 and [row["may_go"] for row in rows] == [True, True, False, False]
    sizes = [sum(p.stat().st_size for p in folder_of(run, i).iterdir()) for i in (2, 4, 6, 8)]
    assert [row["bytes"] for row in rows] == sizes

    code, out, _ = call(capsys, *words, "--yes")
    assert code == 0 and "deleted 2 of 4 checkpoints" in out
    kept = {name: sum_ for name, sum_ in before.items() if "02/" not in name and "04/" not in name}
    assert digests(run) == kept
    merge(request_for(run, tmp_path / "after", selection=window))
    assert shards(tmp_path / "after") == shards(tmp_path / "before")
    code, out, _ = call(capsys, *words, "--yes")
    assert code == 0 and "deleted 0 of 2" in out


def shards(save: Path) -> dict[str, str]:
    return {name: digest for name, digest in digests(save).items() if name.endswith(".distcp")}


def test_what_training_needs_stays(run: Path) -> None:
    (run / TRACKER).write_text("4")
    found = reasons(run, **NEWEST)
    assert found[2] == "" and "tracker" not in found[2]
    assert TRACKER in found[4] and "newest 1" in found[4]
    assert "newer than iteration 4" in found[6] and "the newest" in found[8]
    assert deleted(run, **NEWEST) == [2]
    (run / TRACKER).write_text("")  # as Megatron has it for a moment, when it writes it
    with pytest.raises(SelectionError, match="Try again"):
        prune(PruneRequest(root=str(run), keep_last=1), delete=True)
    assert left(run) == [4, 6, 8]


def test_a_save_at_work_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest one that lacks its end; and one that a resumed run writes anew, behind others."""
    (folder_of(run, 8) / "metadata.json").unlink()
    (run / TRACKER).write_text("6")
    assert "being written" in reasons(run, **NEWEST)[8]
    (folder_of(run, 2) / ".metadata").unlink()
    assert "damaged" in reasons(run, **NEWEST)[2]
    assert "within the last hour" in reasons(run, **NEWEST, damaged=True)[2]
    long_ago = time.time() - SETTLED_S - 60
    for path in (*folder_of(run, 2).iterdir(), folder_of(run, 2)):
        os.utime(path, (long_ago, long_ago))  # as a copy that keeps the times does
    assert deleted(run, **NEWEST) == [4]
    assert deleted(run, **NEWEST, damaged=True) == []
    monkeypatch.setattr(decision, "SETTLED_S", 0)
    assert deleted(run, **NEWEST, damaged=True) == [2]
    assert left(run) == [6, 8]


def test_links_stay(run: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    folder_of(run, 2).rename(elsewhere)
    folder_of(run, 2).symlink_to(elsewhere)
    assert deleted(run, **NEWEST) == [4, 6]
    assert (elsewhere / "metadata.json").is_file()


def test_what_is_being_read_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has opened a source holds it, and only for as long as it reads."""

    def read(iteration: int) -> None:
        path = str(folder_of(run, iteration))
        registry.get(registry.TORCH_DIST, path).read_source(path, {}, True)

    before = digests(run)
    with holding():
        read(4)
        assert "being read" in reasons(run, **NEWEST)[4]
        assert deleted(run, **NEWEST) == [2, 6]
    assert digests(folder_of(run, 4)) == {
        name.removeprefix("iter_0000004/"): digest
        for name, digest in before.items()
        if name.startswith("iter_0000004/")
    }
    monkeypatch.setattr(locks, "_PATIENCE_S", 0.2)
    with alone_with(folder_of(run, 4)), holding(), pytest.raises(CheckpointError, match="deleted"):
        read(4)
    read(4)
    assert deleted(run, **NEWEST) == [4]


def in_child(work: Callable[[], Any]) -> int:
    """What became of a process that did `work`, as `waitpid` says it."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    return os.waitpid(child, 0)[1]


@contextlib.contextmanager
def at_work(work: Callable[[], Any], until: Callable[[], bool]) -> Iterator[int]:
    """A process that does `work`, once `until`; killed at the end of the block."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(1)
    try:
        end_s = time.monotonic() + PATIENCE_S
        while not until():
            assert os.waitpid(child, os.WNOHANG)[0] == 0 and time.monotonic() < end_s
            time.sleep(0.01)
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_sources_of_a_merge_stay_while_it_runs_and_when_it_was_killed(
    run: Path, tmp_path: Path
) -> None:
    """A real merge that hangs; then one of which only the staging folder is left."""
    save = tmp_path / "run-pma"
    request = request_for(run, save, selection=SelectionRequest(iterations=(2, 4)))
    with (
        inject("merge", rank=0, action="hang"),
        at_work(lambda: merge(request), lambda: bool(list(save.glob(".pma-staging-*")))),
    ):
        (journal,) = save.glob(".pma-journal-iter_0000004-*")  # which was written by then
        aside = tmp_path / "journal"
        found = reasons(run, **NEWEST)
        assert "at work" in found[2] and "at work" in found[4] and found[6] == ""
        journal.rename(aside)
        found = reasons(run, **NEWEST)
        assert "being read" in found[2] and "being read" in found[4] and found[6] == ""
        aside.rename(journal)
    found = reasons(run, **NEWEST)
    assert "cut off" in found[2] and str(journal) in found[4] and found[6] == ""
    journal.rename(aside)
    assert deleted(run, **NEWEST) == []  # what is staged does not say what it is made of
    aside.rename(journal)
    assert deleted(run, **NEWEST) == [6]
    merge(request)
    assert deleted(run, **NEWEST) == [2, 4]


@pytest.mark.parametrize("stage", ["prune", "hidden", "pruned"])
def test_killed_at_any_moment(run: Path, stage: str) -> None:
    """Whatever bears a checkpoint's name is whole; the next one clears up."""
    before = digests(run)
    request = PruneRequest(root=str(run), keep_last=1)
    with inject(stage, rank=0, action="kill"):
        assert os.WIFSIGNALED(in_child(lambda: prune(request, delete=True)))
    for folder in run.glob("iter_*"):
        name = f"{folder.name}/"
        whole = {key: digest for key, digest in before.items() if key.startswith(name)}
        assert {f"{name}{key}": digest for key, digest in digests(folder).items()} == whole
    assert left(run) == ([2, 4, 6, 8] if stage == "prune" else [4, 6, 8])
    hidden = list(run.glob(".pma-removed-*"))
    assert len(hidden) == (stage != "prune")
    for folder in hidden if stage == "pruned" else []:
        assert not (folder / "metadata.json").exists() and not (folder / ".metadata").exists()
    assert [ref.iteration for ref in list_checkpoints(run)] == left(run)
    report = prune(request)
    assert list(report.leftovers) == [str(folder) for folder in hidden]
    assert prune(request, delete=True).leftovers == ()
    assert left(run) == [8] and not list(run.glob(".pma-*"))


def test_each_is_looked_at_again(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes back, while others are being deleted, to one that might have gone."""

    def hidden(folder: Path, checkpoint: Path) -> Path:
        (run / TRACKER).write_text("4")
        return hide(folder, checkpoint)

    hide = pruning._hidden
    monkeypatch.setattr(pruning, "_hidden", hidden)
    assert deleted(run, **NEWEST) == [2]
    assert left(run) == [4, 6, 8]


def test_old_averages(capsys: pytest.CaptureFixture[str], run: Path, tmp_path: Path) -> None:
    save = tmp_path / "averages"
    for end in (4, 6, 8):
        window = SelectionRequest(last=2, end_iteration=end)
        merge(request_for(run, save, selection=window))
    assert call(capsys, "prune", save, "--keep-last", 2, "--yes")[0] == 0
    assert left(save) == [6, 8]
    assert call(capsys, "verify", save)[0] == 0


def test_tags_of_deepspeed(flat: Path, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    run = tmp_path / "run"
    shutil.copytree(flat, run)
    named = (run / "latest").read_text()
    gone = deleted(run, **NEWEST)
    tags = [path.name for path in run.iterdir() if path.is_dir()]
    assert gone and tags == [named]


def test_what_cannot_be_deleted_is_an_error(
    capsys: pytest.CaptureFixture[str], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(folder: Path, checkpoint: Path) -> Path:
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(pruning, "_hidden", denied)
    code, out, _ = call(capsys, "prune", run, "--keep-last", 3, "--yes")
    assert code == 1 and "could not be deleted" in out and left(run) == [2, 4, 6, 8]
    monkeypatch.undo()
    assert call(capsys, "prune", folder_of(run, 2), "--keep-last", 3)[0] == 1
    assert call(capsys, "prune", run)[0] == 2


def test_without_locks_nothing_goes_unless_asked(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextlib.contextmanager
    def unknown(checkpoint: Path) -> Iterator[bool]:
        yield False

    monkeypatch.setattr(pruning, "alone_with", unknown)
    assert deleted(run, **NEWEST) == []
    window = {"keep_window": (parse_window("last=3"),)}
    assert deleted(run, **window, without_locks=True) == [2]
