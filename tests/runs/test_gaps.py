"""What a window passes over: refused until a person says otherwise, and always named."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint_refs import WRITING, B, chosen, every, ref, refusal, untold
from pma_megatron.errors import SelectionError
from pma_megatron.runs.gaps import lines
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest

CUT, SPOILED = "__0_0.distcp is cut short", "saved in a spike"
BAD = {
    "damaged": {"incomplete": CUT},
    "spoiled": {"unhealthy_because": SPOILED},
    "not judged": {"unhealthy_because": "saved after a recovery", "judged": False},
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("at", [4000, 6000])
def test_one_in_the_window_that_cannot_be_used_is_refused_until_a_person_says(
    kind: str, at: int
) -> None:
    refs = [ref(i, **(BAD[kind] if i == at else {})) for i in range(1000, 6001, 1000)]
    said = refusal(refs, last=4)
    assert f"/run/iter_000{at}" in said and f"exclude=({at},)" in said and "allow_gaps=True" in said
    assert chosen(refs, last=4, exclude=(at,)) == [i for i in range(2000, 6001, 1000) if i != at]
    selection = select(refs, SelectionRequest(last=4, allow_gaps=True))
    assert [r.iteration for r in selection.refs] == [i for i in range(2000, 6001, 1000) if i != at]
    assert [(each.iteration, each.kind) for each in selection.passed_over] == [(at, kind)]
    # Outside of the window it is nobody's business.
    assert select(refs, SelectionRequest(last=3, end_iteration=3000)).passed_over == ()
    assert chosen(refs, iterations=(3000, 5000)) == [3000, 5000]


def test_a_token_window_counts_what_is_damaged_at_its_far_end() -> None:
    refs = [ref(i) for i in range(1000, 9000, 1000)]
    refs[4] = untold(5000, complete=False, incomplete_because=CUT)
    assert chosen(refs, window_tokens=3 * B) == [6000, 7000, 8000]
    assert "iter_0005000" in refusal(refs, window_tokens=4 * B)


def test_a_place_of_a_spacing_is_a_gap_and_what_lies_between_places_is_none() -> None:
    refs = [ref(i) for i in range(1000, 9001, 500)]
    for damaged, tokens in ((6500, True), (6500, False)):
        one = [
            untold(damaged, complete=False, incomplete_because=CUT) if r.iteration == damaged else r
            for r in refs
        ]
        axis = {"interval_tokens": 2 * B} if tokens else {"interval_iterations": 2000}
        selection = select(one, SelectionRequest(last=3, **axis))
        assert [r.iteration for r in selection.refs] == [5000, 7000, 9000]
        kinds = {each.iteration: each.kind for each in selection.passed_over}
        assert kinds[6500] == "damaged" and kinds[6000] == "not needed"
        one = [
            untold(7000, complete=False, incomplete_because=CUT) if r.iteration == 7000 else r
            for r in refs
        ]
        assert "iter_0007000" in refusal(one, last=3, tolerance=0.3, **axis)
        newest = [*refs, untold(9500, complete=False, incomplete_because=CUT)]
        assert "iter_0009500" in refusal(newest, last=3, **axis)


def test_an_average_ends_at_what_training_resumes_from() -> None:
    """A tracker that was set back: what is newer belongs to a branch that was given up."""
    refs = [*every(1000, 8000), ref(9000, incomplete=CUT)]
    selection = select(refs, SelectionRequest(last=3), 6000)
    assert [r.iteration for r in selection.refs] == [4000, 5000, 6000]
    assert {(e.iteration, e.kind) for e in selection.passed_over} == {
        (i, "newer") for i in (7000, 8000, 9000)
    }
    (said,) = lines(selection.passed_over, selection.refs[-1])
    assert "iterations 7000, 8000, 9000" in said and "iteration 6000" in said
    only_damaged = [*every(1000, 6000), ref(7000, incomplete=CUT)]
    assert [r.iteration for r in select(only_damaged, SelectionRequest(last=2), 6000).refs] == [
        5000,
        6000,
    ]
    assert "iter_0007000" in refusal(only_damaged, last=2)  # nothing says where training resumes
    named = select(refs, SelectionRequest(last=3, end_iteration=8000), 6000)
    assert [r.iteration for r in named.refs] == [6000, 7000, 8000] and named.passed_over == ()
    thin = [*every(1000, 6000), ref(6500, snapshot=True)]  # trackers do not name snapshots
    assert [r.iteration for r in select(thin, SelectionRequest(last=2), 6000).refs] == [6000, 6500]


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_nothing_in_a_window_goes_unnamed(data) -> None:
    """Whatever is bad, wherever it lies: refused, or every one that is not used is named."""
    states = data.draw(st.lists(st.sampled_from(["good", *BAD]), min_size=2, max_size=12))
    refs = [ref(1000 * (i + 1), **BAD.get(state, {})) for i, state in enumerate(states)]
    if data.draw(st.booleans()):
        refs.append(ref(1000 * (len(states) + 1), incomplete=WRITING, writing=True))
    axis = data.draw(
        st.sampled_from(
            [
                {},
                {"interval_tokens": 2 * B},
                {"window_tokens": 3 * B},
                {"interval_iterations": 2000},
            ]
        )
    )
    last = {} if "window_tokens" in axis else {"last": data.draw(st.integers(1, 4))}
    allow = data.draw(st.booleans())
    resumed = data.draw(st.none() | st.sampled_from([r.iteration for r in refs]))
    try:
        selection = select(refs, SelectionRequest(**axis, **last, allow_gaps=allow), resumed)
    except SelectionError as error:
        assert "iter_000" in str(error) or "iteration " in str(error)
        return
    used = [r.iteration for r in selection.refs]
    named = {each.iteration: each for each in selection.passed_over}
    assert set(named) >= {r.iteration for r in refs if r.iteration > used[0]} - set(used)
    assert not set(named) & set(used)
    told = " ".join(lines(selection.passed_over, selection.refs[-1]))
    assert all(str(iteration) in told for iteration in named)
    assert all(r.state == "complete" for r in selection.refs)
    if not allow:
        asks = axis or {"last": None}
        bad = [e for e in named.values() if e.kind in BAD]
        assert not any(e.gap for e in bad)
        assert not bad or "interval_tokens" in asks or "interval_iterations" in asks
