"""Selection, token counts and the size guide: what is chosen, and what each refusal tells."""

from __future__ import annotations

import dataclasses
import random
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.gaps import lines
from pma_megatron.refs import CheckpointRef
from pma_megatron.selection import SelectionRequest, select
from pma_megatron.tokens import consumed_tokens_of, format_tokens, parse_tokens, recommend

B = 10**9
SEQ = 4096
WRITING = "metadata.json is missing"


def ref(iteration, tokens=None, *, incomplete=None, **changes) -> CheckpointRef:
    """A checkpoint; tokens default to 1B per 1000 iterations, incomplete gives the reason."""
    tokens = iteration * 10**6 if tokens is None and iteration is not None else tokens
    fields = {
        "path": f"/run/iter_{iteration:07d}" if iteration is not None else "/run/release",
        "format": "torch_dist",
        "iteration": iteration,
        "consumed_samples": None if tokens is None else tokens // SEQ,
        "consumed_tokens": tokens,
        "tokens_unknown_because": None,
        "complete": incomplete is None,
        "incomplete_because": incomplete,
    }
    return CheckpointRef(**(fields | changes))


def untold(iteration, **changes) -> CheckpointRef:
    """A checkpoint without Megatron arguments."""
    because = "its saved training arguments have no seq_length"
    unknown = {"consumed_tokens": None, "consumed_samples": None, "tokens_unknown_because": because}
    return dataclasses.replace(ref(iteration), **unknown, **changes)


def every(step: int, stop: int, **changes) -> list[CheckpointRef]:
    return [ref(i, **changes) for i in range(step, stop + 1, step)]


def chosen(refs, **request) -> list[int | None]:
    return [r.iteration for r in select(refs, SelectionRequest(**request)).refs]


def refusal(refs, **request) -> str:
    with pytest.raises(SelectionError) as caught:
        select(refs, SelectionRequest(**request))
    return str(caught.value)


def test_last_n_end_at_the_newest_complete_one() -> None:
    refs = [*every(1000, 5000), ref(6000, incomplete=WRITING, writing=True), ref(None)]
    selection = select(refs, SelectionRequest(last=3))
    assert [r.iteration for r in selection.refs] == [3000, 4000, 5000]
    assert selection.positions == (3 * B, 4 * B, 5 * B)
    assert selection.position_unit == "tokens"
    assert selection.spacing.gaps == (B, B)
    assert selection.spacing.requested is selection.spacing.tolerance is None
    unfinished, unnumbered = selection.passed_over
    assert (unnumbered.path, unnumbered.kind) == ("/run/release", "no iteration")
    assert "--paths" in unnumbered.reason
    assert (unfinished.iteration, unfinished.kind) == (6000, "being written")
    assert WRITING in unfinished.reason and not unfinished.gap
    said, _ = lines(selection.passed_over, selection.refs[-1])
    assert "/run/iter_0006000" in said and "ends at iteration 5000" in said


def test_end_iteration_and_exclude() -> None:
    refs = every(1000, 9000)
    assert chosen(refs, last=3, end_iteration=7000) == [5000, 6000, 7000]
    assert chosen(refs, last=3, end_iteration=7000, exclude=(6000,)) == [4000, 5000, 7000]
    selection = select(refs, SelectionRequest(last=2, exclude=(8000,)))
    assert [(each.iteration, each.kind) for each in selection.passed_over] == [(8000, "excluded")]
    assert "the checkpoints are unevenly spaced" not in " ".join(selection.notes)
    uneven = select(refs, SelectionRequest(last=3, exclude=(8000,))).notes
    assert "the checkpoints are unevenly spaced, from 1B tokens to 2B tokens apart" in uneven
    said = refusal(refs, last=1, exclude=(2500,))
    assert "--exclude names iteration 2500, which does not exist" in said
    assert "iteration 2000 (2B tokens) and iteration 3000" in said


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
    assert f"/run/iter_000{at}" in said and f"--exclude {at}" in said and "--allow-gaps" in said
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
        one = [untold(damaged, complete=False, incomplete_because=CUT) if r.iteration == damaged
               else r for r in refs]  # fmt: skip
        axis = {"interval_tokens": 2 * B} if tokens else {"interval_iterations": 2000}
        selection = select(one, SelectionRequest(last=3, **axis))
        assert [r.iteration for r in selection.refs] == [5000, 7000, 9000]
        kinds = {each.iteration: each.kind for each in selection.passed_over}
        assert kinds[6500] == "damaged" and kinds[6000] == "not needed"
        one = [untold(7000, complete=False, incomplete_because=CUT) if r.iteration == 7000
               else r for r in refs]  # fmt: skip
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
        5000, 6000,
    ]  # fmt: skip
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
    axis = data.draw(st.sampled_from([{}, {"interval_tokens": 2 * B}, {"window_tokens": 3 * B},
                                      {"interval_iterations": 2000}]))  # fmt: skip
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


