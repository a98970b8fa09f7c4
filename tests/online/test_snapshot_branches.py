"""A run that goes back writes its snapshots again, and what it gave up is told from the rest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from test_snapshot_writer import PATIENCE_S, assert_whole, simple_chunks, simple_data

from conftest import digests, folder_of, names_in
from pma_megatron import PmaError, SelectionRequest, list_checkpoints
from pma_megatron.base.comm import Comm
from pma_megatron.formats.marker import BRANCHES_FILE, SNAPSHOTS
from pma_megatron.online.snapshots import SnapshotWriter, prune
from pma_megatron.runs import recovery_log
from pma_megatron.runs.discover import choose
from pma_megatron.storage import spool
from pma_megatron.testing import inject, rank_outcomes, run_ranks

OTHER = 500
"""Added to an iteration, of which the data is then that of another branch."""


def job(
    root: str | Path, trained_from: int | None, *, rank: int = 0, size: int = 1
) -> SnapshotWriter:
    """The writer of a job that trains on from an iteration."""
    chunks = simple_chunks(rank, size)
    return SnapshotWriter(root, chunks, torch.float32, Comm(), trained_from=trained_from)


def train(writer: SnapshotWriter, *iterations: int, shift: int = 0) -> None:
    rank, size = writer._comm.rank, writer._comm.size
    for each in iterations:
        writer.write(each, simple_data(simple_chunks(rank, size), each + shift), {})
        writer.wait(PATIENCE_S)


def there(root: str | Path) -> list[tuple[int | None, str]]:
    return [(ref.iteration, ref.state) for ref in list_checkpoints(root)]


def test_a_job_that_goes_back_writes_them_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(job(tmp_path, 0), 1, 2, 3, 4)
    kept = digests(folder_of(tmp_path, 1))
    with caplog.at_level(logging.WARNING):
        writer = job(tmp_path, 1)
    assert "2, 3, 4" in caplog.text and "given up" in caplog.text
    train(writer, 2, 3, shift=OTHER)
    assert digests(folder_of(tmp_path, 1)) == kept
    for iteration in (2, 3):
        assert_whole(folder_of(tmp_path, iteration), iteration + OTHER)
    assert there(tmp_path) == [(1, "complete"), (2, "complete"), (3, "complete"), (4, "given up")]
    train(writer, 4, shift=OTHER)
    assert there(tmp_path) == [(each, "complete") for each in (1, 2, 3, 4)]


@pytest.mark.parametrize("trained_from", [0, None])
def test_a_process_that_goes_back_writes_them_again(
    tmp_path: Path, trained_from: int | None
) -> None:
    writer = job(tmp_path, trained_from)
    train(writer, 1, 2, 3)
    train(writer, 3, shift=OTHER)
    assert_whole(folder_of(tmp_path, 3), 3 + OTHER)
    train(writer, 2, shift=2 * OTHER)
    assert_whole(folder_of(tmp_path, 2), 2 + 2 * OTHER)
    assert there(tmp_path) == [(1, "complete"), (2, "complete"), (3, "given up")]


def test_a_mere_restart_keeps_them(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(job(tmp_path, 0), 1, 2)
    before = digests(tmp_path)
    with caplog.at_level(logging.WARNING):
        writer = job(tmp_path, 2)
        assert digests(tmp_path) == before
        train(writer, 3)
    assert caplog.text == ""
    assert before.items() <= digests(tmp_path).items()
    assert there(tmp_path) == [(each, "complete") for each in (1, 2, 3)]


def test_another_interval_leaves_no_mixture(tmp_path: Path) -> None:
    """Of the branch that was given up, what lies between the new ones is not of the run."""
    train(job(tmp_path, 0), 20, 40, 60, 80)
    train(job(tmp_path, 40), 50, 70)
    assert there(tmp_path) == [
        (20, "complete"),
        (40, "complete"),
        (50, "complete"),
        (60, "given up"),
        (70, "complete"),
        (80, "given up"),
    ]
    refs = list_checkpoints(tmp_path)
    chosen = choose(refs, SelectionRequest(last=3), tmp_path)
    assert [ref.iteration for ref in chosen.refs] == [40, 50, 70]
    passed = [(each.iteration, each.kind, each.gap) for each in chosen.passed_over]
    assert passed == [(60, "given up", False), (80, "given up", False)]
    named = choose(refs, SelectionRequest(iterations=(50, 60)), tmp_path)
    assert any("iter_0000060 is used because it was named" in note for note in named.notes)
    with pytest.raises(PmaError, match="given up"):
        choose(refs, SelectionRequest(last=5), tmp_path)


def test_a_branch_of_a_branch(tmp_path: Path) -> None:
    train(job(tmp_path, 0), 10, 20, 30, 40)
    train(job(tmp_path, 30), 35, 45)
    train(job(tmp_path, 10), 15)
    states = dict(there(tmp_path))
    assert [each for each, state in states.items() if state == "complete"] == [10, 15]
    train(job(tmp_path, 15), 25)
    states = dict(there(tmp_path))
    assert [each for each, state in states.items() if state == "complete"] == [10, 15, 25]


@pytest.fixture(params=["disk", "store"])
def root(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A folder on a disk, and one in a store."""
    monkeypatch.setenv("PMA_MEGATRON_SPOOL", str(tmp_path / "spools"))
    spool.forget()
    remote = request.param == "store"
    yield f"memory://{tmp_path.name}-{tmp_path.parent.name}/run" if remote else str(tmp_path)
    spool.forget()


