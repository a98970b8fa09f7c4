"""Coefficients against independent oracles: run recursions, simulated training, integration."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import pma_megatron.merging.coefficients as module
from checkpoint_refs import B, ref
from pma_megatron.errors import UsageError
from pma_megatron.merging.coefficients import (
    METHODS,
    Coefficients,
    coefficients,
    exact_weights,
    implied_decay_weights,
)
from pma_megatron.merging.request import MergeRequest, Method
from pma_megatron.runs.selection import select
from pma_megatron.runs.selection_request import SelectionRequest

DECAYS = {
    "linear": lambda x: 1 - x,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "1-sqrt": lambda x: 1 - np.sqrt(x),
    # Written as 1/sqrt(1+3x) stretched from [1/2, 1] to [0, 1], not as the package simplifies it.
    "inverse-sqrt": lambda x: (1 / np.sqrt(1 + 3 * x) - 0.5) / 0.5,
}
ULP = math.ulp(1.0)
# Two neighbouring means of 1-sqrt that rounding puts in the wrong order.
ULP_APART = [0, 2985264974860241, *(4644704186141202 + i for i in (0, 1, 3)), 8 * 10**15, 10**16]


def merged_by(result: Coefficients, checkpoints: np.ndarray) -> np.ndarray:
    return sum(c * theta for c, theta in zip(result.values, checkpoints, strict=True))


def numerical_mean(curve, start: float, end: float) -> float:
    """Mean of the curve by Gauss-Legendre, in a variable that removes sqrt's singularity at 0."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    low, high = math.sqrt(start), math.sqrt(end)
    roots = low + (high - low) * (nodes + 1) / 2
    return float(np.sum(weights * curve(roots**2) * roots) / (low + high))


def increasing_tokens(min_size: int = 1):
    gaps = st.lists(st.integers(1, 10**11), min_size=min_size - 1, max_size=15)
    start = st.integers(0, 10**13)
    return st.builds(lambda first, steps: np.cumsum([first, *steps]).tolist(), start, gaps)


@pytest.mark.parametrize("number", [1, 2, 3, 10, 37])
def test_sma_is_the_mean(number: int) -> None:
    checkpoints = np.random.default_rng(number).normal(size=(number, 50))
    result = coefficients("sma", count=number)
    np.testing.assert_allclose(merged_by(result, checkpoints), checkpoints.mean(0), rtol=1e-13)
    assert result.values == (1 / number,) * number


@pytest.mark.parametrize("alpha", [None, 0.1, 0.2, 0.9, 1.0, 1e-6])
@pytest.mark.parametrize("number", [1, 2, 3, 10, 37])
def test_ema_is_the_recursion_of_equation_4(number: int, alpha: float | None) -> None:
    checkpoints = np.random.default_rng(number).normal(size=(number, 50))
    average = checkpoints[0]
    for newer in checkpoints[1:]:
        rate = 0.2 if alpha is None else alpha
        average = rate * newer + (1 - rate) * average
    result = coefficients("ema", count=number, alpha=alpha)
    np.testing.assert_allclose(merged_by(result, checkpoints), average, rtol=1e-12, atol=1e-14)
    assert result.parameters == (("alpha", 0.2 if alpha is None else alpha),)


def test_ema_differs_from_section_4_2_in_the_oldest_weight_only() -> None:
    alpha, number = 0.2, 10
    section_4_2 = [alpha * (1 - alpha) ** (number - i) for i in range(1, number + 1)]
    ours = coefficients("ema", count=number, alpha=alpha).values
    assert math.fsum(section_4_2) == pytest.approx(1 - (1 - alpha) ** number)
    assert ours[1:] == pytest.approx(section_4_2[1:], rel=1e-14)
    assert ours[0] == pytest.approx(section_4_2[0] / alpha, rel=1e-14)


def test_wma_grows_linearly() -> None:
    assert coefficients("wma", count=4).values == (0.1, 0.2, 0.3, 0.4)