def test_too_few_says_how_many_and_why_the_others_do_not_count() -> None:
    refs = [*every(1000, 4000), ref(5000, incomplete=WRITING)]
    said = refusal(refs, last=6)
    assert "--last 6 needs 6 complete checkpoints up to iteration 4000 (4B tokens), found 4" in said
    assert f"iteration 5000 (5B tokens) is incomplete ({WRITING})" in said
    assert "use --last 4" in said and "wait" in said
    assert "a later --end-iteration" in refusal(refs, last=4, end_iteration=3000)
    assert "--last 10 needs 10" in refusal(every(1000, 9000))
    assert len(chosen(every(1000, 30_000))) == 10
    assert "no complete checkpoint to merge: nothing was found" in refusal([])
    said = refusal(every(1000, 6000, incomplete=WRITING))
    assert f"iteration 6000 (6B tokens) is incomplete ({WRITING}), and 2 older ones" in said
    assert "older ones" not in refusal(every(1000, 4000, incomplete=WRITING))


@pytest.mark.parametrize("flag", ["end_iteration", "iterations"])
def test_a_named_iteration_must_exist_and_be_complete(flag: str) -> None:
    refs = [*every(1000, 3000), ref(4000, incomplete=WRITING), ref(5000)]

    def named(iteration: int) -> dict:
        return {flag: iteration if flag == "end_iteration" else (1000, iteration)}

    said = refusal(refs, **named(3500))
    assert "--" + flag.replace("_", "-") + " names iteration 3500, which does not exist" in said
    assert "nearest: iteration 3000 (3B tokens) and iteration 5000 (5B tokens)" in said
    assert f"iteration 4000, which is incomplete ({WRITING})" in refusal(refs, **named(4000))


def test_duplicate_iterations_are_refused_with_both_paths_unless_excluded() -> None:
    refs = [*every(1000, 5000), ref(4000, path="/run/non_persistent/iter_0004000")]
    for request in ({"last": 2}, {"iterations": (1000, 4000)}, {"interval_tokens": B}):
        said = refusal(refs, **request)
        assert said == refusal(refs[::-1], **request)
        assert "iteration 4000 exists twice" in said
        assert "/run/iter_0004000" in said and "/run/non_persistent/iter_0004000" in said
    assert chosen(refs, last=2, exclude=(4000,)) == [3000, 5000]


def test_named_ones_are_ordered_by_iteration_then_tokens_then_as_given() -> None:
    refs = every(1000, 3000)
    assert chosen(refs, iterations=(3000, 1000, 2000)) == [1000, 2000, 3000]
    paths = ("/run/iter_0003000/", "/run/iter_0001000")
    assert chosen(refs, paths=paths) == [1000, 3000]

    bare = [ref(None, 9 * B, path="/x/late"), ref(None, 5 * B, path="/x/early")]
    by_tokens = select(bare, SelectionRequest(paths=("/x/late", "/x/early")))
    assert [r.path for r in by_tokens.refs] == ["/x/early", "/x/late"]
    assert by_tokens.positions == (5 * B, 9 * B)

    unordered = [untold(None, path="/x/b"), untold(None, path="/x/a")]
    as_given = select(unordered, SelectionRequest(paths=("/x/b", "/x/a")))
    assert [r.path for r in as_given.refs] == ["/x/b", "/x/a"]
    assert (as_given.positions, as_given.position_unit) == ((), "unknown")
    assert as_given.spacing.gaps == ()
    assert any("the order given was kept" in note for note in as_given.notes)


