"""A merge that was cut off, run again: what is there is not made again, and nothing else counts.

The oracle is the same merge made in one go: every file but `pma.json`, which has times, is equal.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import folder_of, request_for
from jobs import without_progress
from pma_megatron import MergeReport, MergeRequest, Method, SelectionRequest, merge
from pma_megatron.errors import CheckpointError, PublishError, RankError
from pma_megatron.formats.base import StoredRecord
from pma_megatron.merging import targets
from pma_megatron.testing import inject, run_ranks
from pma_megatron.transfer.reads import Reads
from restarts import TRACKER, check, contents, cut_off, interrupt, names, of_three, stopped_at


@pytest.mark.parametrize("threads", [1, 2])
def test_it_goes_on(
    dense_run: Path, save: Path, whole: tuple[Path, MergeReport], threads: int
) -> None:
    """After half of the work at most 60 % of the bytes are read again."""
    request = of_three(dense_run, save, threads=threads)
    cut_off(request)
    assert [name.rpartition("-")[0] for name in names(save)] == [
        ".pma-journal-iter_0000008",
        ".pma-staging-iter_0000008",
    ]
    report = merge(request)
    check(save, whole, report)
    assert report.reused["units"] > 1
    assert report.bytes["read"] <= 0.6 * whole[1].bytes["read"]


def test_again_and_again(dense_run: Path, save: Path, whole: tuple[Path, MergeReport]) -> None:
    """Each time it gets a little further, with other threads; what is read adds up to one merge."""
    request = of_three(dense_run, save)
    for threads, share in ((1, 0.2), (2, 0.3), (1, 0.5)):
        cut_off(replace(request, threads=threads), share)
    report = merge(request)
    check(save, whole, report)
    assert report.bytes["read"] <= 0.45 * whole[1].bytes["read"]


def test_every_unit_was_done(dense_run: Path, save: Path, whole: tuple[Path, MergeReport]) -> None:
    """Nothing of the sources is read when only the end is missing."""
    request = of_three(dense_run, save)
    cut_off(request, 1.0)
    report = merge(request)
    check(save, whole, report)
    assert report.bytes == {"read": 0, "written": report.bytes["written"]}
    assert report.bytes["written"] < 0.05 * whole[1].bytes["written"]  # what the plan made


@pytest.mark.parametrize(
    "what", ["one byte", "a zero file", "a short file", "no file", "no folder"]
)
def test_what_is_not_as_it_was_written_is_made_again(
    dense_run: Path, save: Path, whole: tuple[Path, MergeReport], what: str
) -> None:
    request = of_three(dense_run, save)
    cut_off(request, 1.0)
    (staging,) = save.glob(".pma-staging-*")
    file = max(staging.glob("*.distcp"), key=lambda path: path.stat().st_size)
    nbytes = file.stat().st_size
    if what == "no folder":
        shutil.rmtree(staging)
    elif what == "no file":
        file.unlink()
    elif what == "a short file":
        os.truncate(file, nbytes // 2)
    elif what == "a zero file":
        file.write_bytes(bytes(nbytes))
    else:
        with file.open("r+b") as stream:
            stream.seek(nbytes // 2)
            byte = stream.read(1)[0]
            stream.seek(nbytes // 2)
            stream.write(bytes([byte ^ 1]))
    report = merge(request)
    check(save, whole, report)
    assert report.bytes["read"] > 0


@pytest.mark.parametrize("what", ["torn", "garbage", "a flipped bit", "no job", "a list", "a link"])
def test_a_journal_that_is_not_whole(
    dense_run: Path, save: Path, whole: tuple[Path, MergeReport], what: str
) -> None:
    request = of_three(dense_run, save)
    cut_off(request, 1.0)
    (journal,) = save.glob(".pma-journal-*")
    (lines,) = journal.glob("rank-*")
    data, left = lines.read_bytes(), 0
    if what == "torn":
        lines.write_bytes(data[: len(data) // 2])
        left = data[: len(data) // 2].count(b"\n")
    elif what == "garbage":
        lines.write_bytes(random.Random(1).randbytes(1000) + b"\n" + data)
        left = data.count(b"\n")
    elif what == "a flipped bit":
        middle = len(data) // 2
        lines.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
        left = data.count(b"\n") - 1
    elif what == "no job":
        (journal / "job.json").unlink()
    elif what == "a list":
        (journal / "job.json").write_text("[1]")
    else:
        (journal / "job.json").unlink()
        (journal / "job.json").symlink_to("/dev/zero")
    report = merge(request)
    check(save, whole, report)
    assert abs(report.reused["units"] - left) <= 1


def half_read(save: Path, source: int) -> tuple[str, int, int] | None:
    """A file, where a value begins that the merge has read, and one of that record that it has not.

    The first byte of a float32 is its least: rounded to bf16 it is what the weights say.
    """
    (lines,) = save.glob(".pma-journal-*/rank-*")
    entries = [json.loads(line.partition(b" ")[2])[2] for line in lines.read_bytes().splitlines()]
    parts = [part for read in entries for part in read.get(str(source), ())]
    for file, start, nbytes, *_ in parts:
        at = 0
        for low, high in sorted(part[5:7] for part in parts if part[:2] == [file, start]):
            at = high if low <= at else at
        if 0 < at < nbytes:
            return file, start + at - 4, start + at
    return None


def flip_unseen(file: Path, at: int) -> None:
    """Turn one bit over, or back again, as a disk does: the times of the file stay."""
    data, stat = bytearray(file.read_bytes()), file.stat()
    data[at] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("place", [0, 1])
def test_a_source_that_is_damaged_meanwhile(
    run: Path, save: Path, whole: tuple[Path, MergeReport], place: int
) -> None:
    """Between two units of one record: refused, unless what is hit had been read before."""
    request = of_three(run, save, threads=1)
    found: list[tuple[str, int, int]] = []

    def stop_between_two_units_of_a_record() -> None:
        half = half_read(save, source=0)
        if half is not None:
            found.append(half)
            interrupt()

    with pytest.raises(KeyboardInterrupt):
        merge(request, show=stopped_at(0.0, stop_between_two_units_of_a_record))
    file, at = folder_of(run, 4) / found[0][0], found[0][1 + place]
    flip_unseen(file, at)
    try:
        report = merge(request)
    except CheckpointError as error:
        assert "damaged" in str(error)
        assert not save.exists() or TRACKER not in names(save)
    else:
        assert place == 0
        flip_unseen(file, at)
        check(save, whole, report)


def test_what_two_jobs_read_of_a_record_is_compared_as_one() -> None:
    data = bytes(range(200))
    for damaged in (False, True):
        crc = zlib.crc32(data) ^ damaged
        first = Reads("source", telling=True)
        record = StoredRecord("file", 64, len(data), "data/0", crc)
        first.note(record, 0, memoryview(data)[:50])
        first.note(record, 50, memoryview(data)[50:120])
        second = Reads("source", telling=True)
        with pytest.raises(CheckpointError, match="damaged") if damaged else nullcontext():
            second.recall(first.told(), ())
            assert first.told() == []
            second.note(record, 120, memoryview(data)[120:])
            assert second.whole == {record}


def test_another_job_begins_anew(dense_run: Path, save: Path) -> None:
    """Other coefficients, or sources that changed, are another merge; it removes what was left."""
    cut_off(of_three(dense_run, save))
    report = merge(of_three(dense_run, save, method=Method(name="wma")))
    assert report.reused["units"] == 0
    assert names(save) == ["iter_0000008", TRACKER]


def test_a_source_that_changed_begins_anew(
    run: Path, save: Path, whole: tuple[Path, MergeReport]
) -> None:
    request = of_three(run, save)
    cut_off(request)
    file = next(folder_of(run, 6).glob("*.distcp"))
    os.utime(file, ns=(file.stat().st_atime_ns, file.stat().st_mtime_ns + 1))
    report = merge(request)
    check(save, whole, report)
    assert report.reused["units"] == 0


def test_a_merge_into_the_same_folder_takes_the_space_back(dense_run: Path, save: Path) -> None:
    """Jobs of an array go on beside each other; what nobody asks for again goes after a day."""
    cut_off(of_three(dense_run, save))
    other = request_for(dense_run, save, selection=SelectionRequest(last=2, end_iteration=6))
    merge(other)
    assert len(list(save.glob(".pma-*-iter_0000008-*"))) == 2
    for path in save.glob(".pma-journal-*/*"):
        os.utime(path, (0, 0))
    os.utime(path.parent, (0, 0))
    merge(replace(other, overwrite=True))
    assert names(save) == ["iter_0000006", TRACKER]


def test_the_disk_is_as_full_as_it_was(
    dense_run: Path, save: Path, whole: tuple[Path, MergeReport], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first attempt took counts as free for the second."""
    request = of_three(dense_run, save)
    cut_off(request, 1.0)
    usage = shutil.disk_usage(save)
    full = usage._replace(free=whole[1].bytes["written"] // 4)
    monkeypatch.setattr(targets.shutil, "disk_usage", lambda _: full)
    with pytest.raises(PublishError, match="GiB free"):
        merge(of_three(dense_run, save.parent / "elsewhere"))
    check(save, whole, merge(request))


def test_a_refusal_leaves_nothing(dense_run: Path, save: Path) -> None:
    """Only who was stopped, or lost a rank, will ask for the same again."""

    def refuse() -> None:
        raise PublishError("the disk is full")

    with pytest.raises(PublishError, match="the disk is full"):
        merge(of_three(dense_run, save), show=stopped_at(0.5, refuse))
    assert not save.exists()


def test_a_lost_rank_leaves_what_was_done(
    dense_run: Path, save: Path, whole: tuple[Path, MergeReport]
) -> None:
    def lose() -> None:
        raise RankError("rank 1 died", lost=True)

    request = of_three(dense_run, save)
    with pytest.raises(RankError) as caught:
        merge(request, show=stopped_at(0.5, lose))
    assert caught.value.kept is not None and Path(caught.value.kept).is_dir()
    report = merge(request)
    check(save, whole, report)
    assert report.reused["units"] > 0


def by_ranks(rank: int, world_size: int, request: MergeRequest) -> MergeReport:
    return merge(request)


def test_other_ranks_go_on(dense_run: Path, save: Path, whole: tuple[Path, MergeReport]) -> None:
    request = of_three(dense_run, save)
    cut_off(request)
    first, second = run_ranks(by_ranks, 2, request)
    assert first.reused == second.reused and first.reused["units"] > 1
    assert first.bytes["read"] <= 0.6 * whole[1].bytes["read"]
    check(save, whole, first)


def test_a_sweep_goes_on(dense_run: Path, save: Path, tmp_path: Path) -> None:
    """Units of all outputs count, and of one that is not published yet alone."""
    selection = SelectionRequest(last=None)
    request = request_for(dense_run, save, selection=selection, sweep=("sma:2", "wma:3"))
    other = replace(request, save=str(tmp_path / "other"))
    merge(other)
    cut_off(request)
    report = merge(request)
    assert report.reused["units"] > 0
    assert contents(save) == contents(Path(str(other.save)))


def command(run: Path, save: Path) -> list[str]:
    words = ("merge", "--load", str(run), "--save", str(save), "--last", "3", "--threads", "1")
    return [sys.executable, "-m", "pma_megatron", *words]


def test_a_command_says_so(dense_run: Path, save: Path, whole: tuple[Path, MergeReport]) -> None:
    """Stopped and killed for real: what was done is named, counted, and not done again."""
    with inject("merge", rank=0, action="hang"):  # it does not come to its end
        job = subprocess.Popen(command(dense_run, save), stderr=subprocess.PIPE, text=True)
    while not any(b"\n" in path.read_bytes() for path in save.glob(".pma-journal-*/rank-*")):
        assert job.poll() is None, job.communicate()
        time.sleep(0.001)
    os.kill(job.pid, signal.SIGTERM)
    text = without_progress(job.communicate()[1])
    (staging,) = save.glob(".pma-staging-*")
    assert text.endswith(
        f"pma: stopped by SIGTERM; nothing was published; what is done is kept in {staging}, "
        "and the same command goes on from there\n"
    )
    assert job.returncode == 128 + signal.SIGTERM
    again = subprocess.run([*command(dense_run, save), "--json"], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    reused = json.loads(again.stdout)["reused"]
    assert f"pma: going on with a merge that was cut off: {reused['units']} of" in again.stderr
    assert reused["units"] > 0
    assert contents(save) == contents(whole[0])
