"""Files that commands are told to write: they damage no checkpoint, replace nothing of anybody
else's, and are there whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_cli import call
from test_forecast import scores

from conftest import as_a_user, digests, folder_of
from pma_megatron import MergeRequest, SelectionRequest, WatchRequest, watch
from pma_megatron.base import durable
from pma_megatron.base.durable import replace_file
from pma_megatron.errors import UsageError
from pma_megatron.runs.folders import part_of
from pma_megatron.runs.told_files import SCORES, refuse_file, refuse_folder

TRACKER = "latest_checkpointed_iteration.txt"
WRITERS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "compare": lambda run, out: ["compare", folder_of(run, 2), folder_of(run, 6), "--out", out],
    "evaluate": lambda run, out: ["evaluate", "--load", run, "--provider", "a:b", "--out", out],
    "plot": lambda run, out: ["evaluate", "--load", run, "--provider", "a:b", "--plot", out],
    "forecast": lambda run, out: ["forecast", "--scores", run.parent / "s.json", "--out", out],
    "geometry": lambda run, out: ["geometry", "--load", run, "--last", 3, "--out", out],
    "report": lambda run, out: ["report", run.parent / "s.json", "--out", out],
    "watch": lambda run, out: [
        *("watch", "--load", run, "--save", run.parent / "averages", "--last", 2, "--once"),
        *("--events", out),
    ],
}
"""Every flag that names a file to write, in a command that would write it."""


@pytest.fixture
def own(run: Path) -> Path:
    """A run, and scores beside it."""
    (run.parent / "s.json").write_text(json.dumps(scores().to_json()))
    return run


@pytest.mark.parametrize("verb", WRITERS)
def test_nothing_of_a_checkpoint_is_written_over(
    own: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its shards, the trackers, files of ours, notes of others; through links, too."""
    folder, ending = folder_of(own, 4), ".png" if verb == "plot" else ""
    renamed = own.parent / "best"
    folder_of(own, 8).rename(renamed)
    link, inside, loop = (own.parent / f"{name}{ending}" for name in ("link", "inside", "loop"))
    link.symlink_to(folder / "common.pt")
    loop.symlink_to(loop)
    (own.parent / "elsewhere").symlink_to(folder)
    notes = own.parent / f"notes{ending}"
    notes.write_text('{"mine": true}')
    wrong = [
        *(folder / "common.pt", folder / ".metadata", folder / f"new{ending}", renamed / "new"),
        *(own / TRACKER, own / "latest", own / "pma_recovery.jsonl", own / "pma.json"),
        *(own / "iter_0000010", own / ".pma-journal-x" / "y", own / "no" / "x", own, loop),
        *(link, notes, own.parent / "elsewhere" / f"new{ending}"),
    ]
    (own / ".pma-journal-x").mkdir()
    before = digests(own.parent)
    for out in wrong:
        code, _, err = call(capsys, *WRITERS[verb](own, out))
        assert code == 2 and str(out) in err and "Traceback" not in err, (out, err)
        assert digests(own.parent) == before, out
    assert not inside.exists()


