"""What a recovery says where metrics do not tell: no verdict yet, or nothing that was judged.

What a message offers is typed in again, and the recovery is the one of the loss of each iteration.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from test_onsets import SPIKE, Row, losses, means, recovered, ref, taken, written

from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.spikes.healthy import HealthyRequest, Span, choose_healthy
from pma_megatron.spikes.recovery import _chosen, _skipped
from pma_megatron.spikes.request import RecoveryRequest

SAVED = range(50, 2000, 50)


def refusal(path: Path, rows: list[Row]) -> str:
    with pytest.raises(SelectionError) as error:
        recovered(path, rows, SAVED)
    return str(error.value)


def offered(path: Path, said: str) -> list[list[int | None]]:
    """What is chosen when each thing that a message offers is done."""
    patience = re.search(r"patience=(\d+)", said)
    onset = re.search(r"onset=(\d+) with skip=Span\(first=(\d+), last=(\d+)\)", said)
    request = RecoveryRequest(load="/run", save="/new", metrics=str(path), spike=SPIKE)
    ways = []
    if patience:
        ways.append(replace(request, spike=replace(SPIKE, patience=int(patience[1]))))
    if onset:
        skip = Span(int(onset[2]), int(onset[3]))
        ways.append(replace(request, metrics=None, onset=int(onset[1]), skip=skip))
    chosen = []
    for way in ways:
        found, healthy = _chosen(way, [ref(i) for i in SAVED])
        chosen.append(taken(healthy))
        skip, _ = _skipped(way, found)
        assert skip is not None and skip.first == found.well_until + 1
    return chosen


@pytest.mark.parametrize("k", [1, 10])
def test_a_rise_that_is_not_confirmed_yet_is_named(tmp_path: Path, k: int) -> None:
    log = tmp_path / "log.csv"
    spike = replace(SPIKE, patience=100)
    rows = means(losses({range(1201, 3000): 5.0}, 1201 + 51 * k), k)
    request = RecoveryRequest(load="/run", save="/new", metrics=written(log, rows), spike=spike)
    with pytest.raises(SelectionError) as error:
        _chosen(request, [ref(i) for i in SAVED])
    said = str(error.value)
    onset = 1200 + k
    assert f"no verdict yet: the loss has been 3.0 nats above its baseline since {onset}" in (
        said.replace("iteration ", "")
    )
    assert "for 51 logged points of the 100 that patience= gives it" in said
    assert offered(log, said) == [[1050, 1100, 1150]] * 2


def test_a_job_that_died_at_its_first_nan_is_told(tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    said = refusal(log, losses({range(1201, 1203): math.nan}, 1203))
    assert "no verdict yet" in said and "last 2 logged point(s), from iteration 1201 on" in said
    assert offered(log, said) == [[1050, 1100, 1150]]
    often = [(i, math.nan if i > 1200 and i % 3 else loss) for i, loss in losses({}, 1401)]
    said = refusal(log, often[:-1])
    assert "last 1 logged point(s) is not finite (nor others since iteration 1201)" in said
    assert offered(log, said) == [[1050, 1100, 1150]]
    log.write_text("iteration,loss,grad_norm\n")
    text = "".join(f"{i},{loss:.5f},{1.0 if i < 1201 else 'inf'}\n" for i, loss in losses({}, 1205))
    log.write_text(log.read_text() + text)
    request = RecoveryRequest(load="/run", save="/new", metrics=str(log), spike=SPIKE)
    with pytest.raises(SelectionError, match="gradient norm of the last 4 logged") as error:
        _chosen(request, [ref(i) for i in SAVED])
    assert offered(log, str(error.value)) == [[1050, 1100, 1150]]


def test_a_healthy_log_offers_nothing_and_what_was_read_is_said(tmp_path: Path) -> None:
    rows = losses({}, 1500)
    gap = [row for row in rows if not 700 < row[0] < 800]
    assert offered(tmp_path / "a.csv", said := refusal(tmp_path / "a.csv", gap)) == []
    assert "no verdict yet" not in said and "1 gap(s)" in said and "700 to 800" in said
    short = refusal(tmp_path / "b.csv", rows[:20])
    assert "Nothing was judged" in short and "there are 20" in short and "before" not in short
    later = refusal(tmp_path / "b.csv", rows[1480:])
    assert "Nothing was judged" in later and "Give the log from before too" in later
    assert "Nothing was judged" not in refusal(tmp_path / "c.csv", rows[:25])


@pytest.mark.parametrize("k", [1, 10])
@pytest.mark.parametrize(
    ("began", "high"),
    [
        (1, range(10, 16)),  # among the points that are learned from
        (1, range(12, 21)),
        (101, range(110, 116)),
        (101, range(101, 116)),  # the log begins in it
    ],
)
def test_a_spike_among_points_that_are_learned_from(
    tmp_path: Path, k: int, began: int, high: range
) -> None:
    """Their loss is known only by its neighbours."""
    spike = range((high.start - 1) * k + 1, (high.stop - 1) * k + 1)
    rows = means(losses({spike: 4.0, range(150 * k + 1, 900 * k): 9.0}, 200 * k + 1), k)
    saved = [i * k for i in (90, high.start, high[len(high) // 2], high.stop + 2, 121, 128)]
    healthy = recovered(tmp_path / "a.csv", rows[began - 1 :], saved)[1]
    used = [i * k for i in ((high.stop + 2, 121, 128) if began > 1 else (90, 121, 128))]
    assert taken(healthy) == used
    spoiled = {i for i in saved if i in spike and i != spike[-1]}
    assert spoiled and spoiled <= {each.ref.iteration for each in healthy.rejected} | (
        {i for i in saved if i < min(used)}
    )


def test_checkpoints_that_nothing_tells_of_are_named(tmp_path: Path) -> None:
    rows = losses({range(1201, 3000): 5.0}, 1500)

    def notes(rows: list[Row], saved: list[int]) -> str:
        found, healthy = recovered(tmp_path / "a.csv", rows, saved)
        assert taken(healthy) == saved
        return " ".join(found.notes)

    before = notes(rows[1000:], [500, 900, 1100])
    assert "metrics begin at iteration 1001" in before and "at 500, 900:" in before
    among = notes(rows[1000:], [1000, 1020, 1100])
    assert "1000, 1020: nothing was judged there" in among and "1001 to 1024" in among
    assert "1000, 1020" not in notes(rows, [1000, 1020, 1100]) and "judged" in notes(rows, [7, 99])
    assert "metrics begin" not in notes(means(rows, 10), [3, 1100])


def test_weights_alone_are_no_checkpoint_to_go_back_to() -> None:
    def chosen(*weights: int) -> list[int | None]:
        refs = [replace(ref(i), weights_only=i in weights) for i in range(100, 901, 100)]
        return taken_of(refs, onset=850)

    def taken_of(refs: list, onset: int, **asked: int) -> list[int | None]:
        found = choose_healthy(refs, HealthyRequest(onset=onset, **asked))
        return [each.iteration for each in found.selection.refs]

    assert chosen() == [600, 700, 800] and chosen(800) == [500, 600, 700]
    assert chosen(700) == [500, 600, 800]
    with pytest.raises(SelectionError, match=r"saved alone.*average weights with pma merge"):
        chosen(*range(100, 901, 100))
    # A snapshot is saved without the rest, and has main params.
    thin = [ref(500), replace(ref(600), weights_only=True, snapshot=True), ref(700)]
    assert taken_of(thin, onset=850) == [500, 600, 700]


@pytest.mark.parametrize("last", [0, -1])
def test_no_checkpoint_at_all_cannot_be_asked_for(last: int) -> None:
    with pytest.raises(UsageError, match=f"last= must be at least 1, got {last}"):
        HealthyRequest(onset=5, last=last)


def test_metrics_beside_an_onset_are_refused_as_such() -> None:
    with pytest.raises(UsageError, match=r"cannot stand together.*leave out metrics="):
        RecoveryRequest(load="/a", save="/b", onset=5, metrics="log")


def test_samples_of_a_step_are_not_those_consumed(tmp_path: Path) -> None:
    rows: Mapping[int, float] = dict(losses({range(1201, 3000): 5.0}, 1300))
    log = tmp_path / "log.csv"
    text = "".join(f"{i},{loss:.5f},1024\n" for i, loss in rows.items())
    log.write_text("step,loss,samples\n" + text)
    request = RecoveryRequest(load="/run", save="/new", metrics=str(log), spike=SPIKE)
    assert taken(_chosen(request, [ref(i) for i in SAVED])[1]) == [1050, 1100, 1150]
