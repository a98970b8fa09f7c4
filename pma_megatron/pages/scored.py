"""What a page says of a grid of scores, and of a forecast made of one."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from pma_megatron.pages import charts
from pma_megatron.pages.pictures import svg_of
from pma_megatron.pages.section import Level, Part, Picture, Row, Section, Table, shown
from pma_megatron.runs.tokens import format_tokens
from pma_megatron.scores.forecast import Annealed, Forecast, Series, forecast
from pma_megatron.scores.grid import UNMERGED
from pma_megatron.scores.results import Score, Scores


def of_scores(scores: Scores, prefix: str) -> Section:
    """The section of a grid: which average is best, and how much it gains."""
    metric = scores.metrics[0]
    merged = [point for point in scores.points if point.method != UNMERGED]
    end = max(point.end_iteration for point in scores.points)
    there = [point for point in merged if point.end_iteration == end]
    best = min(there, key=lambda point: point.losses[metric], default=None)
    answer, level = f"No average ends at iteration {end}.", Level.NEUTRAL
    if best is not None:
        gain = scores.gain(best, metric)
        level = Level.GOOD if gain < 0 else Level.WARNING
        answer = (
            f"At iteration {end} the best average is {best}: {shown(metric)} "
            f"{best.losses[metric]:.4f}, {gain:+.4f} against the newest checkpoint alone."
        )
    drawn = tuple(
        Picture(
            caption=f"{shown(name)} along the run",
            svg=svg_of(partial(charts.of_scores, scores, name), f"{prefix}-{number}-"),
        )
        for number, name in enumerate(scores.metrics)
    )
    return Section(
        title=f"{len(scores.points)} averages of {shown(scores.load)}, scored",
        answer=answer,
        level=level,
        facts=_model(scores),
        warnings=tuple(shown(each.reason) for each in scores.passed_over),
        pictures=drawn,
        tables=(_points(scores, best),),
    )


def of_forecast(value: Mapping[str, Any], prefix: str) -> Section:
    """The section of what `pma forecast --out` wrote.

    Raises:
        KeyError, TypeError: it is something else.
        UsageError: of another version.
    """
    scores = Scores.from_json(value["scores"])
    said = value["forecast"]
    annealed = [
        Annealed(**{name: run[name] for name in Annealed.__dataclass_fields__})
        for run in said["annealed"]
    ]
    made = forecast(scores, annealed, said["metric"])
    merged = made.series[1:]
    cautions = [f"{series}: {text}" for series in merged for text in series.cautions]
    answer, level = _forecast_in_words(made)
    return Section(
        title=f"Forecast of the annealed {shown(made.metric)} of {shown(scores.load)}",
        answer=answer,
        level=Level.WARNING if cautions else level,
        facts=_model(scores),
        warnings=tuple(map(shown, cautions)),
        pictures=(
            Picture(
                caption="Trained, and what annealing is forecast to reach",
                svg=svg_of(lambda: charts.of_forecast(scores, made), f"{prefix}-forecast-"),
            ),
        ),
        tables=(*map(_series, merged), *_predictions(made)),
    )


def _forecast_in_words(made: Forecast) -> tuple[str, Level]:
    if len(made.series) < 2:
        return "Nothing was merged, so there is no forecast.", Level.NEUTRAL
    best = min(made.series[1:], key=lambda series: series.merged[-1])
    loss, trained = best.merged[-1], best.trained[-1]
    window = ""
    if best.window_tokens is not None:
        window = f" by a decay over about {format_tokens(best.window_tokens)} tokens"
    text = (
        f"Annealed to iteration {best.iterations[-1]}{window}, {shown(made.metric)} would be about "
        f"{loss:.4f} ({loss - trained:+.4f}), by {best}."
    )
    return text, Level.NEUTRAL


def _model(scores: Scores) -> tuple[tuple[str, str], ...]:
    active = scores.active_parameters
    size = f"{scores.parameters:,}" + (
        f", {active:,} active" if active is not None and scores.moe else ""
    )
    return (("parameters", size), ("checkpoints", str(len(scores.checkpoints))))


def _points(scores: Scores, best: Score | None) -> Table:
    losses = [column for name in scores.metrics for column in (name, "minus unmerged")]
    rows = []
    for point in scores.points:
        tokens = scores.tokens[point.end_iteration]
        cells = [
            str(point.end_iteration),
            "" if tokens is None else format_tokens(tokens),
            f"{point}{' (best at the end)' if point is best else ''}",
        ]
        single = point.method == UNMERGED
        for name in scores.metrics:
            gain = "" if single else f"{scores.gain(point, name):+.4f}"
            cells += [f"{point.losses[name]:.4f}", gain]
        part = Part.KEPT if single else Part.AVERAGED
        rows.append(Row(cells=tuple(map(shown, cells)), part=part))
    return Table(
        title="Every average",
        columns=("iteration", "tokens", "average", *map(shown, losses)),
        rows=tuple(rows),
        numbers=("iteration", "tokens", *map(shown, losses)),
    )


def _series(series: Series) -> Table:
    rows = zip(series.iterations, series.tokens, series.trained, series.merged, strict=True)
    return Table(
        title=f"{series}",
        columns=("iteration", "tokens", "trained", "forecast", "difference"),
        rows=tuple(
            Row(
                cells=(
                    str(iteration),
                    "" if tokens is None else format_tokens(tokens),
                    f"{trained:.4f}",
                    f"{merged:.4f}",
                    f"{merged - trained:+.4f}",
                ),
                part=Part.AVERAGED,
            )
            for iteration, tokens, trained, merged in rows
        ),
        numbers=("iteration", "tokens", "trained", "forecast", "difference"),
    )


def _predictions(made: Forecast) -> list[Table]:
    """How far off the forecast was, where real annealing runs are known."""
    columns = ("left at", "by", "merged", "annealed", "error", "run")
    rows = tuple(
        Row(
            cells=(
                str(each.start_iteration),
                str(series),
                f"{each.merged:.4f}",
                f"{each.annealed:.4f}",
                f"{each.error:+.4f}",
                shown(each.source),
            )
        )
        for series in made.series[1:]
        for each in series.predictions
    )
    title = "Merged against real annealing runs, where they begin"
    numbers = ("left at", "merged", "annealed", "error")
    return [Table(title=title, columns=columns, rows=rows, numbers=numbers)] if rows else []