@pytest.mark.parametrize("method", DECAYS)
@pytest.mark.parametrize("floor", [0.0, 0.1, 0.75])
@settings(max_examples=25, deadline=None)
@given(tokens=increasing_tokens(min_size=2))
def test_merging_equals_training_with_the_mean_decay_of_each_interval(method, floor, tokens):
    rng = np.random.default_rng(len(tokens))
    updates = rng.normal(size=(len(tokens) - 1, 20))
    checkpoints = rng.normal(size=20) - np.vstack([np.zeros(20), np.cumsum(updates, axis=0)])
    progress = [(t - tokens[0]) / (tokens[-1] - tokens[0]) for t in tokens]

    decayed = checkpoints[0].copy()
    for update, start, end in zip(updates, progress[:-1], progress[1:], strict=True):
        decayed -= (floor + (1 - floor) * numerical_mean(DECAYS[method], start, end)) * update

    result = coefficients(method, tokens=tokens, floor=floor)
    np.testing.assert_allclose(merged_by(result, checkpoints), decayed, rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", DECAYS)
def test_every_curve_falls_from_one_to_zero(method: str) -> None:
    tokens = list(range(2001))
    weights = implied_decay_weights(coefficients(method, tokens=tokens).values)
    assert weights[0] == pytest.approx(1, abs=0.02)
    assert weights[-1] == pytest.approx(0, abs=1e-3)
    assert list(weights) == sorted(weights, reverse=True)
    floored = implied_decay_weights(coefficients(method, tokens=tokens, floor=0.1).values)
    assert floored[-1] == pytest.approx(0.1, abs=1e-3)


def test_inverse_sqrt_decays_as_much_as_one_minus_sqrt() -> None:
    means = [numerical_mean(DECAYS[method], 0, 1) for method in ("inverse-sqrt", "1-sqrt")]
    assert means == pytest.approx([1 / 3, 1 / 3])
    for method in ("inverse-sqrt", "1-sqrt"):
        assert coefficients(method, tokens=[7, 9]).values == pytest.approx([2 / 3, 1 / 3])


def test_true_positions_matter_where_list_positions_would_not_show() -> None:
    even = coefficients("linear", tokens=[0, 10, 20, 30]).values
    assert even == pytest.approx([1 / 6, 1 / 3, 1 / 3, 1 / 6])
    assert coefficients("linear", tokens=[500, 510, 520, 530]).values == pytest.approx(even)
    # Means of 1-x over [0,.1], [.1,.2], [.2,1]: .95, .85, .4.
    uneven = coefficients("linear", tokens=[0, 10, 20, 100]).values
    assert uneven == pytest.approx([0.05, 0.1, 0.45, 0.4])


def test_the_numbers_in_the_module_docstring() -> None:
    ours = coefficients("1-sqrt", tokens=[0, 1, 2, 3, 4]).values

    def from_weights(weights: list[float]) -> list[float]:
        extended = [1.0, *weights, 0.0]
        return [a - b for a, b in pairwise(extended)]

    pr_5114 = from_weights([1 - math.sqrt(j / 5) for j in range(1, 5)])
    interval_start = from_weights([1 - math.sqrt((j - 1) / 4) for j in range(1, 5)])
    for row in (ours, pr_5114, interval_start):
        assert " ".join(f"{c:.3f}"[1:] for c in row) in module.__doc__


@settings(max_examples=200, deadline=None)
@given(
    method=st.sampled_from([m for m in METHODS if m != "custom"]),
    tokens=increasing_tokens(),
    alpha=st.floats(1e-12, 1.0),
    floor=st.floats(0.0, 1.0, exclude_max=True),
)
@example(method="1-sqrt", tokens=ULP_APART, alpha=0.5, floor=0.0)
@example(method="cosine", tokens=[0, 10**17 - 1, 10**17], alpha=0.5, floor=0.0)
def test_sums_to_one_within_an_ulp_and_is_never_negative(method, tokens, alpha, floor) -> None:
    settings_of = {"ema": {"alpha": alpha}, **{decay: {"floor": floor} for decay in DECAYS}}
    result = coefficients(method, tokens=tokens, **settings_of.get(method, {}))
    assert len(result.values) == len(tokens)
    assert abs(math.fsum(result.values) - 1) <= ULP
    assert min(result.values) >= 0
    weights = implied_decay_weights(result.values)
    assert len(weights) == len(tokens) - 1
    assert all(1 + ULP >= a >= b >= 0 for a, b in pairwise(weights))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=12))
def test_implied_decay_weights_are_what_each_interval_keeps(values: list[float]) -> None:
    """Moving every checkpoint after an interval by 1 moves the merge by that interval's weight."""
    checkpoints = np.tril(np.ones((len(values), len(values))))[:, 1:]
    expected = np.array(values) @ checkpoints
    np.testing.assert_allclose(implied_decay_weights(values), expected, rtol=0, atol=1e-13)


def test_sma_implies_a_linear_decay() -> None:
    values = coefficients("sma", count=4).values
    assert implied_decay_weights(values) == pytest.approx([0.75, 0.5, 0.25])


