"""Which checkpoints a recovery takes, of runs whose logs tell less than every iteration, or more.

The oracle is the loss of every iteration, which makes the logs and is not given to the recovery.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from pma_megatron.errors import SelectionError
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.spikes.detector import SpikeSettings
from pma_megatron.spikes.healthy import Healthy, Span
from pma_megatron.spikes.metrics import read_metrics
from pma_megatron.spikes.onsets import judge
from pma_megatron.spikes.recovery import _chosen, _Found, _skipped
from pma_megatron.spikes.request import RecoveryRequest

SPIKE = SpikeSettings(warmup=24, window=24, patience=10)
Row = tuple[int, float]


def ref(iteration: int) -> CheckpointRef:
    return CheckpointRef(
        path=f"/run/iter_{iteration:07d}",
        format="torch_dist",
        iteration=iteration,
        consumed_samples=iteration * 8,
        consumed_tokens=iteration * 128,
        tokens_unknown_because=None,
        complete=True,
        incomplete_because=None,
    )


def losses(levels: Mapping[range, float], end: int, seed: int = 1) -> list[Row]:
    """The loss of every iteration of a run with 2 nats that is at `levels` instead."""
    noise = random.Random(seed)
    return [
        (i, next((v for k, v in levels.items() if i in k), 2.0) + noise.gauss(0, 0.02))
        for i in range(1, end)
    ]


def means(rows: list[Row], k: int) -> list[Row]:
    """What is logged with an interval of `k`."""
    return [
        (rows[i + k - 1][0], sum(loss for _, loss in rows[i : i + k]) / k)
        for i in range(0, len(rows) - k + 1, k)
    ]


def written(path: Path, rows: Iterable[Row]) -> str:
    path.write_text("iteration,loss\n" + "".join(f"{i},{loss:.5f}\n" for i, loss in rows))
    return str(path)


def recovered(path: Path, rows: Iterable[Row], saved: Iterable[int]) -> tuple[_Found, Healthy]:
    request = RecoveryRequest(
        load="/run", save="/new", metrics=written(path, rows), spike=SPIKE, last=None
    )
    return _chosen(request, [ref(i) for i in saved])


def taken(found: Healthy) -> list[int | None]:
    return [each.iteration for each in found.selection.refs]


@pytest.mark.parametrize("began", [1201, 1204, 1210, 1218])
@pytest.mark.parametrize(
    "log",
    [
        lambda rows: means(rows, 20),  # Megatron's log
        lambda rows: rows[19::20],  # its TensorBoard file
        lambda rows: [row for row in rows if not 1190 < row[0] < 1240],  # a gap
        lambda rows: [*rows[:1189], (1190, math.nan), *rows[1239:]],
        lambda rows: rows,
    ],
)
def test_no_checkpoint_of_a_spike_is_taken_however_little_is_logged(
    tmp_path: Path, began: int, log: Callable[[list[Row]], list[Row]]
) -> None:
    rows = log(losses({range(began, 2000): 5.0}, 2000))
    saved = range(10, 1991, 10)
    found, healthy = recovered(tmp_path / "log.csv", rows, saved)
    # What was saved in the spike, or less than the margin before it, and nothing that was logged
    # as well from more than that on.
    seen = [i for i, loss in rows if i < found.onset and math.isfinite(loss)][-1]
    assert seen < began
    newest = max(i for i in saved if i + 20 <= seen)
    assert taken(healthy) == [newest - 20, newest - 10, newest]
    refused = {each.ref.iteration for each in healthy.rejected}
    assert refused == {i for i in saved if i > newest}
    skip, _ = _skipped(RecoveryRequest(load="/run", save="/new", metrics="log"), found)
    assert skip is not None and skip.first == seen + 1


def test_the_whole_log_lies_in_the_spike(tmp_path: Path) -> None:
    """Nothing says what the checkpoints before it are."""
    rows = [(i, math.nan) for i in range(15000, 15100)]
    with pytest.raises(SelectionError, match=r"nothing was logged before 15000.*onset="):
        recovered(tmp_path / "log.csv", rows, range(250, 15001, 250))


def test_a_collapse_that_collapses_again_began_with_the_first(tmp_path: Path) -> None:
    def told(levels: Mapping[range, float]) -> tuple[int | None, tuple[Span, ...]]:
        """What is lost, and what was."""
        rows = written(tmp_path / "levels.csv", losses(levels, 900))
        course = judge(read_metrics(rows).points, SPIKE)
        onset = None if course.lost is None else course.lost.onset
        return onset, course.spans(onset or 900)

    assert told({range(300, 600): 4.0, range(600, 900): 6.0}) == (300, ())
    # The run came back in between: only the second is to be recovered from.
    lost, (span,) = told({range(300, 400): 4.0, range(700, 900): 6.0})
    assert lost == 700 and span.first == 300 and 400 <= span.last < 420
    # A higher level that stays is where the run is now, not a spike.
    assert told({range(300, 700): 2.2, range(700, 900): 6.0}) == (700, ())
    # It came back from both, at the end.
    lost, both = told({range(300, 400): 4.0, range(400, 500): 6.0})
    assert lost is None and {span.first for span in both} == {300, 400}
    # And it did not: the noise of a few points is no return.
    assert told({range(300, 900): 2.35})[0] == 300


BACK = {
    "high for a while": {range(600, 700): 5.0},
    "NaN": {range(600, 603): math.nan},
    "NaN from the start": {range(1, 4): math.nan},
    "NaN, then high": {range(600, 603): math.nan, range(603, 650): 5.0},
}


@pytest.mark.parametrize("name", BACK)
def test_what_the_run_came_back_from_is_no_reason_to_go_back(tmp_path: Path, name: str) -> None:
    levels, saved = BACK[name], range(50, 1500, 50)
    with pytest.raises(SelectionError, match=r"no spike .*back at iteration \d+.*onset="):
        recovered(tmp_path / "back.csv", losses(levels, 1500), saved)
    # It is one to pass over what was saved in it, when the run is lost later.
    found, healthy = recovered(
        tmp_path / "lost.csv", losses({**levels, range(755, 1500): 5.0}, 1500), saved
    )
    off = {i for i in saved if any(i - 1 in k or i in k for k in levels)}
    assert found.onset == 755 and not off & {*taken(healthy)}
    assert taken(healthy)[-1] == (550 if name == "high for a while" else 700)
    assert {*off} <= {each.ref.iteration for each in healthy.rejected}


def test_a_run_that_is_more_often_nan_than_not_is_lost(tmp_path: Path) -> None:
    rows = losses({range(600, 700): math.nan}, 600 + 600)
    rows = [(i, loss if i < 700 or i % 3 == 0 else math.nan) for i, loss in rows]
    found, healthy = recovered(tmp_path / "log.csv", rows, range(50, 1150, 50))
    assert found.onset == 600 and taken(healthy) == [450, 500, 550]


def went_back(
    first: Mapping[range, float], again: int, second: Mapping[range, float], k: int
) -> list[Row]:
    """A run to 1600 that went back, and on to 1500."""
    one, two = losses(first, 1601), losses(second, 1501, seed=2)
    return means(one, k) + [row for row in means(two, k) if row[0] > again]


@pytest.mark.parametrize("k", [1, 10])
def test_checkpoints_of_a_branch_that_was_given_up_are_not_taken(tmp_path: Path, k: int) -> None:
    saved = range(50, 1601, 50)
    lost, later = {range(1110, 1601): 5.0}, {range(1405, 1601): 5.0}
    found, healthy = recovered(tmp_path / "a.csv", went_back(lost, 1000, later, k), saved)
    # 1050 is before the onset of either; from 1100 on it may be of the one that was lost.
    assert taken(healthy) == [950, 1000, 1050]
    doubted = {each.ref.iteration: each for each in healthy.rejected}
    assert set(doubted) == set(range(1100, 1601, 50))
    for iteration in range(1100, 1351, 50):
        assert doubted[iteration].passed_over.kind == "not judged"
    # One that was well as far as it went is as good: a node failed.
    found, healthy = recovered(tmp_path / "b.csv", went_back({}, 1000, later, k), saved)
    assert taken(healthy)[-1] == 1350 and found.onset >= 1400
    # Rising where it ends, and not yet known to be lost: somebody saw it.
    rising = went_back({range(1595, 1601): 5.0}, 1000, later, k)
    assert taken(recovered(tmp_path / "c.csv", rising, saved)[1])[-1] == 1350
    # Begun anew in the same folder: the first run was well there as well.
    anew = went_back({range(1200, 1601): 5.0}, 0, later, k)
    assert taken(recovered(tmp_path / "d.csv", anew, saved)[1]) == [1050, 1100, 1150]
    # A log that begins shortly before says too little of what was given up.
    short = [row for row in went_back({}, 1000, later, k) if row[0] > 1000 - 10 * k]
    kept = taken(recovered(tmp_path / "e.csv", short, saved)[1])
    assert kept[-1] == 1000
    # It was given up in a second file, or by a log that begins with what it went back to.
    rows = went_back(lost, 1000, later, k)
    cut = next(i for i in range(1, len(rows)) if rows[i][0] < rows[i - 1][0])
    parts = (written(tmp_path / "1", rows[:cut]), written(tmp_path / "2", rows[cut:]))
    request = RecoveryRequest(load="/run", save="/new", metrics=parts, spike=SPIKE)
    assert taken(_chosen(request, [ref(i) for i in saved])[1]) == [950, 1000, 1050]


def test_consumed_samples_tell_the_branches_apart(tmp_path: Path) -> None:
    """The newer branch went on with twice the batch, and has saved up to 1200 until now."""
    rows = went_back({range(1110, 1601): 5.0}, 1000, {range(1405, 1601): 5.0}, 1)
    text, before = ["iteration,loss,consumed samples"], 0
    newer = False
    for i, loss in rows:
        newer, before = newer or i < before, i
        text.append(f"{i},{loss:.5f},{8 * i + 8 * (i - 1000) * newer}")
    log = tmp_path / "log.csv"
    log.write_text("\n".join(text) + "\n")
    request = RecoveryRequest(load="/run", save="/new", metrics=str(log), spike=SPIKE)
    refs = [
        replace(ref(i), consumed_samples=8 * i + 8 * (i - 1000) * (1000 < i <= 1200))
        for i in range(50, 1601, 50)
    ]
    found = _chosen(request, refs)[1]
    assert taken(found) == [1100, 1150, 1200]
    doubted = {each.ref.iteration for each in found.rejected if each.kind == "not judged"}
    assert doubted == {1250, 1300, 1350}


def test_checkpoints_of_given_up_rows_in_no_order(tmp_path: Path) -> None:
    rows = went_back({range(1110, 1601): 5.0}, 1000, {range(1405, 1601): 5.0}, 1)
    swapped = [row for i in range(0, len(rows) - 1, 2) for row in (rows[i + 1], rows[i])]
    _, healthy = recovered(tmp_path / "a.csv", swapped, range(50, 1601, 50))
    assert taken(healthy) == [950, 1000, 1050]


@pytest.mark.parametrize("bad", [1, 3, 12, 60])
def test_a_checkpoint_of_a_branch_that_was_given_up_after_few_lines_is_not_taken(
    tmp_path: Path, bad: int
) -> None:
    """Its job died in the spike, from which it has saved one checkpoint, or after it had begun."""
    good = means(losses({}, 2001), 10)
    spike = means(losses({range(1001, 3000): 9.0}, 1001 + 10 * bad), 10)
    newer = [*good[100:], *means(losses({range(2001, 3000): 9.0}, 2801), 10)[200:]]
    last = 1000 + 10 * bad
    rows = [*good[:100], *spike[100:], *newer]
    saved = [900, 1000, last - 5, last, last + 5, 1900]
    _, healthy = recovered(tmp_path / "a.csv", rows, saved)
    assert {*taken(healthy)} <= {900, 1000, 1900} and taken(healthy)[-1] == 1900
    # One from scratch, lost among the lines that are learned from.
    first = means(losses({range(101, 3000): 9.0}, 101 + 10 * bad), 10)
    spoiled = [i for i in (125, 155, 385, 605) if i <= 100 + 10 * bad]
    _, healthy = recovered(tmp_path / "b.csv", [*first, *good, *newer[100:]], [*spoiled, 1900])
    assert taken(healthy) == [1900]


def test_a_branch_that_was_not_judged_is_not_taken(tmp_path: Path) -> None:
    """NaN, and back: what came then was learned from anew, and the run was lost while it was."""
    first = means(losses({range(571, 601): math.nan, range(621, 1000): 9.0}, 801), 10)
    rows = [*first, *means(losses({range(1401, 3000): 9.0}, 1801, seed=2), 10)[60:]]
    _, healthy = recovered(tmp_path / "a.csv", rows, [500, 750, 1300])
    assert taken(healthy) == [500, 1300]
