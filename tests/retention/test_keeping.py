"""What stays possible after a deletion: the oracles are `select` and `choose_healthy`."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from checkpoint_refs import B, every, ref
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.retention.keeping import needed
from pma_megatron.retention.request import PruneRequest, parse_window, window_text
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest
from pma_megatron.spikes.healthy import HealthyRequest, choose_healthy


def pruned(refs: Sequence[CheckpointRef], **rules: object) -> list[CheckpointRef]:
    """What is left of a run; the newest always is."""
    stays = needed(refs, refs[-1], PruneRequest(root="/run", **rules)).reasons
    return [each for each in refs if each.path in stays or each is refs[-1]]


def numbers(refs: Sequence[CheckpointRef]) -> list[int | None]:
    return [each.iteration for each in refs]


def made(refs: Sequence[CheckpointRef], window: SelectionRequest) -> list[int | None] | None:
    try:
        return numbers(select(refs, window).refs)
    except SelectionError:
        return None


@pytest.mark.parametrize(
    "text",
    [
        "last=6,interval-tokens=8B",
        "last=10,interval-tokens=3B,tolerance=0.4",
        "last=4,interval-tokens=4B,tolerance=0",
        "last=5,interval-iterations=5000,tolerance=0.1",
        "window-tokens=30B,interval-tokens=7B",
        "window-tokens=12B",
        "last=7",
    ],
)
def test_every_later_window_stays_possible(text: str) -> None:
    """Runs of any spacing, pruned again and again: each average that the whole run would give has
    one with as many members, and the one of the moment has the very same."""
    window = parse_window(text)
    draw = random.Random(text)
    could = fewer = 0
    for _ in range(8):
        iteration, whole, left = 0, list[CheckpointRef](), list[CheckpointRef]()
        irregular = draw.random() < 0.5
        for _ in range(90):
            iteration += draw.randrange(200, 3000) if irregular else 1000
            whole.append(ref(iteration))
            left.append(ref(iteration))
            wanted, found = made(whole, window), made(left, window)
            if wanted is not None:
                could += 1
                assert found is not None and len(found) == len(wanted), (wanted, numbers(left))
            if draw.random() < 0.3:
                left = pruned(left, keep_window=(window,))
                assert made(left, window) == found
        fewer += len(left) < len(whole) / 2
    assert could > 100 and fewer > 3


def test_a_window_is_kept_by_few() -> None:
    """Ten places 8B apart among checkpoints 0.5B apart: four per interval do, of sixteen."""
    left = pruned(every(500, 200_000), keep_window=(parse_window("last=10,interval-tokens=8B"),))
    assert 20 <= len(left) <= 32


def test_a_window_with_an_end_is_its_members() -> None:
    window = parse_window("last=3,end-iteration=5000")
    assert numbers(pruned(every(1000, 9000), keep_window=(window,))) == [3000, 4000, 5000, 9000]
    with pytest.raises(SelectionError, match="end_iteration"):
        pruned(every(1000, 4000), keep_window=(window,))


def test_a_window_that_is_not_known_is_refused_and_too_few_all_stay() -> None:
    """Only what it lacks today may be missing: nothing tells what else it would take."""
    untold = [*every(1000, 5000), ref(6000, tokens=500 * B), ref(7000)]
    for text in ("last=3,interval-tokens=2B", "window-tokens=3B"):
        with pytest.raises(SelectionError, match="compared"):
            pruned(untold, keep_window=(parse_window(text),))
    refs = every(1000, 7000)
    for text in ("last=9", "last=9,interval-tokens=2B", "last=9,interval-iterations=2000"):
        assert pruned(refs, keep_window=(parse_window(text),)) == refs
    gap = [each for each in every(1000, 20_000) if each.iteration not in (15_000, 16_000, 17_000)]
    left = pruned(gap, keep_window=(parse_window("last=5,interval-iterations=2000"),))
    assert numbers(left) == [*range(10_000, 15_000, 1000), 18_000, 19_000, 20_000]


def test_all_of_one_iteration_stay_and_count_once() -> None:
    twin = ref(6000, path="/run/iter_6000")
    refs = [*every(1000, 8000), twin]
    for rules in ({"keep_last": 3}, {"keep_window": (parse_window("last=3"),)}):
        stays = needed(refs, refs[-2], PruneRequest(root="/run", **rules)).reasons
        assert sorted(stays) == sorted([twin.path, *(each.path for each in refs[5:8])])


def test_what_a_window_cannot_be_made_of_is_not_counted() -> None:
    export = ref(7500, format="safetensors", path="/run/export")
    left = pruned([*every(1000, 7000), export, ref(8000)], keep_window=(parse_window("last=3"),))
    assert numbers(left) == [6000, 7000, 8000]


def test_milestones_stay_the_same_as_the_run_goes_on() -> None:
    draw, iteration, left = random.Random(1), 0, list[CheckpointRef]()
    firsts: dict[int, int] = {}
    for _ in range(200):
        iteration += draw.randrange(100, 900)
        left.append(ref(iteration))
        if iteration // 5000:
            firsts.setdefault(iteration // 5000, iteration)
        if draw.random() < 0.2:
            left = pruned(left, keep_every_tokens=5 * B)
    last = [] if iteration in firsts.values() else [iteration]
    assert numbers(pruned(left, keep_every_tokens=5 * B)) == [*firsts.values(), *last]
    assert numbers(pruned(every(1000, 9000), keep_every_iterations=3000)) == [3000, 6000, 9000]


def test_recoveries_take_what_they_would_have_taken() -> None:
    """From every onset within the distance, at every attempt."""
    draw = random.Random(2)
    for _ in range(8):
        step = draw.randrange(15, 40)
        refs = [ref(i, snapshot=draw.random() < 0.3) for i in range(step, 60 * step, step)]
        refs += [ref(60 * step)]
        distance, margin = draw.randrange(1, 400), draw.randrange(0, 60)
        left = pruned(refs, keep_recovery_iterations=distance, margin_iterations=margin)
        assert len(left) < len(refs)
        for onset in range(60 * step - distance + 1, 60 * step + 1):
            for back in range(3):
                wanted = HealthyRequest(onset=onset, margin_iterations=margin, further_back=back)
                whole = choose_healthy(refs, wanted).selection.refs
                assert choose_healthy(left, wanted).selection.refs == whole


def test_a_recovery_that_is_not_possible_keeps_everything_and_says_so() -> None:
    refs = every(10, 50)
    found = needed(refs, refs[-1], PruneRequest(root="/run", keep_recovery_iterations=45))
    assert len(found.reasons) == 5 and "cannot be made" in found.notes[0]


def test_rules_count_what_training_can_resume_from() -> None:
    refs = [
        ref(1000),
        ref(2000),
        ref(3000, snapshot=True),
        ref(4000, unhealthy_because="in a spike"),
        ref(5000, incomplete="cut short"),
        ref(6000),
    ]
    assert numbers(pruned(refs, keep_last=2)) == [2000, 6000]
    assert numbers(pruned(refs, keep_last=1, keep_iterations=(4000, 5000))) == [4000, 5000, 6000]
    snapshots = pruned(refs, keep_window=(parse_window("last=3"),))
    assert numbers(snapshots) == [2000, 3000, 6000]


def test_what_cannot_be_met_is_refused() -> None:
    refs = [ref(1000), ref(2000, tokens=500 * 10**6), ref(3000)]
    with pytest.raises(SelectionError, match="keep_every_iterations"):
        pruned(refs, keep_every_tokens=B)
    with pytest.raises(SelectionError, match="1500 does not exist; nearest: iteration 1000"):
        pruned(every(1000, 3000), keep_iterations=(1500,))
    for rules in ({}, {"keep_last": 0}, {"keep_window": ()}, {"damaged": True}):
        with pytest.raises(UsageError):
            PruneRequest(root="/run", **rules)  # type: ignore[arg-type]


def test_windows_are_read_as_they_are_shown() -> None:
    for text in ("last=10,interval-tokens=8B", "window-tokens=1.5T", "tolerance=0.1", "last=3"):
        assert parse_window(window_text(parse_window(text))) == parse_window(text)
    for text, word in (
        ("last=ten", "no int"),
        ("lasst=10", "did you mean last"),
        ("last=3,last=4", "twice"),
        ("iterations=3", "did you mean end-iteration"),
        ("last=3,window-tokens=8B", "cannot be combined"),
        ("", "choose one of"),
    ):
        with pytest.raises(UsageError, match=word):
            parse_window(text)