def test_what_a_recovery_gave_up_stays_so_without_a_snapshot_after_it(root: str) -> None:
    """The job ends before its first one, and goes on from a full checkpoint."""
    writer = job(root, 0)
    train(writer, 40, 90, 99)
    writer.train_on(97)
    writer.wait_for_uploads(PATIENCE_S)
    assert there(root) == [(40, "complete"), (90, "complete"), (99, "given up")]
    writer = job(root, 105)
    train(writer, 110)
    writer.wait_for_uploads(PATIENCE_S)
    assert there(root) == [(40, "complete"), (90, "complete"), (99, "given up"), (110, "complete")]


def test_a_snapshot_says_the_same_by_whatever_path_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = tmp_path / SNAPSHOTS
    train(job(inside, 0), 1, 2, 3, 4)
    train(job(inside, 2), 3, shift=OTHER)
    recovery_log.append(tmp_path, recovery_log.DETECTED, number=1, onset=2)
    expected = {1: "complete", 2: "spoiled", 3: "spoiled", 4: "spoiled"}
    for log in (True, False):
        assert dict(there(tmp_path)) == dict(there(inside)) == expected
        for iteration, state in expected.items():
            assert there(folder_of(inside, iteration)) == [(iteration, state)]
            monkeypatch.chdir(folder_of(inside, iteration))
            assert there(".") == [(iteration, state)]
        if log:
            (tmp_path / recovery_log.FILE).unlink()
            expected = {1: "complete", 2: "complete", 3: "complete", 4: "given up"}


def test_what_was_given_up_stays_so_without_the_snapshot_that_says_so(tmp_path: Path) -> None:
    """It is being replaced, or was deleted; nor does it go before training has come by it."""
    train(job(tmp_path, 0), 20, 40, 60, 100)
    train(job(tmp_path, 40), 50)
    shutil.rmtree(folder_of(tmp_path, 50))
    states = {20: "complete", 40: "complete", 60: "given up", 100: "given up"}
    assert dict(there(tmp_path)) == states
    train(job(tmp_path, 40), 45)
    assert dict(there(tmp_path)) == {**states, 45: "complete"}
    assert prune(tmp_path, 2, ()) == [folder_of(tmp_path, 20)]


def test_what_says_which_branches_began_is_read_or_nothing_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train(job(tmp_path, 0), 20, 40, 60)
    train(job(tmp_path, 40), 50)
    said = (tmp_path / BRANCHES_FILE).read_bytes()
    (tmp_path / BRANCHES_FILE).write_bytes(said[:-1])
    assert [state for _, state in there(tmp_path)] == ["not judged"] * 4
    with pytest.raises(PmaError, match=BRANCHES_FILE):
        choose(list_checkpoints(tmp_path), SelectionRequest(last=2), tmp_path)
    with pytest.raises(PmaError, match=BRANCHES_FILE):
        job(tmp_path, 50)
    assert prune(tmp_path, 1, ()) == [] and BRANCHES_FILE in caplog.text