def test_paths_must_exist_be_complete_and_differ_in_iteration() -> None:
    refs = [ref(1000), ref(2000, incomplete=WRITING), ref(1000, path="/other/iter_0001000")]
    assert "names /run/nope, which is not a checkpoint" in refusal(refs, paths=("/run/nope",))
    assert f"incomplete: {WRITING}" in refusal(refs, paths=("/run/iter_0002000",))
    said = refusal(refs, paths=("/run/iter_0001000", "/other/iter_0001000"))
    assert "iteration 1000 exists twice" in said and "/other/iter_0001000" in said


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
        assert "--tolerance 0.29" in refusal(refs, **request, tolerance=tolerance)


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
    assert "--interval-tokens 4B for 6 checkpoints needs a complete one near 20B tokens" in said
    assert "5 x that before iteration 40000 (40B tokens)" in said
    assert "none within 1B tokens of it (--tolerance 0.25)" in said
    assert "iteration 16000 (16B tokens) before it and iteration 24000 (24B tokens) after" in said
    assert f"between them iteration 20000 (20B tokens) is incomplete ({WRITING})" in said
    assert "complete checkpoints lie 4B tokens apart" in said
    assert "what works: --last 5, or naming the checkpoints with --iterations" in said


@pytest.mark.parametrize(
    ("iterations", "request_of", "ways"),
    [
        (range(8, 800, 8), {"last": 10, "interval_tokens": 5}, ["interval_tokens 8M"]),
        ((600, 1600, 2600, 4000), {"last": 4, "interval_tokens": 1000}, ["tolerance 0.4"]),
        ((500, 1500, 2500, 4000), {"last": 4, "interval_tokens": 1000}, []),
        ((1, 2, 3, 5, 6, 7), {"last": 5, "interval_iterations": 1}, ["last 3"]),
        (
            range(3, 90, 3),
            {"last": 4, "interval_tokens": 7, "tolerance": 0.1},
            ["tolerance 0.15", "interval_tokens 6M", "interval_tokens 3M"],
        ),
        (
            range(4194, 90_000, 4194),
            {"window_tokens": 70_000, "interval_tokens": 7000, "tolerance": 0.1},
            ["tolerance 0.22", "interval_tokens 8388000000", "interval_tokens 4194000000"],
        ),
    ],
)
def test_every_way_out_of_a_hole_really_works(iterations, request_of: dict, ways: list) -> None:
    refs = [ref(i) for i in iterations]
    request_of |= {key: n * 10**6 for key, n in request_of.items() if key.endswith("_tokens")}
    said = refusal(refs, **request_of).split("what works: ")[1]
    offered = [text.replace("-", "_") for text in re.findall(r"--([a-z-]+ [0-9.]+[A-Z]?)", said)]
    assert offered == ways
    for flag, text in map(str.split, offered):
        value = float(text) if flag == "tolerance" else parse_tokens(text)
        assert len(chosen(refs, **request_of | {flag: value})) > 1


def test_a_hole_before_the_first_checkpoint_and_one_that_exclude_made() -> None:
    refs = every(1000, 5000)
    said = refusal(refs, last=8, interval_iterations=1000)
    assert "near iteration 0" in said and "none before it" in said
    assert "--last 5" in said
    said = refusal(refs, last=4, interval_tokens=B, exclude=(3000,))
    assert "between them --exclude leaves out 3000" in said


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


@pytest.mark.parametrize(
    "request_of", [{"last": 4}, {"iterations": (3000, 5000)}, {"window_tokens": 4 * B}]
)
def test_input_order_does_not_matter(request_of: dict) -> None:
    refs = [*every(1000, 9000), ref(9500, incomplete=WRITING, writing=True), ref(None)]
    expected = select(refs, SelectionRequest(**request_of))
    for seed in range(10):
        shuffled = random.Random(seed).sample(refs, len(refs))
        assert select(shuffled, SelectionRequest(**request_of)) == expected


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
    assert "--window-tokens 75B" in said and "--last" not in said


def test_a_window_with_one_checkpoint_is_refused() -> None:
    said = refusal(every(4000, 12_000), window_tokens=4 * B)
    assert "--window-tokens 4B holds only iteration 12000 (12B tokens)" in said
    assert "the next older one is iteration 8000 (8B tokens)" in said