@pytest.mark.parametrize("method", [m for m in METHODS if m != "custom"])
def test_one_checkpoint_is_itself(method: str) -> None:
    assert coefficients(method, count=1).values == (1.0,)
    assert coefficients(method, tokens=[123]).values == (1.0,)
    assert implied_decay_weights((1.0,)) == ()


def test_custom_keeps_what_was_written() -> None:
    result = coefficients("custom", values=[0.2, 0.3, 0.5], count=3)
    assert result.values == (0.2, 0.3, 0.5)
    assert result.parameters == ()
    assert coefficients("custom", values=[0.1] * 10).values == (0.1,) * 10
    assert coefficients("custom", values=[0.0, 1.0]).values == (0.0, 1.0)


def test_custom_normalises_a_list_typed_with_few_digits_and_says_so() -> None:
    typed = [0.333333, 0.333333, 0.333333 + 4e-7]
    result = coefficients("custom", values=typed)
    assert abs(math.fsum(result.values) - 1) <= ULP
    assert result.parameters == (("normalised_from_sum", math.fsum(typed)),)
    assert "normalised_from_sum" in result.describe()


def test_custom_takes_anything_finite_only_with_the_flag() -> None:
    result = coefficients("custom", values=[-0.5, 2.0], allow_any=True)
    assert result.values == (-0.5, 2.0)
    assert result.parameters == (("sum", 1.5),)
    with pytest.raises(UsageError, match=r"finite numbers, found nan"):
        coefficients("custom", values=[0.5, math.nan], allow_any=True)


def test_custom_takes_what_float32_holds() -> None:
    least, greatest = (float(getattr(np.finfo(np.float32), n)) for n in ("tiny", "max"))
    for values in ((greatest, greatest, -greatest), (least, 0.0), (1.0, -1.0), (5e-324, 1.0)):
        assert coefficients("custom", values=values, allow_any=True).values == values
    for beyond in (math.nextafter(greatest, math.inf), math.nextafter(least, 0)):
        with pytest.raises(UsageError):
            coefficients("custom", values=[beyond], allow_any=True)


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        ("slerp", {"count": 3}, r"unknown method 'slerp': choose one of sma, ema, wma"),
        ("ema", {"count": 3, "alpha": 0.0}, r"alpha= must lie in \(0, 1\], got 0.0"),
        ("ema", {"count": 3, "alpha": 1.5}, r"alpha= must lie in \(0, 1\], got 1.5"),
        ("ema", {"count": 3, "alpha": math.nan}, r"alpha= must lie in \(0, 1\], got nan"),
        ("linear", {"tokens": [1, 2], "floor": 1.0}, r"floor= must lie in \[0, 1\), got 1"),
        ("linear", {"tokens": [1, 2], "floor": -0.1}, r"floor= must lie in .* got -0.1"),
        ("linear", {"tokens": [1, 2], "floor": math.nan}, r"floor= must lie in"),
        ("1-sqrt", {"count": 3}, r"needs the token position of every checkpoint: use sma"),
        ("wma", {"tokens": [1, 3, 2]}, r"tokens must increase .*: 2 follows 3"),
        ("cosine", {"tokens": [1, 1]}, r"tokens must increase .*: 1 follows 1"),
        ("sma", {}, r"number of checkpoints is not known: give tokens or count"),
        ("sma", {"count": 0}, r"at least one is needed"),
        ("sma", {"count": 3, "tokens": [1, 2]}, r"3 checkpoints, 2 token positions"),
        ("sma", {"count": 3, "alpha": 0.2}, r"alpha= has no effect on method 'sma'"),
        ("ema", {"count": 3, "floor": 0.1}, r"floor= .* only on: linear, cosine, 1-sqrt"),
        ("sma", {"count": 1, "values": [1.0]}, r"values= has no effect on method"),
        ("sma", {"count": 1, "allow_any": True}, r"allow_any= has no effect"),
        ("custom", {"count": 3}, r"'custom' needs values=, one number per"),
        ("custom", {"count": 3, "values": [0.5, 0.5]}, r"3 checkpoints, 2 values="),
        ("custom", {"values": []}, r"at least one is needed"),
        ("custom", {"values": [0.5, math.inf]}, r"finite numbers, found inf"),
        ("custom", {"values": [-0.5, 1.5]}, r"negative, found -0.5.*allow_any=True"),
        ("custom", {"values": [0.5, 0.4]}, r"2 values= sum to 0.9, not 1.*allow_any=True"),
        ("custom", {"values": [0.5, 0.500002]}, r"sum to 1.000002, not 1"),
        ("custom", {"values": [10**400, 0.5], "allow_any": True}, r"finite numbers, found inf"),
        ("custom", {"values": [-(10**400)], "allow_any": True}, r"finite numbers, found -inf"),
        ("custom", {"values": [1e308] * 3, "allow_any": True}, r"float32 ends, found 1e\+308"),
        ("custom", {"values": [1e308, -1e308]}, r"float32 ends, found 1e\+308"),
        ("custom", {"values": [0.0, -0.0], "allow_any": True}, r"all 0: "),
        ("custom", {"values": [0, 1e-39], "allow_any": True}, r"all 0 but for 1e-39: "),
    ],
)
def test_refusals_say_what_was_found_and_what_to_do(method, arguments, message) -> None:
    with pytest.raises(UsageError, match=message):
        coefficients(method, **arguments)