def test_a_run_that_takes_up_what_was_given_up_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    writer = job(tmp_path, 0)
    train(writer, 20, 40, 60)
    writer.train_on(20)
    with caplog.at_level(logging.WARNING):
        job(tmp_path, 60)
    assert f"40, 60 in {tmp_path} count as given up" in caplog.text
    (tmp_path / BRANCHES_FILE).unlink()
    train(job(tmp_path, 60), 80)
    assert there(tmp_path) == [(each, "complete") for each in (20, 40, 60, 80)]


@pytest.mark.parametrize("wrote", [False, True])
@pytest.mark.parametrize("remote", [False, True])
def test_a_job_from_too_early_costs_the_next_one_no_snapshot(
    wrote: bool, remote: bool, tmp_path: Path, spools: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It was started by mistake, and ended soon; training then goes on from the newest."""
    root = f"memory://{tmp_path.name}/snapshots" if remote else str(tmp_path)

    def kept(trained_from: int, *iterations: int) -> None:
        chunks = simple_chunks(0, 1)
        writer = SnapshotWriter(
            root, chunks, torch.float32, Comm(), trained_from=trained_from, keep_in_store=2
        )
        for each in iterations:
            train(writer, each)
            writer.wait_for_uploads(PATIENCE_S)
            if not remote:
                writer.prune(2)
        writer.wait_for_uploads(PATIENCE_S)

    kept(0, 100, 200)
    kept(0, *([50] if wrote else []))
    caplog.clear()
    kept(200, 300)
    assert there(root) == (
        [(50, "complete"), (100, "given up"), (200, "given up"), (300, "complete")]
        if wrote
        else [(200, "complete"), (300, "complete")]
    )
    if wrote:  # nobody can know which of the two is the run: the job has said what to do
        assert f"100, 200 in {root} count as given up" in caplog.text
        assert "wrote those of iterations 50" in caplog.text
    else:
        assert caplog.text == ""


@pytest.mark.parametrize("wrote", [False, True])
def test_what_the_job_says_is_to_be_done_helps(
    wrote: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Training goes on from what counts as given up, and the job is noticed early or late."""
    train(job(tmp_path, 0), 20, 40, 60)
    train(job(tmp_path, 20), *([30] if wrote else []))
    wrong = job(tmp_path, 20)
    wrong.trained(40)
    caplog.clear()
    again = job(tmp_path, 60)
    assert f"40, 60 in {tmp_path} count as given up" in caplog.text
    train(again, 80)
    for iteration in (30, 80) if wrote else (80,):
        shutil.move(
            folder_of(tmp_path, iteration), tmp_path.parent / f"{iteration}-{tmp_path.name}"
        )
    (tmp_path / BRANCHES_FILE).unlink()
    caplog.clear()
    train(job(tmp_path, 60), 80)
    assert there(tmp_path) == [(each, "complete") for each in (20, 40, 60, 80)]
    assert caplog.text == ""


@pytest.mark.parametrize("stops_at", [59, 60, 75])
def test_a_branch_that_passes_snapshots_without_one_of_its_own(root: str, stops_at: int) -> None:
    """It has a larger interval, or ends before its first one: the next job goes on from a full
    checkpoint of it."""
    train(job(root, 0), 20, 40, 60, 80)
    other = job(root, 40)
    for iteration in range(41, stops_at + 1):
        other.trained(iteration)
    other.wait_for_uploads(PATIENCE_S)
    states = {20: "complete", 40: "complete", 60: "given up", 80: "given up"}
    told = stops_at >= 60
    assert dict(there(root)) == (states if told else dict.fromkeys(states, "complete"))
    again = job(root, stops_at)
    train(again, 90)
    again.wait_for_uploads(PATIENCE_S)
    assert dict(there(root)) == {**states, 90: "complete"}


def test_what_an_earlier_job_has_passed_goes_with_the_next(tmp_path: Path) -> None:
    """It was killed before it deleted anything."""
    train(job(tmp_path, 0), 20, 40, 60, 80, 100)
    train(job(tmp_path, 40), 55, 70)
    again = job(tmp_path, 75)
    train(again, 85)
    assert again.prune(2) == [folder_of(tmp_path, each) for each in (20, 40, 55, 60, 80)]


def test_a_full_checkpoint_in_a_snapshots_place_hides_no_branch(tmp_path: Path) -> None:
    """The snapshot that says that the run went back lies beside a full one of its iteration."""
    thin = tmp_path / SNAPSHOTS
    train(job(thin, 0), 20, 40)
    train(job(thin, 20), 50)
    full = folder_of(thin, 50).rename(tmp_path / "iter_0000050")
    train(job(thin, 20), 50)
    (full / "pma.json").unlink()
    assert [(r.iteration, r.snapshot, r.state) for r in list_checkpoints(tmp_path)] == [
        (20, True, "complete"),
        (40, True, "given up"),
        (50, False, "complete"),
    ]


def test_keep_never_deletes_what_this_branch_wrote_for_one_given_up(tmp_path: Path) -> None:
    train(job(tmp_path, 0), 30, 100, 200, 300)
    writer = job(tmp_path, 40)
    assert writer.prune(1) == []
    train(writer, 50)
    assert writer.prune(2) == [] and prune(tmp_path, 2, ()) == []
    train(writer, 60)
    assert writer.prune(2) == [folder_of(tmp_path, 30)]
    train(writer, 110)
    # Training has come by 100 without a snapshot there: nothing replaces it any more.
    assert writer.prune(2) == [folder_of(tmp_path, 50), folder_of(tmp_path, 100)]
    again = job(tmp_path, 110)
    train(again, 120)
    assert again.prune(2) == [folder_of(tmp_path, 60)]
    assert there(tmp_path) == [
        (110, "complete"),
        (120, "complete"),
        (200, "given up"),
        (300, "given up"),
    ]


def test_weights_that_go_back_while_iterations_go_on(tmp_path: Path) -> None:
    """As a recovery in process does: what was written in the spike is no part of the run."""
    writer = job(tmp_path, 0)
    train(writer, 1, 2, 3, 4)
    writer.train_on(2)
    train(writer, 5)
    assert there(tmp_path) == [
        (1, "complete"),
        (2, "complete"),
        (3, "given up"),
        (4, "given up"),
        (5, "complete"),
    ]
    assert writer.prune(3) == [folder_of(tmp_path, 3), folder_of(tmp_path, 4)]


def again_in_ranks(rank: int, size: int, root: str) -> str:
    writer = job(root, 0, rank=rank, size=size)
    try:
        train(writer, 1, shift=OTHER)
    except PmaError as error:
        return str(error)
    return "written"


def test_ranks_replace_what_one_rank_wrote(tmp_path: Path) -> None:
    train(job(tmp_path, 0), 1)
    assert run_ranks(again_in_ranks, 2, str(tmp_path)) == ["written"] * 2
    assert_whole(folder_of(tmp_path, 1), 1 + OTHER)
    assert (folder_of(tmp_path, 1) / "__1_0.distcp").is_file()
    assert {*names_in(tmp_path)} == {"iter_0000001", BRANCHES_FILE}


def test_what_is_replaced_is_never_taken_for_published(tmp_path: Path) -> None:
    """A rank that fails is told to all, though a folder of that name was there."""
    train(job(tmp_path, 0), 1)
    with inject("snapshot", rank=0, action="raise"):
        said = run_ranks(again_in_ranks, 2, str(tmp_path))
    assert all("rank 0 failed" in each for each in said)


def test_what_is_no_snapshot_is_refused_on_all_ranks(tmp_path: Path) -> None:
    foreign = tmp_path / "iter_0000001" / "common.pt"
    foreign.parent.mkdir()
    foreign.write_bytes(b"of a checkpoint")
    said = run_ranks(again_in_ranks, 2, str(tmp_path))
    assert all("rank 0 failed" in each and "is no snapshot" in each for each in said)
    assert [path.name for path in foreign.parent.iterdir()] == ["common.pt"]


def test_killed_while_it_replaces(tmp_path: Path) -> None:
    train(job(tmp_path, 0), 1, 2)
    with inject("snapshot-publish", rank=0, action="kill"):
        (end,) = rank_outcomes(again_in_ranks, 1, str(tmp_path), init=False)
    assert end.signal == "SIGKILL"
    assert there(tmp_path) == [(2, "given up")]
    train(job(tmp_path, 0), 1, 2, shift=OTHER)
    for iteration in (1, 2):
        assert_whole(folder_of(tmp_path, iteration), iteration + OTHER)
    snapshots = {"iter_0000001", "iter_0000002"}
    assert {*names_in(tmp_path)} == {*snapshots, BRANCHES_FILE}
