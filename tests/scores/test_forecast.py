"""Forecasts, their errors and their cautions, against numbers worked out here."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pma_megatron.errors import UsageError
from pma_megatron.formats.base import Schedule
from pma_megatron.scores.forecast import Annealed, Prediction, agreement, forecast
from pma_megatron.scores.results import Checkpoint, Score, Scores, read_scores

TRAINED = {10: 2.50, 20: 2.40, 30: 2.38, 40: 2.37}
MERGED = {30: 2.30, 40: 2.26}
PER_ITERATION = 1_000_000_000


def checkpoint(iteration: int, **schedule: Any) -> Checkpoint:
    given = {
        "learning_rate": 1e-3,
        "samples": iteration,
        "warmup_samples": 5,
        "decay_style": "constant",
        **schedule,
    }
    return Checkpoint(
        path=f"/run/{iteration}",
        iteration=iteration,
        consumed_tokens=iteration * PER_ITERATION,
        schedule=Schedule(**given),
    )


def score(method: str, members: tuple[int, ...], loss: float) -> Score:
    return Score(
        end_iteration=members[-1],
        method=method,
        last=len(members),
        interval_tokens=None,
        interval_iterations=None,
        iterations=members,
        coefficients=(1 / len(members),) * len(members),
        losses={"lm": loss, "other": 2 * loss},
    )


def scores(merged: dict[int, float] = MERGED, trained: dict[int, float] = TRAINED) -> Scores:
    """A dense 2B run: the guide says 6 checkpoints, 5B tokens apart."""
    points = [score("unmerged", (i,), loss) for i, loss in trained.items()]
    points += [score("sma", (i - 20, i - 10, i), loss) for i, loss in merged.items()]
    return Scores(
        load="/run",
        parameters=2_000_000_000,
        active_parameters=2_000_000_000,
        moe=False,
        checkpoints=tuple(checkpoint(i) for i in trained),
        points=tuple(points),
    )


def pair(merged: float, annealed: float, trained: float = 3.0) -> Prediction:
    return Prediction(
        start_iteration=1,
        iteration=1,
        trained=trained,
        merged=merged,
        annealed=annealed,
        annealed_tokens=None,
        source="",
    )


def test_agreement_is_what_its_definition_says() -> None:
    merged, annealed = (2.30, 2.26, 2.25, 2.20), (2.28, 2.27, 2.22, 2.19)
    trained = (2.40, 2.37, 2.31, 2.33)
    found = agreement([pair(*each) for each in zip(merged, annealed, trained, strict=True)])
    assert found is not None and found.n == 4
    assert found.mean_error == pytest.approx((0.02 - 0.01 + 0.03 + 0.01) / 4)
    assert found.rmse == pytest.approx(math.sqrt((4 + 1 + 9 + 1) * 1e-4 / 4))
    assert found.pearson == pytest.approx(pearson(merged, annealed))
    assert found.spearman == pytest.approx(1.0)  # the same order, not the same distances
    assert found.pearson is not None and found.pearson < 0.999
    gains = [(m - t, a - t) for m, a, t in zip(merged, annealed, trained, strict=True)]
    assert found.gain_pearson == pytest.approx(pearson(*zip(*gains, strict=True)))


def pearson(xs: Any, ys: Any) -> float:
    """From its definition, with sums."""
    n, mx, my = len(xs), math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    cov = math.fsum((xs[i] - mx) * (ys[i] - my) for i in range(n))
    vx, vy = (math.fsum((v - m) ** 2 for v in vs) for vs, m in ((xs, mx), (ys, my)))
    return cov / math.sqrt(vx * vy)


def test_spearman_shares_the_rank_of_ties() -> None:
    found = agreement([pair(1.0, 5.0), pair(1.0, 6.0), pair(2.0, 7.0), pair(3.0, 4.0)])
    assert found is not None  # ranks 1.5 1.5 3 4 and 2 3 4 1
    assert found.spearman == pytest.approx(pearson((1.5, 1.5, 3, 4), (2, 3, 4, 1)))


def test_no_correlation_where_it_means_nothing() -> None:
    assert agreement([]) is None
    two = agreement([pair(1.0, 1.1), pair(2.0, 2.2)])
    assert two is not None and two.n == 2 and two.rmse == pytest.approx(math.sqrt(0.05 / 2))
    assert (two.pearson, two.spearman, two.gain_pearson) == (None, None, None)
    flat = agreement([pair(1.0, v, v) for v in (1.0, 2.0, 3.0)])
    assert flat is not None and (flat.pearson, flat.gain_pearson) == (None, None)


def test_a_forecast_beside_real_annealing() -> None:
    runs = [
        Annealed(start_iteration=30, loss=2.28, tokens=10),
        Annealed(start_iteration=40, loss=2.28),
    ]
    made = forecast(scores(), runs, "lm")
    single, sma = made.series
    assert single.method == "unmerged" and single.merged == tuple(TRAINED.values())
    assert single.cautions == ()
    assert (sma.iterations, sma.trained, sma.merged) == ((30, 40), (2.38, 2.37), (2.30, 2.26))
    assert sma.window_tokens == 20 * PER_ITERATION
    first, second = sma.predictions
    assert first.error == pytest.approx(0.02) and second.error == pytest.approx(-0.02)
    assert first.relative_error == pytest.approx(0.02 / 0.10)
    assert sma.agreement is not None and sma.agreement.mean_error == pytest.approx(0.0)
    assert single.agreement is not None and single.agreement.mean_error == pytest.approx(0.095)
    plain = made.to_json()
    assert plain["series"][1]["predictions"][0]["error"] == pytest.approx(0.02)
    [later] = (
        forecast(scores(), [Annealed(start_iteration=30, end_iteration=40, loss=2.28)], "lm")
        .series[1]
        .at_end
    )
    assert (later.iteration, later.trained, later.merged) == (40, 2.37, 2.26)
    assert later.error == pytest.approx(-0.02)
    assert forecast(scores(), [], "other").series[1].merged == (4.60, 4.52)


def test_refused() -> None:
    with pytest.raises(
        UsageError, match=r"starts at iteration 35, where nothing .*score averages .*ends="
    ):
        forecast(scores(), [Annealed(start_iteration=35, loss=2.0)], "lm")
    with pytest.raises(UsageError, match="choose one of lm, other"):
        forecast(scores(), [], "loss")


def test_losses_that_are_not_finite() -> None:
    for loss in (math.nan, math.inf):
        with pytest.raises(UsageError, match=r"from iteration 30 .*leave it out"):
            forecast(scores(), [Annealed(start_iteration=30, loss=loss)], "lm")
    runs = [Annealed(start_iteration=s, loss=2.28) for s in (30, 40)]
    made = forecast(scores(merged={30: math.nan, 40: 2.26}), runs, "lm").series[1]
    assert [each.start_iteration for each in made.predictions] == [40]
    assert made.agreement is not None and made.agreement.mean_error == pytest.approx(-0.02)
    assert "at iteration 30 is not a finite number" in made.cautions[0]


def cautions(found: Scores, *runs: Annealed) -> str:
    return "\n".join(forecast(found, runs, "lm").series[1].cautions)


def test_a_stable_run_has_only_what_is_true_of_it() -> None:
    stable = scores(trained={10: 2.40, 20: 2.39, 30: 2.38, 40: 2.37})
    assert cautions(stable) == ""  # gains of .08 and .11, falls of .02; N and V within the guide's
    short = replace(stable, parameters=411_000_000, active_parameters=411_000_000)
    assert "N = 3 checkpoints 10B tokens apart are far from the guide, 6 that are 2B" in cautions(
        short
    )


def test_cautions_about_the_schedule() -> None:
    def with_(**by_iteration: dict[str, Any]) -> Scores:
        made = [checkpoint(i, **by_iteration.get(f"at{i}", {})) for i in TRAINED]
        return replace(scores(), checkpoints=tuple(made))

    decays = {f"at{i}": {"decay_start_samples": 30, "decay_style": "WSD"} for i in TRAINED}
    assert "rate changes within the window at iteration 40" in cautions(with_(**decays))
    lower = cautions(with_(at40={"learning_rate": 9e-4}))
    assert "rate changes within the window at iteration 40" in lower
    assert "warmup at iteration 30" in cautions(with_(at10={"samples": 4, "learning_rate": 8e-4}))
    assert "changes" not in cautions(with_(at10={"samples": 4, "learning_rate": 8e-4}))
    unknown = {f"at{i}": {"samples": None, "learning_rate": None} for i in TRAINED}
    assert "do not say where" in cautions(with_(**unknown))


def test_cautions_about_the_phase_and_the_horizon() -> None:
    """At 30 the trained loss fell by 0.12 over the window, and merging gains 0.05."""
    early = cautions(scores(merged={30: 2.33, 40: 2.26}))
    assert "at iteration 30 the trained loss falls" in early
    runs = [
        Annealed(start_iteration=s, loss=2.2, tokens=t * PER_ITERATION)
        for s, t in ((30, 40), (40, 41))
    ]
    assert "runs from iteration 40 take more than 2 times" in cautions(scores(), *runs)


def test_averages_that_were_scored_twice(tmp_path: Path) -> None:
    """An earlier release did so where methods were typed twice, or differed in the 7th digit."""
    once = scores()
    sma = [point for point in once.points if point.method == "sma"]
    path = tmp_path / "scores.json"

    def read(*more: Score) -> Scores:
        path.write_text(json.dumps(replace(once, points=(*once.points, *more)).to_json()))
        return read_scores(path)

    assert read(*sma) == once
    with pytest.raises(UsageError, match=r"two averages .* sma N=3 at iteration 30"):
        read(replace(sma[0], coefficients=(0.1, 0.1, 0.8)))
    with pytest.raises(UsageError, match=r"two averages .*2\.26.*2\.27"):
        read(replace(sma[1], losses={"lm": 2.27, "other": 4.54}))
    value = once.to_json()
    value["points"] = [r for r in value["points"] if (r["last"], r["end_iteration"]) != (1, 30)]
    path.write_text(json.dumps(value))
    with pytest.raises(UsageError, match="single checkpoint"):
        read_scores(path)


def test_scores_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores().to_json()))
    assert read_scores(path) == scores()
    value = json.loads(path.read_text())
    gains = {(p["method"], p["end_iteration"]): p["minus_unmerged"]["lm"] for p in value["points"]}
    assert gains["sma", 40] == pytest.approx(-0.11) and gains["unmerged", 40] == 0
    for text, words in (("[]", "holds no scores"), ("{", "cannot be read"), ("{}", "version None")):
        path.write_text(text)
        with pytest.raises(UsageError, match=words):
            read_scores(path)