@pytest.mark.parametrize(
    "request_of",
    [{"last": 3, "interval_tokens": B}, {"window_tokens": 3 * B}],
)
def test_selection_by_tokens_refuses_counts_that_do_not_measure_progress(request_of) -> None:
    flag = "--interval-tokens" if "last" in request_of else "--window-tokens"
    said = refusal([*every(1000, 4000), untold(5000)], **request_of)
    assert f"{flag} needs token counts" in said
    assert (
        "iteration 5000 are unknown because its saved training arguments have no seq_length" in said
    )
    assert "--interval-iterations" in said
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


def test_last_n_falls_back_to_iterations_and_says_so() -> None:
    selection = select([ref(1000), untold(2000), ref(3000)], SelectionRequest(last=3))
    assert (selection.position_unit, selection.positions) == ("iterations", (1000, 2000, 3000))
    assert any("iteration 2000 are unknown" in note for note in selection.notes)


def test_skipped_batches_do_not_look_like_a_new_sequence_length() -> None:
    refs = [ref(1000), ref(2000, int(1.9 * B), consumed_samples=2 * B // SEQ), ref(3000, 3 * B)]
    assert len(chosen(refs, last=3, interval_tokens=B)) == 3
    assert chosen([ref(1, consumed_samples=None), ref(2)], window_tokens=B) == [1, 2]


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        ({"last": 0}, r"--last must be at least 1, got 0"),
        ({"window_tokens": 0}, r"--window-tokens must be at least 1"),
        ({"tolerance": 0.5}, r"--tolerance is a fraction .*\[0, 0.5\), got 0.5"),
        ({"tolerance": float("nan")}, r"got nan"),
        ({"interval_tokens": 1, "interval_iterations": 1}, r"cannot be combined: an average has"),
        ({"window_tokens": 9, "interval_iterations": 1}, r"use --interval-tokens or --last"),
        ({"window_tokens": 9, "last": 3}, r"--window-tokens and --last cannot be combined"),
        ({"window_tokens": 15 * B, "interval_tokens": 8 * B}, r"15B holds fewer than two .* 8B"),
        ({"end_iteration": 5, "exclude": (5,)}, r"--end-iteration 5 is also in --exclude"),
        ({"iterations": (1, 2), "last": 2}, r"--iterations names the checkpoints, so --last would"),
        ({"iterations": (1,), "paths": ("a",)}, r"--iterations names .* so --paths would"),
        ({"paths": ("a",), "end_iteration": 0}, r"--paths names .* so --end-iteration would"),
        ({"iterations": (1, 2), "exclude": (2,)}, r"so --exclude would have no effect"),
        ({"iterations": (3, 1, 3)}, r"--iterations names 3 twice"),
        ({"iterations": ()}, r"--iterations is empty"),
        ({"paths": ("/a/b", "/a/b/")}, r"--paths names /a/b twice"),
    ],
)
def test_contradictory_requests_are_refused(request_of: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SelectionRequest(**request_of)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *[("8B", 8 * B), ("500M", 500_000_000), ("1.5T", 1500 * B), ("250K", 250_000)],
        *[("8_000_000_000", 8 * B), (" 4.194304 b ", 4_194_304_000), ("0.1B", 100_000_000)],
        *[("42", 42), (42, 42), ("1.0", 1), ("0", 0), (0, 0)],
    ],
)
def test_parse_tokens(text, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text",
    [
        *["", "B", "_1", "-8B", "8X", "8BB", "8e9", "nan", "inf", "1__0", "0x10", "٨B", "1.B"],
        *["1,000", "8 9", -1, True, None, 8.0],
    ],
)
def test_parse_tokens_refuses_garbage(text) -> None:
    with pytest.raises(UsageError, match=r"is not a token count: .* as in 8B, 500M"):
        parse_tokens(text)
    with pytest.raises(UsageError, match=r"'1.5' is 1.5 tokens, not a whole number"):
        parse_tokens("1.5")


@pytest.mark.parametrize(
    ("tokens", "text"),
    zip(
        [8_388_608_000, 8 * B, 1_408_300_000_000, 0, 999, 1000, 999_999, -2 * B, 10**16],
        ["8.39B", "8B", "1.4083T", "0", "999", "1K", "1M", "-2B", "10000T"],
        strict=True,
    ),
)
def test_format_tokens(tokens: int, text: str) -> None:
    assert format_tokens(tokens) == text


@given(st.integers(0, 10**15))
def test_formatting_loses_no_more_than_it_shows(tokens: int) -> None:
    assert abs(parse_tokens(format_tokens(tokens)) - tokens) <= 0.005 * tokens


