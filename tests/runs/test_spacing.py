"""Checkpoints at a distance: intervals, tolerance, windows of tokens, holes, doubtful counts."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_refs import SEQ, WRITING, B, chosen, every, ref, refusal, untold
from pma_megatron.errors import SelectionError
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest


def test_interval_takes_the_nearest_to_each_place() -> None:
    refs = [ref(i) for i in (1000, 3900, 4200, 7900, 12_000)]
    selection = select(refs, SelectionRequest(last=3, interval_tokens=4 * B))
    assert [r.iteration for r in selection.refs] == [3900, 7900, 12_000]
    assert selection.spacing.gaps == (4 * B, 4_100_000_000)
    assert (selection.spacing.requested, selection.spacing.tolerance) == (4 * B, 0.25)
    assert [(e.iteration, e.kind) for e in selection.passed_over] == [(4200, "not needed")]
    equally_near = [ref(i) for i in (7500, 8500, 12_000)]
    assert chosen(equally_near, last=2, interval_tokens=4 * B) == [8500, 12_000]


def test_tolerance_is_inclusive_and_exact() -> None:
    refs, request = [ref(129), ref(200)], {"last": 2, "interval_iterations": 100}
    assert chosen(refs, **request, tolerance=0.29) == [129, 200]
    for tolerance in (0.28, 0.0):
        assert "tolerance=0.29" in refusal(refs, **request, tolerance=tolerance)


def test_interval_in_iterations_needs_no_tokens() -> None:
    refs = [untold(i) for i in range(500, 6001, 500)]
    selection = select(refs, SelectionRequest(last=3, interval_iterations=2000))
    assert [r.iteration for r in selection.refs] == [2000, 4000, 6000]
    assert (selection.spacing.unit, selection.spacing.gaps) == ("iterations", (2000, 2000))
    assert (selection.position_unit, selection.positions) == ("iterations", (2000, 4000, 6000))
    assert any("positions are in iterations, not tokens" in note for note in selection.notes)
    with_tokens = select(every(500, 6000), SelectionRequest(last=3, interval_iterations=2000))
    assert with_tokens.spacing.unit == "iterations"
    assert with_tokens.positions == (2 * B, 4 * B, 6 * B)


def test_a_hole_names_the_place_its_neighbours_and_ways_that_work() -> None:
    refs = every(4000, 40_000)
    refs[4] = dataclasses.replace(refs[4], complete=False, incomplete_because=WRITING)
    said = refusal(refs, last=6, interval_tokens=4 * B)
    assert (
        "interval_tokens=4_000_000_000 for 6 checkpoints needs a complete one near 20B tokens"
        in said
    )
    assert "5 x that before iteration 40000 (40B tokens)" in said
    assert "none within 1B tokens of it (tolerance=0.25)" in said
    assert "iteration 16000 (16B tokens) before it and iteration 24000 (24B tokens) after" in said
    assert f"between them iteration 20000 (20B tokens) is incomplete ({WRITING})" in said
    assert "complete checkpoints lie 4B tokens apart" in said
    assert "what works: last=5, or naming the checkpoints with iterations=" in said


@pytest.mark.parametrize(
    ("iterations", "request_of", "ways"),
    [
        (range(8, 800, 8), {"last": 10, "interval_tokens": 5}, ["interval_tokens=8_000_000"]),
        ((600, 1600, 2600, 4000), {"last": 4, "interval_tokens": 1000}, ["tolerance=0.4"]),
        ((500, 1500, 2500, 4000), {"last": 4, "interval_tokens": 1000}, []),
        ((1, 2, 3, 5, 6, 7), {"last": 5, "interval_iterations": 1}, ["last=3"]),
        (
            range(3, 90, 3),
            {"last": 4, "interval_tokens": 7, "tolerance": 0.1},
            ["tolerance=0.15", "interval_tokens=6_000_000", "interval_tokens=3_000_000"],
        ),
        (
            range(4194, 90_000, 4194),
            {"window_tokens": 70_000, "interval_tokens": 7000, "tolerance": 0.1},
            ["tolerance=0.22", "interval_tokens=8_388_000_000", "interval_tokens=4_194_000_000"],
        ),
    ],
)
def test_every_way_out_of_a_hole_really_works(iterations, request_of: dict, ways: list) -> None:
    refs = [ref(i) for i in iterations]
    request_of |= {key: n * 10**6 for key, n in request_of.items() if key.endswith("_tokens")}
    said = refusal(refs, **request_of).split("what works: ")[1]
    offered = re.findall(r"[a-z_]+=[0-9._]+", said)
    assert offered == ways
    for way in offered:
        assert len(chosen(refs, **request_of | eval(f"dict({way})"))) > 1


def test_a_hole_before_the_first_checkpoint_and_one_that_exclude_made() -> None:
    refs = every(1000, 5000)
    said = refusal(refs, last=8, interval_iterations=1000)
    assert "near iteration 0" in said and "none before it" in said
    assert "last=5" in said
    said = refusal(refs, last=4, interval_tokens=B, exclude=(3000,))
    assert "between them exclude= leaves out 3000" in said


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_selected_keeps_the_promises(data) -> None:
    iterations = data.draw(st.lists(st.integers(1, 400), min_size=1, max_size=40, unique=True))
    broken = data.draw(st.sets(st.sampled_from(iterations)))
    refs = [ref(i, incomplete=WRITING if i in broken else None) for i in iterations]
    axis = data.draw(st.sampled_from(["interval_tokens", "interval_iterations"]))
    step = data.draw(st.integers(1, 40))
    request = SelectionRequest(
        last=data.draw(st.integers(1, 8)),
        tolerance=data.draw(st.floats(0, 0.499)),
        **{axis: step * 10**6 if axis == "interval_tokens" else step},
        allow_gaps=True,
    )

    def outcome(some):
        try:
            return select(some, request)
        except SelectionError as error:
            return str(error)

    result = outcome(refs)
    assert outcome(data.draw(st.permutations(refs))) == result

    complete = [i for i in iterations if i not in broken]
    places = [max(complete) - k * step for k in range(request.last)] if complete else [None]
    fits = complete and all(
        any(abs(i - place) / step <= request.tolerance for i in complete) for place in places
    )
    assert bool(fits) is not isinstance(result, str)
    if fits:
        found = [r.iteration for r in result.refs]
        assert found == sorted(set(found)) and not broken.intersection(found)
        for i, place in zip(reversed(found), places, strict=True):
            assert abs(i - place) == min(abs(other - place) for other in complete)


def test_window_is_open_at_its_far_end() -> None:
    refs = every(1000, 10_000)
    assert chosen(refs, window_tokens=2 * B) == [9000, 10_000]
    assert chosen(refs, window_tokens=2 * B, interval_tokens=B) == [9000, 10_000]
    assert chosen(refs, window_tokens=4 * B) == [7000, 8000, 9000, 10_000]
    assert chosen(refs, window_tokens=4 * B, end_iteration=6000) == [3000, 4000, 5000, 6000]


def test_window_with_interval_holds_window_over_interval() -> None:
    refs = every(1000, 200_000)  # Nemotron 3 Super's 125B window of checkpoints 25B apart
    expected = [100_000, 125_000, 150_000, 175_000, 200_000]
    assert chosen(refs, window_tokens=125 * B, interval_tokens=25 * B) == expected
    said = refusal(refs[:60], window_tokens=125 * B, interval_tokens=25 * B)
    assert "window_tokens=75_000_000_000" in said and "last=" not in said


def test_a_window_with_one_checkpoint_is_refused() -> None:
    said = refusal(every(4000, 12_000), window_tokens=4 * B)
    assert "window_tokens=4_000_000_000 holds only iteration 12000 (12B tokens)" in said
    assert "the next older one is iteration 8000 (8B tokens)" in said


@pytest.mark.parametrize(
    "request_of", [{"last": 3, "interval_tokens": B}, {"window_tokens": 3 * B}]
)
def test_selection_by_tokens_refuses_counts_that_do_not_measure_progress(request_of) -> None:
    flag = "interval_tokens=" if "last" in request_of else "window_tokens="
    said = refusal([*every(1000, 4000), untold(5000)], **request_of)
    assert f"{flag} needs token counts" in said
    assert (
        "iteration 5000 are unknown because its saved training arguments have no seq_length" in said
    )
    assert "interval_iterations=" in said
    assert "iteration 4000 are unknown" in refusal(
        [*every(1000, 3000), untold(4000), ref(5000)], **request_of
    )
    assert "do not grow" in refusal([ref(4000), ref(5000, 4 * B)], **request_of)
    reset = [untold(500), ref(2000, 9 * B), *(ref(i) for i in (3000, 4000, 5000))]
    said = refusal(reset, **{"end_iteration": 4000, **request_of})
    assert "do not grow from iteration 2000 (9B tokens) to iteration 3000 (3B tokens)" in said
    longer = [ref(i, 2 * i * 10**6, consumed_samples=i * 10**6 // SEQ) for i in (4000, 5000)]
    said = refusal([*every(1000, 3000), *longer], last=3, interval_tokens=3 * B)
    assert "seq_length changed from iteration 3000" in said
    assert "about 4096 then 8192" in said


def test_older_counts_than_are_looked_at_do_not_matter() -> None:
    refs = [untold(500), ref(1000, 99 * B), *(ref(i) for i in range(2000, 9000, 1000))]
    assert chosen(refs, last=3, interval_tokens=2 * B) == [4000, 6000, 8000]
    assert chosen(refs, window_tokens=6 * B) == [3000, 4000, 5000, 6000, 7000, 8000]
    # The last place reaches down to 3.5B, and 4000 might have been nearer to it than 4400.
    refs = [ref(3000), untold(4000), *(ref(i) for i in (4400, 6000, 8000))]
    assert "iteration 4000 are unknown" in refusal(refs, last=3, interval_tokens=2 * B)


def test_skipped_batches_do_not_look_like_a_new_sequence_length() -> None:
    refs = [ref(1000), ref(2000, int(1.9 * B), consumed_samples=2 * B // SEQ), ref(3000, 3 * B)]
    assert len(chosen(refs, last=3, interval_tokens=B)) == 3
    assert chosen([ref(1, consumed_samples=None), ref(2)], window_tokens=B) == [1, 2]
