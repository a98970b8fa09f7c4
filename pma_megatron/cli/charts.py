"""Losses as pictures; needs the `plots` extra (matplotlib)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pma_megatron.grid import UNMERGED
from pma_megatron.scores import Score, Scores
from pma_megatron.tokens import format_tokens

_UNMERGED = "#5b6573"


def scored(scores: Scores, metric: str, path: Path) -> None:
    """Loss against tokens: the single checkpoints, and a line per method, N and V."""
    figure, axes = new_figure(scores, metric)
    for name, points in series(scores).items():
        unmerged = points[0].method == UNMERGED
        style = {"color": _UNMERGED, "lw": 2} if unmerged else {"lw": 1.2}
        xs = [position(scores, point.end_iteration) for point in points]
        axes.plot(xs, [p.losses[metric] for p in points], marker="o", ms=3, label=name, **style)
    save(figure, axes, path)


def series(scores: Scores) -> dict[str, list[Score]]:
    """Points by what stays the same along the run, in the order of the ends."""
    found: dict[str, list[Score]] = {}
    for point in scores.points:
        method, last, tokens, iterations = point.series
        spacing = f" V={format_tokens(tokens)}" if tokens else (
            f" V={iterations} it" if iterations else "")  # fmt: skip
        name = UNMERGED if method == UNMERGED else f"{method} N={last}{spacing}"
        found.setdefault(name, []).append(point)
    return found


def new_figure(scores: Scores, metric: str) -> tuple[Any, Any]:
    """A figure with its axes named."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(_unit(scores))
    axes.set_ylabel(metric)
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def position(scores: Scores, iteration: int) -> float:
    """Where an iteration lies on the x axis."""
    tokens = scores.tokens[iteration]
    return iteration if tokens is None or _unit(scores) == "iteration" else tokens


def save(figure: Any, axes: Any, path: Path) -> None:
    """Write the figure, its format by the name's ending."""
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def _unit(scores: Scores) -> str:
    known: Sequence[int | None] = tuple(scores.tokens.values())
    return "iteration" if None in known else "training tokens"
