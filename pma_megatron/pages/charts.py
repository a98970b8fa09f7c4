"""Losses as pictures; needs the `plots` extra (matplotlib)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import given
from pma_megatron.runs.tokens import format_tokens
from pma_megatron.runs.told_files import write_file
from pma_megatron.scores.forecast import Forecast
from pma_megatron.scores.grid import UNMERGED
from pma_megatron.scores.results import Score, Scores

_UNMERGED = "#5b6573"
_TOKENS = "training tokens"


def scored(scores: Scores, metric: str, path: Path) -> None:
    """Loss against tokens as a picture in a file; see `of_scores`."""
    save(of_scores(scores, metric), path)


def of_scores(scores: Scores, metric: str) -> Any:
    """Loss against tokens: the single checkpoints, and a line per method, N and V."""
    figure, axes = new_figure(scores, metric)
    for name, points in series(scores).items():
        unmerged = points[0].method == UNMERGED
        style = {"color": _UNMERGED, "lw": 2} if unmerged else {"lw": 1.2}
        xs = [position(scores, point.end_iteration) for point in points]
        axes.plot(xs, [p.losses[metric] for p in points], marker="o", ms=3, label=name, **style)
    axes.legend(frameon=False, fontsize=8)
    return figure


def forecasted(scores: Scores, made: Forecast, path: Path) -> None:
    """A forecast as a picture in a file; see `of_forecast`."""
    save(of_forecast(scores, made), path)


def of_forecast(scores: Scores, made: Forecast) -> Any:
    """Trained and merged loss along the run, and where real annealing runs ended."""
    figure, axes = new_figure(scores, made.metric)
    for number, each in enumerate(made.series):
        xs = [position(scores, iteration) for iteration in each.iterations]
        style = {"label": f"forecast: {each}", "color": f"C{number}", "lw": 1.2}
        if each.method == UNMERGED:
            style = {"label": "trained, constant LR", "color": _UNMERGED, "lw": 2}
        axes.plot(xs, each.merged, marker="o", ms=3, **style)
    trained = scores.unmerged(made.metric)
    for run in made.annealed:
        start = position(scores, run.start_iteration)
        known = run.tokens is not None and _unit(scores) == _TOKENS
        end = start + (run.tokens or 0) if known else start
        axes.plot([start, end], [trained[run.start_iteration], run.loss], "k:", lw=0.8)
        axes.plot(end, run.loss, "k*", ms=9)
    if made.annealed:
        axes.plot([], [], "k*:", label="annealed, from the start of its decay")
    axes.legend(frameon=False, fontsize=8)
    return figure


def series(scores: Scores) -> dict[str, list[Score]]:
    """Points by what stays the same along the run, in the order of the ends."""
    found: dict[str, list[Score]] = {}
    for point in scores.points:
        found.setdefault(str(point), []).append(point)
    return found


def new_figure(scores: Scores, metric: str) -> tuple[Any, Any]:
    """A figure with its axes named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_unit(scores))
    if _unit(scores) == _TOKENS:
        axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def position(scores: Scores, iteration: int) -> float:
    """Where an iteration lies on the x axis."""
    tokens = scores.tokens[iteration]
    return iteration if tokens is None or _unit(scores) != _TOKENS else tokens


def save(figure: Any, path: Path, dpi: int = 110) -> None:
    """Write the figure, its format by the name's ending.

    Raises:
        UsageError: it cannot be written.
    """
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi, format=path.suffix.removeprefix("."))
    write_file(given("plot", path), path, drawn.getvalue())


def _unit(scores: Scores) -> str:
    known: Sequence[int | None] = tuple(scores.tokens.values())
    return "iteration" if None in known else _TOKENS
