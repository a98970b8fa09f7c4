"""Selection: the last N, an end, exclusions, sources by name, and what each refusal tells."""

from __future__ import annotations

import random
import re

import pytest

from checkpoint_refs import WRITING, B, chosen, every, ref, refusal, untold
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.runs.discover import choose
from pma_megatron.runs.gaps import lines
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest


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
    assert "paths=" in unnumbered.reason
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
    assert "exclude= names iteration 2500, which does not exist" in said
    assert "iteration 2000 (2B tokens) and iteration 3000" in said


CUT, SPOILED = "__0_0.distcp is cut short", "saved in a spike"


def test_too_few_says_how_many_and_why_the_others_do_not_count() -> None:
    refs = [*every(1000, 4000), ref(5000, incomplete=WRITING)]
    said = refusal(refs, last=6)
    assert "last=6 needs 6 complete checkpoints up to iteration 4000 (4B tokens), found 4" in said
    assert f"iteration 5000 (5B tokens) is incomplete ({WRITING})" in said
    assert "use last=4" in said and "wait" in said
    assert "a later end_iteration=" in refusal(refs, last=4, end_iteration=3000)
    assert "last=10 needs 10" in refusal(every(1000, 9000))
    assert len(chosen(every(1000, 30_000))) == 10
    assert "no complete checkpoint: nothing was found" in refusal([])
    said = refusal(every(1000, 6000, incomplete=WRITING))
    assert f"iteration 6000 (6B tokens) is incomplete ({WRITING}), and 2 older ones" in said
    assert "older ones" not in refusal(every(1000, 4000, incomplete=WRITING))


@pytest.mark.parametrize(
    "asked", [{"last": 4}, {"interval_iterations": 1000, "last": 4}, {"window_tokens": B}]
)
def test_what_is_newer_than_a_resume_is_told_where_the_others_are_too_few(asked: dict) -> None:
    refs = [*every(1000, 5000), ref(6000, incomplete=CUT)]
    with pytest.raises(SelectionError) as caught:
        select(refs, SelectionRequest(**asked), resumed=3000)
    said = str(caught.value)
    assert "iterations 4000 to 5000 are newer than iteration 3000" in said
    (way,) = re.findall(r"end_iteration=(\d+)", said)
    assert "wait until more" not in said
    if "window_tokens" not in asked:
        end = SelectionRequest(**asked, end_iteration=int(way))
        assert len(select(refs, end, resumed=3000).refs) == 4
    with pytest.raises(SelectionError, match="newer than iteration 500,"):
        select(refs, SelectionRequest(**asked), resumed=500)


def resumed_at_3000(refs: list[CheckpointRef]) -> str:
    """Why there are no four to average up to there."""
    with pytest.raises(SelectionError) as caught:
        select(refs, SelectionRequest(last=4), resumed=3000)
    return str(caught.value)


def test_the_end_that_is_advised_can_be_resumed_from() -> None:
    """Snapshots beyond what training resumes from are in reach of no average that is resumed."""
    refs = [*every(1000, 5000), ref(6000, snapshot=True)]
    said = resumed_at_3000(refs)
    assert "iterations 4000 to 6000 are newer than iteration 3000" in said
    assert "end_iteration=5000 takes those up to it" in said and "wait" not in said
    refs = [*every(1000, 3000), ref(4000, snapshot=True), ref(5000, incomplete=CUT)]
    said = resumed_at_3000(refs)
    assert "iteration 4000 is newer than iteration 3000" in said
    assert "end_iteration" not in said and "wait until the run has saved others" in said


@pytest.mark.parametrize("flag", ["end_iteration", "iterations"])
def test_a_named_iteration_must_exist_and_be_complete(flag: str) -> None:
    refs = [*every(1000, 3000), ref(4000, incomplete=WRITING), ref(5000)]

    def named(iteration: int) -> dict:
        return {flag: iteration if flag == "end_iteration" else (1000, iteration)}

    said = refusal(refs, **named(3500))
    assert f"{flag}= names iteration 3500, which does not exist" in said
    assert "nearest: iteration 3000 (3B tokens) and iteration 5000 (5B tokens)" in said
    assert f"iteration 4000, which is incomplete ({WRITING})" in refusal(refs, **named(4000))


def test_duplicate_iterations_are_refused_with_both_paths_where_they_are_needed() -> None:
    refs = [*every(1000, 5000), ref(4000, path="/run/non_persistent/iter_0004000")]
    for request in ({"last": 2}, {"iterations": (1000, 4000)}, {"interval_tokens": B, "last": 3}):
        said = refusal(refs, **request)
        assert said.endswith("name the checkpoints to merge with paths=")
        assert said == refusal(refs[::-1], **request)
        assert "iteration 4000 exists twice" in said
        assert "/run/iter_0004000" in said and "/run/non_persistent/iter_0004000" in said
    assert chosen(refs, last=2, exclude=(4000,)) == [3000, 5000]
    assert chosen(refs, last=1) == [5000]
    assert chosen(refs, interval_tokens=2 * B, last=3) == [1000, 3000, 5000]


def test_a_damaged_twin_of_a_whole_checkpoint_is_named_and_stops_nobody() -> None:
    refs = [*every(1000, 5000), ref(4000, path="/run/iter_4000", incomplete="its name")]
    for order in (refs, refs[::-1]):
        found = select(order, SelectionRequest(last=2))
        assert [r.path for r in found.refs] == ["/run/iter_0004000", "/run/iter_0005000"]
        assert [each.path for each in found.passed_over] == ["/run/iter_4000"]