def test_an_empty_list_is_refused_where_it_is_used() -> None:
    request = MergeRequest(load="/ckpts/run", method=Method(name="custom", values=()))
    with pytest.raises(UsageError, match=r"2 checkpoints, 0 "):
        request.method.of((), 2)


def test_every_result_cites_its_equation() -> None:
    cited = {
        method: coefficients(method, tokens=[1, 2]).source
        for method in METHODS
        if method != "custom"
    }
    assert cited["sma"] == "arXiv 2505.12082 eq. 3"
    assert cited["ema"].startswith("arXiv 2505.12082 eq. 4")
    assert cited["wma"] == "arXiv 2505.12082 eq. 5"
    for decay in DECAYS:
        assert cited[decay].startswith("arXiv 2507.17634 theorem 3.1")
    assert coefficients("ema", count=2).describe() == "ema(alpha=0.2)"
    assert coefficients("sma", count=2).describe() == "sma"


def test_numpy_positions_are_fine() -> None:
    positions = np.array([0, 10, 20, 30])
    assert coefficients("linear", tokens=positions).values == pytest.approx(
        coefficients("linear", tokens=[0, 10, 20, 30]).values
    )


@pytest.mark.parametrize(
    ("method", "count", "exact"),
    [
        ("sma", 10, ((1,) * 10, 10)),
        ("wma", 10, (tuple(range(1, 11)), 55)),
        ("ema", 3, ((16, 4, 5), 25)),
    ],
)
def test_weights_that_float32_holds_exactly(
    method: str, count: int, exact: tuple[tuple[int, ...], int]
) -> None:
    values = coefficients(method, count=count).values
    assert exact_weights(values) == exact
    assert exact_weights((0.0, *values)) == ((0, *exact[0]), exact[1])  # a sweep's shorter output


def test_weights_that_float32_does_not_hold_exactly() -> None:
    decay = coefficients("1-sqrt", tokens=(0, 1, 2, 3, 4)).values
    assert exact_weights(decay) is None
    assert exact_weights(coefficients("ema", count=30).values) is None  # 5^29 does not fit
    assert exact_weights((0.3, 0.7)) is None  # 3 x_1 / 10 + ...: the first product would round
    assert exact_weights((0.2, 0.3, 0.5)) == ((2, 3, 5), 10)
    assert exact_weights((1.5, -0.5)) is None and exact_weights((2.0, -1.0)) == ((2, -1), 1)


def test_an_average_of_a_sweep_is_the_average_of_its_name() -> None:
    # Up to 4000 samples were shorter: tokens place the newest four, and all six go by iterations.
    grown = {6000: 16, 8000: 20, 10000: 30, 12000: 60}
    older = [ref(i, i * 10**6, consumed_samples=i * 10**6 // 8) for i in (2000, 4000)]
    newer = [ref(i, t * B, consumed_samples=t * B // 16) for i, t in grown.items()]
    sweep = MergeRequest(load="/run", sweep=("1-sqrt,wma:2,4,6",))
    chosen = select([*older, *newer], sweep.widest())
    units = set()
    for output in sweep.outputs(chosen):
        name, last = output.name.split("-last")
        single = MergeRequest(
            load="/run", selection=SelectionRequest(last=int(last)), method=Method(name=name)
        )
        own = select([*older, *newer], single.selection)
        (alone,) = single.outputs(own)
        units.add(own.position_unit)
        assert output.coefficients == alone.coefficients, output.name
        assert output.values == (0.0,) * (6 - int(last)) + alone.values
    assert units == {"tokens", "iterations"} and chosen.position_unit == "iterations"
    said = sweep.notes_of_outputs(chosen)
    assert [note for note in said if "in tokens" in note and "last 4" in note]
    assert not [note for note in said if "last 6" in note]