def test_a_result_replaces_a_result_of_the_same_command(
    own: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the checkpoints of a run, too; of another command it is somebody else's."""
    words = [*WRITERS["forecast"](own, own / "f.json"), "--annealed-loss", "30:2.28"]
    assert [call(capsys, *words)[0] for _ in range(2)] == [0, 0]
    same = WRITERS["compare"](own, own / "c.json")
    (own / "c.json").write_bytes(b"")  # what a full disk left of it, once
    assert [call(capsys, *same)[0] for _ in range(2)] == [3, 3]
    assert json.loads((own / "c.json").read_text())["same"] is False
    page = WRITERS["report"](own, own / "a.html")
    assert [call(capsys, *page)[0] for _ in range(2)] == [0, 0]
    geometry = WRITERS["geometry"](own, own / "g.json")
    assert [call(capsys, *geometry)[0] for _ in range(2)] == [0, 0]
    seen = WRITERS["watch"](own, own.parent / "averages" / "events.jsonl")  # a folder it makes
    assert [call(capsys, *seen)[0] for _ in range(2)] == [0, 0]
    events = (own.parent / "averages" / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in events][:2] == ["started", "published"]
    assert len(events) == 4

    before = digests(own)
    for first, second in (("compare", "f"), ("geometry", "c"), ("forecast", "g")):
        code, _, err = call(capsys, *WRITERS[first](own, own / f"{second}.json"))
        assert code == 2 and "no result of" in err
    scored = WRITERS["forecast"](own, own.parent / "s.json")  # its own input
    assert call(capsys, *scored)[0] == 2
    both = [*WRITERS["plot"](own, own / "x.png"), "--out", own / "x.png"]
    assert call(capsys, *both)[0] == 2
    code, _, err = call(capsys, *WRITERS["plot"](own, own / "x.xyz"))
    assert code == 2 and ".png, .pdf, .svg" in err
    assert digests(own) == before


def test_watch_in_python_refuses_it_too(own: Path, tmp_path: Path) -> None:
    merge = MergeRequest(
        load=str(own), save=str(tmp_path / "averages"), selection=SelectionRequest(last=2)
    )
    for path in (own / TRACKER, folder_of(own, 4) / "events", own.parent / "s.json"):
        before = digests(own)
        with pytest.raises(UsageError, match="events="):
            watch(WatchRequest(merge=merge, once=True, events=path))
        assert digests(own) == before and not (tmp_path / "averages").exists()


def test_a_spool_in_a_checkpoint(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(own)
    monkeypatch.setenv("PMA_MEGATRON_SPOOL", str(folder_of(own, 4) / "spool"))
    code, _, err = call(capsys, "list", "memory://bucket/run")
    assert code == 2 and "PMA_MEGATRON_SPOOL=" in err and digests(own) == before
    monkeypatch.setenv("PMA_MEGATRON_SPOOL", str(own.parent / "spool"))
    assert call(capsys, "list", own)[0] == 0


def test_what_is_part_of_a_checkpoint(dense_run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder_of(dense_run, 2), tmp_path / "best"))
    zero, model = tmp_path / "zero", tmp_path / "model"
    for folder in (zero, model / "logs" / "x"):
        folder.mkdir(parents=True)
    (zero / "mp_rank_00_model_states.pt").write_bytes(b"")
    (model / "model.safetensors").write_bytes(b"")
    (model / "config.json").write_text("{}")
    for folder in (copy, zero, model, folder_of(tmp_path / "none", 8)):
        assert part_of(folder) == folder
        if folder != model:
            assert part_of(folder / "a" / "b") == folder
    # A trainer saves the last model where the run's own folders are.
    assert part_of(model / "logs" / "x") is None
    assert part_of(dense_run) is None and part_of(tmp_path) is None


def test_who_may_not_write_there(dense_run: Path, tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    words = f"--load {dense_run} --last 2"
    told = as_a_user(
        tmp_path,
        f"geometry {words} --out closed/x.json",
        f"merge {words} --save a --log-to closed/board",
    )
    assert all("you may not write into" in text and text.endswith("code 2") for text in told)
    assert not (tmp_path / "a").exists()


@pytest.fixture
def small_disk() -> Iterator[Callable[[bool], None]]:
    """Says whether files may be larger than 4 KiB, as on a disk that is full or is not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full(now: bool) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096 if now else soft, hard))

    yield full
    full(False)


def test_a_full_disk_leaves_what_was_there(
    tmp_path: Path, small_disk: Callable[[bool], None]
) -> None:
    path, link = tmp_path / "x.json", tmp_path / "link"
    path.write_bytes(b"old")
    path.chmod(0o640)
    link.symlink_to(path)
    for target in (path, link, tmp_path / "new"):
        small_disk(True)
        with pytest.raises(OSError, match="large"):
            replace_file(target, b"x" * 100_000)
        small_disk(False)
        assert path.read_bytes() == b"old" and {*tmp_path.iterdir()} == {path, link}
    replace_file(link, b"x" * 100_000)
    assert link.is_symlink() and path.read_bytes() == b"x" * 100_000
    assert path.stat().st_mode & 0o777 == 0o640 and {*tmp_path.iterdir()} == {path, link}


def test_a_result_is_shown_though_it_cannot_be_written(
    own: Path, tmp_path: Path, small_disk: Callable[[bool], None], capsys: Any
) -> None:
    """What took hours is not lost with a disk that filled up."""
    path = tmp_path / "f.json"
    words = [*WRITERS["forecast"](own, path), "--annealed-loss", "30:2.28", "--json"]
    assert call(capsys, *words)[0] == 0
    before = path.read_bytes()
    assert len(before) > 4096
    small_disk(True)
    code, out, err = call(capsys, *words)
    small_disk(False)
    assert code == 2 and "f.json cannot be written" in err
    assert json.loads(out) == json.loads(before) and path.read_bytes() == before


def test_streams_are_written_into(own: Path, tmp_path: Path) -> None:
    """`--out >(jq ...)`, `/dev/stdout`: nothing there is replaced."""
    pipe, got = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: got.append(pipe.read_text()))
    reader.start()
    replace_file(pipe, b"text")
    reader.join()
    assert got == ["text"] and pipe.is_fifo()
    words = map(str, WRITERS["forecast"](own, Path("/dev/stdout")))
    with (tmp_path / "stdout").open("wb") as out:
        command = [sys.executable, "-m", "pma_megatron", *words, "--annealed-loss", "30:2.28"]
        subprocess.run(command, stdout=out, check=True)
    said = (tmp_path / "stdout").read_text()
    assert said.startswith(" ") or "forecast of the annealed" in said
    assert json.loads(said[said.index("\n{\n") :])["forecast"]["metric"] == "lm"


def test_a_pipe_that_nobody_reads_ends_nothing_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(durable, "_READER_S", 0.0)
    with pytest.raises(OSError, match="nobody reads"):
        replace_file(tmp_path / "pipe", b"text")


def test_what_is_no_file_and_what_is_protected_stays(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, words = own.parent / "f.json", ["--annealed-loss", "30:2.28"]
    assert call(capsys, *WRITERS["forecast"](own, path), *words)[0] == 0
    path.chmod(0o444)
    mine, page = own.parent / "mine.html", own.parent / "page.html"
    mine.write_text("<!DOCTYPE html><p>my own page")
    talk = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(own.parent)  # its name has at most 107 bytes
    talk.bind("talk")
    disk = own.parent / "disk"
    with contextlib.suppress(PermissionError):  # only root makes one
        os.mknod(disk, 0o600 | stat.S_IFBLK, os.makedev(7, 99))
    before = digests(own.parent)
    wrong = {
        path: "write-protected",
        own.parent / ("a" * 300): "at most 255 bytes",
        own.parent / "talk": "socket",
        **({disk: "no plain file"} if disk.exists() else {}),
    }
    for out, word in wrong.items():
        code, _, err = call(capsys, *WRITERS["forecast"](own, out), *words)
        assert code == 2 and word in err, (out, err)
    code, _, err = call(capsys, *WRITERS["report"](own, mine))
    assert code == 2 and "no page of pma report" in err
    assert digests(own.parent) == before and (not disk.exists() or disk.is_block_device())
    with pytest.raises(OSError, match="plain file"):
        replace_file(disk if disk.exists() else own, b"x")
    assert [call(capsys, *WRITERS["report"](own, page))[0] for _ in range(2)] == [0, 0]
    talk.close()
    # A file that is reached through /proc is one; what somebody has open is not replaced.
    assert not durable.is_stream(Path("/proc/self/cwd/f.json"))
    assert not durable.is_stream(Path("/dev/stdfoo"))
    with path.open() as stream:
        assert durable.is_stream(Path(f"/proc/self/fd/{stream.fileno()}"))


def test_only_the_rank_that_writes_looks_where_it_goes(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others may be on machines that have no such folder."""
    out, board = own / "only-on-node-0" / "f.json", folder_of(own, 4) / "board"
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        expected = pytest.raises(UsageError) if rank == "0" else contextlib.nullcontext()
        with expected:
            refuse_file(f"--out {out}", out, SCORES)
        with expected:
            refuse_folder(f"--log-to {board}", board)