def test_where_all_were_left_out_it_is_said() -> None:
    said = refusal(every(1000, 2000), exclude=(1000, 2000))
    assert said.endswith("complete checkpoint: exclude=(1000, 2000) leaves all there are out")
    assert refusal([]).endswith("complete checkpoint: nothing was found")


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


def test_tokens_said_of_listed_ones_order_and_place_them() -> None:
    """Whatever the checkpoints say themselves: here stages that each count steps anew."""
    paths, tokens = ("/x/one", "/x/two", "/x/three"), (B, 2 * B, 5 * B)
    refs = [ref(9, 7 * B, path="/x/one"), ref(3, path="/x/two"), untold(None, path="/x/three")]
    found = select(refs, SelectionRequest(paths=paths, tokens=tokens))
    assert [r.path for r in found.refs] == list(paths)
    assert (found.positions, found.position_unit) == (tokens, "tokens")
    assert [r.consumed_tokens for r in found.refs] == list(tokens)
    assert found.spacing.gaps == (B, 3 * B)
    said = " ".join(found.notes)
    assert "tokens= counts where /x/one says 7B, /x/two says" in said
    assert "iterations do not grow with the tokens given (9, 3)" in said
    bare = [untold(None, path=path) for path in paths]
    quiet = select(bare, SelectionRequest(paths=paths, tokens=(B, 2 * B, 3 * B)))
    assert quiet.notes == () and quiet.positions == (B, 2 * B, 3 * B)


def test_paths_must_exist_be_complete_and_differ_in_iteration() -> None:
    refs = [ref(1000), ref(2000, incomplete=WRITING), ref(1000, path="/other/iter_0001000")]
    assert "names /run/nope, which is not a checkpoint" in refusal(refs, paths=("/run/nope",))
    assert f"incomplete: {WRITING}" in refusal(refs, paths=("/run/iter_0002000",))
    said = refusal(refs, paths=("/run/iter_0001000", "/other/iter_0001000"))
    assert "iteration 1000 exists twice" in said and "/other/iter_0001000" in said


@pytest.mark.parametrize(
    "request_of", [{"last": 4}, {"iterations": (3000, 5000)}, {"window_tokens": 4 * B}]
)
def test_input_order_does_not_matter(request_of: dict) -> None:
    refs = [*every(1000, 9000), ref(9500, incomplete=WRITING, writing=True), ref(None)]
    expected = select(refs, SelectionRequest(**request_of))
    for seed in range(10):
        shuffled = random.Random(seed).sample(refs, len(refs))
        assert select(shuffled, SelectionRequest(**request_of)) == expected


def test_last_n_falls_back_to_iterations_and_says_so() -> None:
    selection = select([ref(1000), untold(2000), ref(3000)], SelectionRequest(last=3))
    assert (selection.position_unit, selection.positions) == ("iterations", (1000, 2000, 3000))
    assert any("iteration 2000 are unknown" in note for note in selection.notes)


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        ({"last": 0}, r"last= must be at least 1, got 0"),
        ({"window_tokens": 0}, r"window_tokens= must be at least 1"),
        ({"tolerance": 0.5}, r"tolerance= is a fraction .*\[0, 0.5\), got 0.5"),
        ({"tolerance": float("nan")}, r"got nan"),
        ({"interval_tokens": 1, "interval_iterations": 1}, r"cannot be combined: an average has"),
        ({"window_tokens": 9, "interval_iterations": 1}, r"use interval_tokens= or last="),
        ({"window_tokens": 9, "last": 3}, r"window_tokens= and last= cannot be combined"),
        (
            {"window_tokens": 15 * B, "interval_tokens": 8 * B},
            r"=15_000_000_000 holds fewer than two .* 8B",
        ),
        ({"end_iteration": 5, "exclude": (5,)}, r"end_iteration=5 is also in exclude="),
        ({"iterations": (1, 2), "last": 2}, r"iterations= names the checkpoints, so last= would"),
        ({"iterations": (1,), "paths": ("a",)}, r"iterations= names .* so paths= would"),
        ({"paths": ("a",), "end_iteration": 0}, r"paths= names .* so end_iteration= would"),
        ({"iterations": (1, 2), "exclude": (2,)}, r"so exclude= would have no effect"),
        ({"iterations": (3, 1, 3)}, r"iterations= names 3 twice"),
        ({"iterations": ()}, r"iterations= is empty"),
        ({"paths": ("/a/b", "/a/b/")}, r"paths= names /a/b twice"),
        ({"tokens": (1, 2)}, r"none is listed: name them with paths="),
        ({"tokens": (1, 2), "last": 2}, r"none is listed: name them with paths="),
        ({"paths": ("a", "b"), "tokens": (1,)}, r"1 count\(s\) and paths= 2 checkpoint"),
        ({"paths": ("a", "b"), "tokens": (2, 2)}, r"does not grow from a \(2\) to b \(2\)"),
        ({"paths": ("a", "b"), "tokens": (-1, 2)}, r"not be negative"),
    ],
)
def test_contradictory_requests_are_refused(request_of: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        SelectionRequest(**request_of)


def test_steps_of_several_stages_are_not_one_order():
    names = {8000: "stage1-step8000", 9000: "stage1-step9000", 1000: "stage2-ingredient1-step1000"}
    refs = [ref(n, path=f"/run/{name}", format="safetensors") for n, name in names.items()]
    with pytest.raises(SelectionError, match=r"stage1-step8000, /run/stage2-ingredient1-step1000"):
        choose(refs, SelectionRequest(last=2), "/run")
    named = choose(refs, SelectionRequest(iterations=(8000, 9000)), "/run")
    assert [each.iteration for each in named.refs] == [8000, 9000]
    one = choose(refs[:2], SelectionRequest(last=2), "/run")
    assert one.refs == named.refs
