"""Which averages are scored, in which order, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pma_megatron import CheckpointRef, Method
from pma_megatron.errors import SelectionError, UsageError
from pma_megatron.scores.grid import Grid, method_label, parse_ends, parse_method
from pma_megatron.scores.results import Score

TOKENS = 1000


def refs(*iterations: int, incomplete: tuple[int, ...] = ()) -> list[CheckpointRef]:
    return [
        CheckpointRef(
            path=f"/run/iter_{i:07d}",
            format="torch_dist",
            iteration=i,
            consumed_samples=i,
            consumed_tokens=i * TOKENS,
            tokens_unknown_because=None,
            complete=i not in incomplete,
            incomplete_because="cut" if i in incomplete else None,
        )
        for i in iterations
    ]


def shape(grid: Grid, found: list[CheckpointRef]) -> list[tuple[str, int, tuple[int, ...]]]:
    """(method, end, iterations) of each point."""
    points, _ = grid.points(found)
    return [
        (p.label, p.end.iteration or 0, tuple(r.iteration or 0 for r in p.selection.refs))
        for p in points
    ]


def test_every_combination_once_and_the_baseline_at_each_end() -> None:
    grid = Grid(
        methods=(Method(), Method(name="ema", alpha=0.2), parse_method("sma")),
        lasts=(3, 1, 2, 3),
        intervals_tokens=(10 * TOKENS, 20 * TOKENS, 10 * TOKENS),
        ends=(60, 50),
    )
    both = ("sma", "ema:0.2")
    assert shape(grid, refs(10, 20, 30, 40, 50, 60)) == [
        ("unmerged", 50, (50,)),
        *((m, 50, (40, 50)) for m in both),
        *((m, 50, (30, 50)) for m in both),
        *((m, 50, (30, 40, 50)) for m in both),
        *((m, 50, (10, 30, 50)) for m in both),
        ("unmerged", 60, (60,)),
        *((m, 60, (50, 60)) for m in both),
        *((m, 60, (40, 60)) for m in both),
        *((m, 60, (40, 50, 60)) for m in both),
        *((m, 60, (20, 40, 60)) for m in both),
    ]


def test_averages_that_differ_a_little_have_two_names() -> None:
    near = (8_000_000_000, 8_000_000_001)
    grid = Grid(
        methods=(parse_method("ema:0.1234567"), parse_method("ema:0.1234568")),
        lasts=(2,),
        intervals_tokens=near,
        tolerance=0.1,
    )
    run = [replace(each, consumed_tokens=near[0] * (each.iteration or 0)) for each in refs(1, 2, 3)]
    points, _ = grid.points(run)
    names = {str(Score.of(point, {"loss": 1.0})) for point in points}
    assert len(points) == 5 and len(names) == 5
    assert "ema:0.1234567 N=2 V=8B" in names


def test_coefficients_are_those_of_the_method() -> None:
    points, _ = Grid(methods=(parse_method("wma"), parse_method("ema:0.25")), lasts=(3,)).points(
        refs(1, 2, 3)
    )
    assert points[0].coefficients == (1.0,)
    assert points[1].coefficients == pytest.approx((1 / 6, 2 / 6, 3 / 6))
    assert points[2].coefficients == pytest.approx((0.75**2, 0.25 * 0.75, 0.25))


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ("newest", [50]),
        ("all", [10, 20, 40, 50]),
        ("every:2", [20, 50]),
        ("every:3", [10, 50]),
        ((40, 20), [20, 40]),
    ],
)
def test_ends(ends: str | tuple[int, ...], expected: list[int]) -> None:
    """An incomplete checkpoint (30) and an excluded one (60) are no ends."""
    grid = Grid(lasts=(1,), ends=ends, exclude=(60,))
    found = refs(10, 20, 30, 40, 50, 60, incomplete=(30,))
    assert [end for _, end, _ in shape(grid, found)] == expected


def test_what_cannot_be_met_is_skipped_with_the_reason() -> None:
    points, skipped = Grid(lasts=(2, 3), ends="all").points(refs(10, 20, 30))
    assert [(p.label, p.end.iteration, len(p.coefficients)) for p in points] == [
        ("unmerged", 10, 1),
        ("unmerged", 20, 1),
        ("sma", 20, 2),
        ("unmerged", 30, 1),
        ("sma", 30, 2),
        ("sma", 30, 3),
    ]
    assert [(s.end_iteration, s.last) for s in skipped] == [(10, 2), (10, 3), (20, 3)]
    assert "needs 3 complete checkpoints" in skipped[-1].reason


def test_refused() -> None:
    with pytest.raises(SelectionError, match=r"no average of the grid .*lasts=5"):
        Grid(lasts=(4, 5), ends="all").points(refs(10, 20, 30))
    with pytest.raises(SelectionError, match="iteration 15, which does not exist"):
        Grid(lasts=(2,), ends=(15,)).points(refs(10, 20, 30))
    for bad, words in (
        ({"methods": ()}, "methods= is empty"),
        ({"lasts": (0,)}, "lasts= must be at least 1"),
        ({"tolerance": 0.5}, "tolerance="),
        ({"ends": "every:0"}, "ends='every:0' is not"),
        ({"intervals_tokens": (1,), "intervals_iterations": (1,)}, "cannot be combined"),
        ({"methods": (Method(name="custom", values=(0.5, 0.5)),)}, "fits one count only"),
    ):
        with pytest.raises(UsageError, match=words):
            Grid(**bad)  # type: ignore[arg-type]


def test_as_typed() -> None:
    exact = ("ema:0.1234567", "ema:0.1234568", "linear:1e-07", "ema:0.30000000000000004")
    for text in ("sma", "wma", "ema:0.2", "ema:1", "1-sqrt", "linear:0.1", "ema", *exact):
        assert method_label(parse_method(text)) == text
    assert parse_method("ema:0.2") == Method(name="ema", alpha=0.2)
    assert parse_method("1-sqrt:0.1") == Method(name="1-sqrt", floor=0.1)
    for text in ("mean", "mean:2", "sma:2", "ema:x", "ema:1.5"):
        with pytest.raises(UsageError):
            parse_method(text)
    assert parse_ends(["every:4"]) == "every:4"
    assert parse_ends(["30", "10"]) == (30, 10)
    for words in (["some"], ["10", "all"], ["every:x"]):
        with pytest.raises(UsageError, match="ends="):
            parse_ends(words)


def test_checkpoints_spoiled_by_a_spike_end_no_average() -> None:
    run = refs(10, 20, 30)
    run[1] = replace(run[1], unhealthy_because="saved in a spike")
    assert Grid(ends="all", lasts=(2,)).end_iterations(run) == [10, 30]
    assert Grid(ends=(20,), lasts=(2,)).end_iterations(run) == [20]  # unless it is named