# --- Megatron's saved arguments -----------------------------------------------------------------

SKIPPED = {"skipped_train_samples": 9, "iterations_to_skip": [7]}
BOTH_WAYS = SKIPPED | {"decrease_batch_size_if_needed": True}
ARGS = {"consumed_train_samples": 1000, "seq_length": 4096, "skipped_train_samples": 0}


@pytest.mark.parametrize(
    ("changes", "tokens"),
    [
        ({}, 4_096_000),
        ({"rampup_batch_size": ["16", "16", "100"]}, 4_096_000),
        ({"skipped_train_samples": None}, 4_096_000),
        # --iterations-to-skip counts a batch as consumed and as skipped.
        (SKIPPED, 991 * 4096),
        ({"skipped_train_samples": 100}, 900 * 4096),
        # --decrease-batch-size-if-needed counts as skipped what it never consumed.
        ({"skipped_train_samples": 100, "decrease_batch_size_if_needed": True}, 4_096_000),
    ],
)
def test_tokens_are_the_samples_trained_on_times_their_length(changes: dict, tokens: int) -> None:
    assert consumed_tokens_of(ARGS | changes) == (tokens, None)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"consumed_train_samples": None}, "have no consumed_train_samples"),
        ({"seq_length": None}, "have no seq_length"),
        ({"consumed_train_samples": 0}, "say consumed_train_samples = 0, not a positive integer"),
        ({"seq_length": -1}, "say seq_length = -1"),
        ({"seq_length": "4096"}, "say seq_length = '4096'"),
        ({"skipped_train_samples": -3}, "say skipped_train_samples = -3"),
        ({"skipped_train_samples": 1000}, "nothing was trained on"),
        (BOTH_WAYS, "mixes --iterations-to-skip"),
    ],
)
def test_arguments_that_give_no_count_say_why(changes: dict, reason: str) -> None:
    tokens, because = consumed_tokens_of(ARGS | changes)
    assert tokens is None and because is not None and reason in because


@pytest.mark.parametrize(
    ("active", "total", "kind", "interval", "last"),
    [
        *[(None, 411_000_000, "dense", 2 * B, 6), (None, 2 * B, "dense", 5 * B, 6)],
        *[(8 * B, 8 * B, "dense", 15 * B, 10), (None, 70 * B, "dense", 40 * B, 10)],
        *[(700_000_000, 7 * B, "moe", 4 * B, 10), (1_300_000_000, 13 * B, "moe", 8 * B, 10)],
        *[(10 * B, 100 * B, "moe", 80 * B, 10), (None, 100 * B, "moe", 80 * B, 10)],
        # Halfway in log size is halfway in log interval: sqrt(2*8)=4 -> sqrt(5*15)=8.66.
        (None, 4 * B, "dense", 8_700_000_000, 8),
    ],
)
def test_the_guide_goes_through_the_papers_table(active, total, kind, interval, last) -> None:
    advice = recommend(active, total, kind)
    assert (advice.interval_tokens, advice.last) == (interval, last)
    assert advice.basis.startswith("a guide, interpolated from arXiv 2505.12082")
    assert "outside" not in advice.basis


def test_the_guide_stops_at_the_ends_of_the_table_and_says_so() -> None:
    huge, tiny = recommend(None, 1000 * B, "dense"), recommend(10**6, 10**7, "moe")
    assert (huge.interval_tokens, tiny.interval_tokens) == (40 * B, 4 * B)
    assert "dense, 411M to 70B" in huge.basis and "so taken at 70B" in huge.basis


@given(st.lists(st.integers(10**6, 10**12), min_size=2, max_size=2))
def test_larger_models_never_get_a_shorter_interval(sizes) -> None:
    small, large = (recommend(None, size, "dense") for size in sorted(sizes))
    assert small.interval_tokens <= large.interval_tokens and small.last <= large.last


def test_the_guide_refuses_sizes_that_cannot_be() -> None:
    with pytest.raises(UsageError, match=r"unknown model kind 'hybrid': choose one of dense, moe"):
        recommend(None, B, "hybrid")
    with pytest.raises(UsageError, match=r"must be positive"):
        recommend(None, 0, "dense")
    with pytest.raises(UsageError, match=r"2B active parameters are more than the total, 1B"):
        recommend(2 * B, B, "moe")
