"""Spike detection, on real tiny runs (`series/`) and synthetic ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pma_megatron.errors import UsageError
from pma_megatron.spikes.detector import Kind, SpikeDetector, SpikeSettings, Verdict, detect
from pma_megatron.spikes.metrics import read_metrics

SERIES = Path(__file__).parents[1] / "series"
EVENT = 200
"""Iteration after which something happens in `SERIES`, see `make.py` there."""
QUIET = ["healthy", "healthy_2", "healthy_3", "long_warmup", "lr_drop", "lr_raise", "lr_rewarmup"]
SMALL = SpikeSettings(window=40, warmup=30, settle=5, patience=20, cooldown=5)
Series = list[tuple[int, float, float | None]]


def real(name: str) -> Series:
    points = read_metrics(SERIES / f"{name}.csv").points
    return [(point.iteration, point.loss, point.grad_norm) for point in points]


def noisy(length: int, *, seed: int = 0, sigma: float = 0.05) -> np.ndarray:
    """Losses of a healthy run in float64: a falling power law with white noise."""
    trend = 2.0 + 2.0 * (1 + np.arange(length) / 300) ** -0.5
    return trend + np.random.default_rng(seed).normal(0, sigma, length)


def series(losses: np.ndarray, every: int = 1) -> Series:
    return [(every * (i + 1), float(loss), None) for i, loss in enumerate(losses)]


def kinds(verdicts: list[Verdict]) -> list[Kind]:
    return [verdict.kind for verdict in verdicts]


# --- real runs ---


@pytest.mark.parametrize("name", QUIET)
def test_nothing_is_said_of_a_healthy_run(name: str) -> None:
    assert detect(real(name)) == []


@pytest.mark.parametrize("name", ["garbage", "lr_burst"])
def test_a_run_that_recovers_by_itself_is_not_lost(name: str) -> None:
    first, *more = detect(real(name))
    assert {verdict.kind for verdict in (first, *more)} == {Kind.RECOVERED}
    assert abs(first.onset - EVENT) <= 3


@pytest.mark.parametrize("name", ["collapse", "collapse_2", "hard_collapse"])
def test_a_collapse_is_found(name: str) -> None:
    rows = real(name)
    before = [loss for iteration, loss, _ in rows if EVENT - 40 < iteration <= EVENT]
    first = detect(rows)[0]
    assert first.kind is Kind.UNRECOVERED and first.fatal
    # The loss of an iteration is the one before its step.
    assert EVENT + 1 <= first.onset <= EVENT + 5
    assert first.confirmed - first.onset < 2 * SpikeSettings().patience
    assert abs(first.baseline - np.median(before)) < 0.1
    assert first.peak == max(loss for i, loss, _ in rows if first.onset <= i <= first.confirmed)
    assert f"{first.baseline:.4f}" in first.reason and f"{first.peak:.4f}" in first.reason


def test_a_loss_that_creeps_up_is_found() -> None:
    rows = real("creep")
    losses = np.array([loss for _, loss, _ in rows])
    means = np.convolve(losses, np.ones(20) / 20, mode="valid")
    first = detect(rows)[0]
    assert first.kind is Kind.DIVERGENCE and first.fatal
    # From the lowest stretch on, and before the end of the run, where the loss is 1 nat higher.
    assert means.argmin() < first.onset < first.confirmed < len(rows)
    assert losses[first.onset - 20 : first.onset].mean() < means.min() + 0.3


def test_nan_is_fatal_as_soon_as_it_stays() -> None:
    rows = real("nan")
    first_nan = next(iteration for iteration, loss, _ in rows if math.isnan(loss))
    found = detect(rows)
    assert kinds(found) == [Kind.NONFINITE] and found[0].fatal
    assert (found[0].onset, found[0].confirmed) == (first_nan, first_nan + 2)


# --- synthetic runs ---


@pytest.mark.parametrize("sigma", [0.02, 0.1, 0.3])
def test_noise_alone_says_nothing(sigma: float) -> None:
    assert detect(series(noisy(5000, sigma=sigma))) == []


def test_single_bad_batches_recover() -> None:
    losses = noisy(1000)
    losses[[300, 500, 501, 800]] += 3.0
    found = detect(series(losses))
    assert kinds(found) == [Kind.RECOVERED] * 3
    assert [verdict.onset for verdict in found] == [301, 501, 801]


def test_a_long_way_back_is_waited_for() -> None:
    losses = noisy(2000)
    losses[600:] += 3.0 * np.exp(-np.arange(1400) / 200)  # 0.7 nats after three times the patience
    found = detect(series(losses))
    assert set(kinds(found)) == {Kind.RECOVERED} and found[0].confirmed > 900


def test_a_step_of_the_data_mix_is_reported_and_not_fatal() -> None:
    losses = noisy(2000)
    losses[600:] += 0.25
    losses[1200:] += 0.25  # two accepted steps do not add up to a slow divergence
    assert kinds(detect(series(losses))) == [Kind.SHIFT, Kind.SHIFT]
    losses[600:] += 0.25
    assert kinds(detect(series(losses)))[0] is Kind.UNRECOVERED


@pytest.mark.parametrize("slope", [3e-2, 3e-3, 3e-4])
def test_creeping_is_found_whatever_its_pace(slope: float) -> None:
    losses = noisy(4000)
    trend = noisy(4000, sigma=0)
    losses[1000:] += slope * np.arange(3000) + trend[1000] - trend[1000:]
    first = next(verdict for verdict in detect(series(losses)) if verdict.fatal)
    assert first.kind is Kind.DIVERGENCE
    # Found by the time it has risen by what is fatal, plus a window or two patiences.
    assert first.confirmed < 1000 + 0.5 / slope + 256
    assert 1000 - 64 <= first.onset <= first.confirmed


def test_a_nonfinite_gradient_norm_must_persist() -> None:
    losses = noisy(600)
    rows: Series = [
        (i + 1, float(loss), math.inf if i % 7 == 0 else 0.5) for i, loss in enumerate(losses)
    ]
    assert detect(rows) == []
    rows[300:330] = [(i + 1, float(losses[i]), math.nan) for i in range(300, 330)]
    (verdict,) = detect(rows)
    assert (verdict.kind, verdict.onset, verdict.confirmed) == (Kind.NONFINITE, 301, 325)


def test_a_nonfinite_loss_must_stay() -> None:
    losses = noisy(600)
    losses[400:402] = math.nan
    assert detect(series(losses)) == []
    hasty = SpikeSettings(nonfinite_losses=1)
    assert [(v.onset, v.confirmed) for v in detect(series(losses), hasty)] == [(401, 401)]
    losses[402] = math.inf
    assert [(v.onset, v.confirmed) for v in detect(series(losses))] == [(401, 403)]


def test_nan_from_the_first_iteration() -> None:
    (verdict,) = detect([(i, math.nan, None) for i in range(1, 400)])
    assert (verdict.onset, verdict.confirmed) == (1, 3) and math.isnan(verdict.baseline)


def test_the_gradient_norm_dates_the_onset() -> None:
    losses = noisy(900)
    losses[600:] += 2.0
    rows = [(i + 1, float(loss), 9.0 if i >= 597 else 0.5) for i, loss in enumerate(losses)]
    assert detect(rows)[0].onset == 598
    assert detect(series(losses))[0].onset == 601


def test_restart_keeps_the_baseline_and_waits() -> None:
    losses = noisy(700)
    detector = SpikeDetector()
    for point in series(losses[:500]):
        assert detector.update(*point) is None
    for iteration in range(501, 541):
        detector.update(iteration, 9.0)
    assert detector.suspect_since == 501
    with pytest.raises(UsageError, match="restart"):
        detector.update(450, 2.0)
    detector.restart(450)
    assert detector.suspect_since is None
    cooldown = detector.settings.cooldown
    for iteration in range(451, 451 + cooldown):
        assert detector.update(iteration, 9.0) is None and detector.suspect_since is None
    # The next point that is off is seen at once, against the old baseline.
    verdicts = [detector.update(471 + i, 9.0) for i in range(detector.settings.patience)]
    assert detector.suspect_since == 471
    assert verdicts[-1] is not None and verdicts[-1].kind is Kind.UNRECOVERED
    assert abs(verdicts[-1].baseline - np.median(losses[450:500])) < 0.05
    # A fatal verdict leaves the baseline for the restart that follows it.
    detector.restart(450)
    for i in range(cooldown + 1):
        detector.update(451 + i, 9.0)
    assert detector.suspect_since == 451 + cooldown


def test_a_constant_loss_says_nothing() -> None:
    assert detect(series(np.full(600, 2.5))) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"window": 3},
        {"warmup": 0},
        {"patience": 2},
        {"patience": 10.5},
        {"threshold": 0.0},
        {"min_rise": math.nan},
        {"fatal_rise": 0.05},
        {"grad_norm_ratio": 1.0},
        {"nonfinite_losses": 0},
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(wrong))} must be"):
        SpikeSettings(**wrong)  # type: ignore[arg-type]


def test_a_state_of_another_version_is_refused() -> None:
    state = SpikeDetector().state_dict()
    with pytest.raises(UsageError, match="another version"):
        SpikeDetector().load_state_dict({**state, "window": 3})
    del state["floor"]
    with pytest.raises(UsageError, match="another version"):
        SpikeDetector().load_state_dict(state)


# --- properties ---


@st.composite
def eventful(draw: st.DrawFn) -> Series:
    """A run with spikes, steps, ramps and NaN in random places."""
    losses = noisy(
        300, seed=draw(st.integers(0, 99)), sigma=draw(st.sampled_from([0.0, 0.05, 0.2]))
    )
    for _ in range(draw(st.integers(0, 4))):
        start, length = draw(st.integers(0, 280)), draw(st.integers(1, 200))
        shape = draw(st.sampled_from(["step", "ramp", "nan"]))
        piece = slice(start, start + (length if shape != "nan" else length % 5))
        rise = draw(st.sampled_from([0.2, 1.0, 5.0]))
        losses[piece] += {
            "step": rise,
            "ramp": rise / 50 * np.arange(len(losses[piece])),
            "nan": math.nan,
        }[shape]
    norms = np.random.default_rng(1).lognormal(-1, 0.3, 300)
    norms[draw(st.lists(st.integers(0, 299), max_size=20))] = draw(
        st.sampled_from([50.0, math.inf])
    )
    return [(i + 1, float(losses[i]), float(norms[i])) for i in range(300)]


@settings(max_examples=60, deadline=None)
@given(rows=eventful(), cut=st.integers(0, 300))
def test_a_saved_detector_goes_on_as_if_nothing_had_happened(rows: Series, cut: int) -> None:
    first, second = SpikeDetector(SMALL), SpikeDetector(SMALL)
    early = [first.update(*row) for row in rows[:cut]]
    text = json.dumps(first.state_dict(), allow_nan=False)
    second.load_state_dict(json.loads(text))
    both = [verdict for verdict in early if verdict] + [
        verdict for row in rows[cut:] if (verdict := second.update(*row))
    ]
    assert repr(both) == repr(detect(rows, SMALL))
    assert len(text) < 8000


@settings(max_examples=60, deadline=None)
@given(rows=eventful(), every=st.sampled_from([2, 10, 1000]))
def test_points_count_and_not_iterations(rows: Series, every: int) -> None:
    found = detect([(every * i, loss, norm) for i, loss, norm in rows], SMALL)
    plain = detect(rows, SMALL)
    assert [(v.kind, v.onset, v.confirmed) for v in found] == [
        (v.kind, every * v.onset, every * v.confirmed) for v in plain
    ]


@settings(max_examples=60, deadline=None)
@given(rows=eventful())
def test_units_of_the_loss_do_not_matter(rows: Series) -> None:
    # A power of two, so that the arithmetic is exact: bits instead of nats change nothing else.
    fine = {"window": 40, "warmup": 30, "settle": 5, "patience": 20}
    base = SpikeSettings(**fine, min_rise=0.125, fatal_rise=0.25)
    twice = SpikeSettings(**fine, min_rise=0.25, fatal_rise=0.5)
    found = detect([(i, 2 * loss, norm) for i, loss, norm in rows], twice)
    assert [(v.kind, v.onset, v.confirmed) for v in found] == [
        (v.kind, v.onset, v.confirmed) for v in detect(rows, base)
    ]


def test_a_rise_that_was_over_before_anything_was_judged() -> None:
    fine = SpikeSettings(window=40, warmup=30, settle=5, patience=20)
    rows = [(i, 4.0 if i in (27, 28, 29) else 2.0, None) for i in range(1, 80)]
    (verdict,) = detect(rows, fine)
    assert (verdict.kind, verdict.onset, verdict.peak) == (Kind.RECOVERED, 27, 4.0)


@settings(max_examples=60, deadline=None)
@given(rows=eventful())
def test_verdicts_are_consistent(rows: Series) -> None:
    for verdict in detect(rows, SMALL):
        assert 1 <= verdict.onset <= verdict.confirmed <= 300
        assert verdict.fatal == (verdict.kind not in (Kind.RECOVERED, Kind.SHIFT))
        if verdict.kind is not Kind.NONFINITE:
            assert verdict.peak > verdict.baseline
