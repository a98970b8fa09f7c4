"""What a recovery goes back to: pure choices on references, the log, and the resume command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pma_megatron import SelectionRequest
from pma_megatron.errors import CheckpointError, SelectionError, UsageError
from pma_megatron.runs import recovery_log
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import select
from pma_megatron.spikes.healthy import HealthyRequest, Span, choose_healthy


def ref(iteration: int | None, **changes: Any) -> CheckpointRef:
    fields = {
        "path": f"/run/iter_{iteration or 0:07d}",
        "format": "torch_dist",
        "iteration": iteration,
        "consumed_samples": (iteration or 0) * 8,
        "consumed_tokens": (iteration or 0) * 128,
        "tokens_unknown_because": None,
        "complete": True,
        "incomplete_because": None,
    }
    return CheckpointRef(**{**fields, **changes})


RUN = [ref(i) for i in range(100, 1001, 100)]


def chosen(onset: int, refs: list[CheckpointRef] = RUN, **request: Any) -> list[int | None]:
    found = choose_healthy(refs, HealthyRequest(onset=onset, **request))
    return [r.iteration for r in found.selection.refs]


@pytest.mark.parametrize(
    ("onset", "margin", "expected"),
    [
        (721, 20, [500, 600, 700]),  # 21 healthy iterations after 700, 20 are wanted
        (720, 20, [400, 500, 600]),
        (701, 0, [500, 600, 700]),
        (700, 0, [400, 500, 600]),  # 700 was saved after the first bad iteration
        (5000, 20, [800, 900, 1000]),
    ],
)
def test_the_newest_three_before_the_margin(onset: int, margin: int, expected: list[int]) -> None:
    assert chosen(onset, margin_iterations=margin) == expected


def test_every_rejected_one_has_its_reason() -> None:
    damaged = [
        *RUN[:4],
        ref(500, complete=False, incomplete_because="cut off"),
        ref(600, unhealthy_because="saved in a spike"),
        *RUN[6:],
    ]
    found = choose_healthy(
        damaged, HealthyRequest(onset=905, exclude=(300,), spans=(Span(350, 450),))
    )
    assert [r.iteration for r in found.selection.refs] == [200, 700, 800]
    reasons = {each.ref.iteration: each.reason for each in found.rejected}
    assert set(reasons) == {1000, 900, 600, 500, 400, 300}
    for iteration, words in {
        1000: "at or after the onset",
        900: "5 iterations before",
        600: "saved in a spike",
        500: "not complete: cut off",
        400: "earlier spike",
        300: "exclude=",
    }.items():
        assert words in reasons[iteration]


def test_fewer_than_three_do_with_a_note_and_a_count_asked_for_is_kept() -> None:
    found = choose_healthy(RUN, HealthyRequest(onset=250))
    assert [r.iteration for r in found.selection.refs] == [100, 200] and "only 2" in found.notes[0]
    assert chosen(190) == [100]
    assert chosen(950, last=5) == [500, 600, 700, 800, 900]
    with pytest.raises(SelectionError, match="last=5"):
        chosen(250, last=5)
    assert chosen(950, last=3, interval_iterations=200) == [500, 700, 900]


def test_further_back_after_failed_attempts() -> None:
    assert chosen(950, further_back=2) == [500, 600, 700]
    with pytest.raises(SelectionError, match="nothing further back"):
        chosen(250, further_back=2)


def test_the_newest_is_a_full_one_and_snapshots_fill_in() -> None:
    thin = [*RUN, ref(550, snapshot=True), ref(750, snapshot=True)]
    assert chosen(780, thin) == [550, 600, 700]
    with pytest.raises(SelectionError, match="only snapshots"):
        chosen(780, [ref(550, snapshot=True)])


@pytest.mark.parametrize(
    ("refs", "onset", "words"),
    [
        ([], 50, "no checkpoint to recover from"),
        (RUN, 50, "at or after the onset"),  # an onset before the first checkpoint
        (RUN, 110, "Lower margin_iterations="),
        ([ref(None)], 50, "no iteration number"),
    ],
)
def test_nothing_healthy_left_names_each(refs: list[Any], onset: int, words: str) -> None:
    with pytest.raises(SelectionError, match=words):
        chosen(onset, refs)


def test_requests_out_of_range() -> None:
    for wrong in ({"onset": 0}, {"onset": 5, "margin_iterations": -1}):
        with pytest.raises(UsageError):
            HealthyRequest(**wrong)


def test_the_log_tells_spoiled_checkpoints(tmp_path: Path) -> None:
    assert recovery_log.read(tmp_path).doubt(500, {}) is None
    recovery_log.append(tmp_path, recovery_log.DETECTED, number=1, onset=450, reason="up")
    recovery_log.append(tmp_path, recovery_log.BEGUN, number=1, newest_healthy=400)
    recovery_log.append(tmp_path, recovery_log.DETECTED, number=2, onset=800)
    history = recovery_log.read(tmp_path)
    assert [spike.onset for spike in history.spikes] == [450, 800]
    trusted = {
        (i, n): history.doubt(i, {recovery_log.RECORD: n}) is None
        for i in (400, 449, 450, 800, 900)
        for n in (0, 1, 2)
    }
    assert [key for key, good in trusted.items() if not good] == [
        (450, 0),
        (800, 0),
        (800, 1),
        (900, 0),
        (900, 1),
    ]
    assert history.attempts_from(400) == 1 and history.attempts_from(300) == 0


def test_a_selection_passes_over_spoiled_ones_unless_they_are_named() -> None:
    run = [*RUN[:8], ref(900, unhealthy_because="saved in a spike"), RUN[9]]
    found = select(run, SelectionRequest(last=3, allow_gaps=True))
    assert [r.iteration for r in found.refs] == [700, 800, 1000]
    (left,) = found.passed_over
    assert str(left) == "/run/iter_0000900 is passed over: saved in a spike"
    named = select(run, SelectionRequest(iterations=(800, 900)))
    assert [r.iteration for r in named.refs] == [800, 900]
    ended = select(run, SelectionRequest(last=2, end_iteration=900))
    assert [r.iteration for r in ended.refs] == [800, 900]
    assert "iter_0000900 is used because it was named: saved in a spike" in ended.notes[0]


def test_what_was_saved_before_a_judgement_is_not_judged(tmp_path: Path) -> None:
    def untrusted(state: str | None = None) -> dict[int, set[int]]:
        """Recoveries -> iterations not trusted, and those of them that are merely not judged."""
        history, places = recovery_log.read(tmp_path), range(400, 901, 50)
        found = {
            n: {
                i: history.doubt(i, {recovery_log.RECORD: n, recovery_log.STATE: state})
                for i in places
            }
            for n in (1, 2)
        }
        return {
            n: {i for i, doubt in of.items() if doubt and not doubt.judged}
            for n, of in found.items()
        }

    recovery_log.append(tmp_path, recovery_log.DETECTED, number=1, onset=450)
    recovery_log.append(tmp_path, recovery_log.DONE, number=1, iteration=500)
    assert recovery_log.read(tmp_path).unjudged_since == 500
    assert untrusted() == {1: set(range(500, 901, 50)), 2: set(range(500, 901, 50))}
    # It broke again before any loss was judged, at 650: what lies in between stays out for good.
    recovery_log.append(tmp_path, recovery_log.DETECTED, number=2, onset=650)
    recovery_log.append(tmp_path, recovery_log.DONE, number=2, iteration=700)
    recovery_log.append(tmp_path, recovery_log.JUDGED, number=2, iteration=800)
    assert recovery_log.read(tmp_path).unjudged_since is None
    assert untrusted() == {1: {500, 550, 600}, 2: {500, 550, 600, 650, 700, 750}}
    # A checkpoint that has the detector's memory says it itself.
    assert untrusted('{"judged": true}') == {1: set(), 2: set()}
    assert 900 in untrusted('{"judged": false}')[2]
    assert 900 in untrusted('{"cooldown": 3}')[2] and not untrusted('{"cooldown": 0}')[2]
    assert untrusted("no JSON") == untrusted()


GOOD = b'{"event": "detected", "number": 1, "onset": 450}'


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (GOOD[:-1], "no JSON"),
        (GOOD.replace(b"450", b'"x"'), "onset is 'x', expected a number from 0"),
        (GOOD.replace(b"450", b"NaN"), "NaN is no number"),
        (GOOD.replace(b"450", b"true"), "onset is True"),
        (GOOD.replace(b"450", b"-1"), "onset is -1"),
        (GOOD.replace(b', "onset": 450', b""), "onset is missing"),
        (GOOD.replace(b"}", b', "onset": 900}'), "twice"),
        (GOOD.replace(b"detected", b"detectee"), "event 'detectee', expected one of detected"),
        (b"[" + GOOD + b"]", "a list, expected an object"),
        (b"\xef\xbb\xbf" + GOOD, "no JSON"),
        (GOOD.decode().encode("utf-16"), "not UTF-8"),
        (GOOD.decode().encode("utf-16-le"), "no JSON"),
        (b"\xff" + GOOD, "not UTF-8"),
        (b"\0" * 60, "no JSON"),
        (bytes(range(128, 255)), "not UTF-8"),
        (b"[" * 100_000, ""),
        (b'{"event": "done", "number": 1, "iteration": 500}', "no line above it"),
    ],
)
def test_no_line_of_the_log_is_passed_over(tmp_path: Path, line: bytes, says: str) -> None:
    """Each may tell of a spike: a line that is not understood must not make a run healthy."""
    other = GOOD.replace(b'"number": 1', b'"number": 7')
    for number, data in enumerate((line + b"\n", other + b"\n" + line + b"\n" + other + b"\n"), 1):
        (tmp_path / recovery_log.FILE).write_bytes(data)
        with pytest.raises(CheckpointError, match=rf"jsonl, line {number}, is not .*{says}"):
            recovery_log.read(tmp_path)


def test_a_line_that_was_cut_off_is_refused_and_says_that_training_may_be_writing(
    tmp_path: Path,
) -> None:
    path = tmp_path / recovery_log.FILE
    for cut in range(1, len(GOOD)):
        path.write_bytes(GOOD + b"\n" + GOOD[:cut])
        with pytest.raises(CheckpointError, match=r"line 2.*writing it this minute, try again"):
            recovery_log.read(tmp_path)
    # What comes after it does not make it whole, nor vanish in it.
    recovery_log.append(tmp_path, recovery_log.DETECTED, number=2, onset=800)
    assert path.read_bytes().splitlines()[2].endswith(b'"onset": 800}')
    with pytest.raises(CheckpointError, match="line 2,"):
        recovery_log.read(tmp_path)
    for whole in (GOOD, GOOD + b"\n", b"\n" + GOOD + b"\r\n\n"):
        path.write_bytes(whole)
        assert [spike.onset for spike in recovery_log.read(tmp_path).spikes] == [450]
    path.write_bytes(b"\n")
    with pytest.raises(CheckpointError, match="is empty"):
        recovery_log.read(tmp_path)


def test_a_line_that_does_not_fit_on_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.write
    for before in (None, GOOD + b"\n"):
        if before is not None:
            (tmp_path / recovery_log.FILE).write_bytes(before)
        monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, data[:9]))
        with pytest.raises(OSError, match="No space left"):
            recovery_log.append(tmp_path, recovery_log.DETECTED, number=1, onset=3)
        monkeypatch.undo()
        assert len(recovery_log.read(tmp_path).spikes) == (before is not None)
