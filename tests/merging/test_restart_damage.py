"""What others have put where a merge was cut off, and what does not work: quotas, locks, links."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conftest import digests, folder_of, request_for
from pma_megatron import MergeReport, MergeRequest, merge
from pma_megatron.base.stopping import Stopped
from pma_megatron.merging import locks, publish
from pma_megatron.testing import inject, run_ranks
from restarts import check, cut_off, of_three


def linked(link: Path, to: Path) -> None:
    shutil.rmtree(link)
    link.symlink_to(to)


@pytest.mark.parametrize("what", ["staging", "journal"])
def test_a_link_is_not_followed(
    run: Path, save: Path, whole: tuple[Path, MergeReport], what: str
) -> None:
    """Not into a source, nor anywhere: the merge begins at the start, and the link is gone."""
    request = of_three(run, save)
    cut_off(request, 1.0)
    before = digests(run)
    (link,) = save.glob(f".pma-{what}-*")
    linked(link, folder_of(run, 4))
    report = merge(request)
    assert digests(run) == before
    check(save, whole, report)
    assert report.reused["units"] == 0


def test_a_file_with_a_second_name_is_not_written_into(
    dense_run: Path, save: Path, tmp_path: Path, whole: tuple[Path, MergeReport]
) -> None:
    request = of_three(dense_run, save)
    cut_off(request, 1.0)
    (staging,) = save.glob(".pma-staging-*")
    file = max(staging.glob("*.distcp"), key=lambda path: path.stat().st_size)
    file.write_bytes(bytes(file.stat().st_size))
    other = tmp_path / "other"
    os.link(file, other)
    check(save, whole, merge(request))
    assert other.read_bytes().strip(b"\0") == b""


def test_without_locks_nothing_is_kept(
    dense_run: Path, save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing tells there whether a job is gone, so nobody could go on with what it left."""

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    cut_off(of_three(dense_run, save))
    assert not save.exists()


def test_a_line_that_cannot_be_written_ends_the_lines(
    dense_run: Path,
    save: Path,
    whole: tuple[Path, MergeReport],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A quota that is met by the journal alone does not stop the merge."""

    class Full:
        def __init__(self, stream: Any) -> None:
            self.stream, self.left = stream, 5

        def write(self, data: bytes) -> None:
            if not self.left:
                raise OSError(errno.EDQUOT, "Disk quota exceeded")
            self.left -= 1
            self.stream.write(data)

        def close(self) -> None:
            self.stream.close()

    opened = Path.open

    def open_full(path: Path, mode: str = "r", **how: Any) -> Any:
        stream = opened(path, mode, **how)
        return Full(stream) if mode == "xb" else stream

    monkeypatch.setattr(Path, "open", open_full)
    report = merge(of_three(dense_run, save))
    monkeypatch.undo()
    check(save, whole, report)
    assert [m for m in caplog.messages if "Disk quota exceeded" in m and "begins at the start" in m]


def test_killed_before_the_tracker_and_interrupted(
    dense_run: Path, save: Path, whole: tuple[Path, MergeReport]
) -> None:
    """The same command gets through, however often it is cut off."""
    request = of_three(dense_run, save)
    run_ranks(killed_before_the_tracker, 1, request)
    cut_off(request)
    cut_off(request)
    check(save, whole, merge(request))


def killed_before_the_tracker(rank: int, world_size: int, request: MergeRequest) -> None:
    child = os.fork()
    if child == 0:
        with inject("tracker", rank=0, action="kill"):
            merge(request)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_what_replaces_another_is_not_kept_once_it_is_published(
    dense_run: Path, save: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After folders were exchanged the staging folder holds the old one, which is of no use."""
    merge(request_for(dense_run, save))

    def stop(*_: object) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(publish, "point_to", stop)
    with pytest.raises(Stopped) as caught:
        merge(of_three(dense_run, save, overwrite=True))
    assert caught.value.kept is None and len(caught.value.published) == 1
    assert not list(save.glob(".pma-staging-*")) + list(save.glob(".pma-journal-*"))


def test_lines_do_not_grow(dense_run: Path, save: Path, tmp_path: Path) -> None:
    """What an earlier attempt read is in its own lines."""
    request = of_three(dense_run, save, threads=1)
    at_once = replace(request, save=str(tmp_path / "at once"))
    cut_off(at_once, 1.0)
    for _ in range(5):
        cut_off(request, 0.2)
    (wanted,), found = (longest_lines(Path(str(each.save))) for each in (at_once, request))
    assert len(found) == 5 and max(found) <= wanted


def longest_lines(save: Path) -> list[int]:
    """Of every file of the journal."""
    files = save.glob(".pma-journal-*/rank-*")
    return [max(map(len, path.read_bytes().splitlines())) for path in files]
