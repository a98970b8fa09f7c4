"""The quickstart's picture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_CONSTANT, _MERGED, _ANNEALED, _WEIGHTED = "#5b6573", "#d1495b", "#2a7f9e", "#6a2c8c"


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss along the run, with merges, the annealing run and both continuations."""
    figure, axes = pyplot.subplots(figsize=(9, 5.2), constrained_layout=True)
    per_iteration = result["tokens_per_iteration"] / 1e3
    window = result["window"]
    axes.axvspan(
        window[0] * per_iteration,
        window[-1] * per_iteration,
        color="#f3e3c3",
        alpha=0.5,
        lw=0,
        label=f"merge window: {len(window)} checkpoints",
    )
    for curve, style in _curves(result):
        axes.plot([i * per_iteration for i, _ in curve], [loss for _, loss in curve], **style)
    axes.set_title("Held-out loss of a tiny MoE GPT: constant rate, merged, annealed", loc="left")
    axes.set_xlabel("training tokens (thousands)")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _curves(result: dict[str, Any]) -> Iterator[tuple[list[tuple[int, float]], dict[str, Any]]]:
    """(iteration, loss) of each curve, and how it is drawn, in the order of the legend."""
    window, continued = result["window"], result["continued"]
    run = {"color": _CONSTANT, "lw": 1.6, "marker": "o", "ms": 3.5}
    hollow = {**run, "ls": "--", "mfc": "white"}
    yield result["curve"], dict(run, label="constant learning rate")
    yield continued["newest"], dict(hollow, label="... continued from the newest checkpoint")
    annealed = "annealing run (rate to 0 over the window)"
    yield result["annealed"], dict(run, color=_ANNEALED, marker="s", label=annealed)
    merged = f"merged: SMA of the last {len(window)}, and at earlier points"
    dotted = {"color": _MERGED, "lw": 1.0, "ls": ":", "marker": "D", "ms": 6}
    yield result["sma_along"], dict(dotted, label=merged)
    init = "PMA-init: continued from the merge"
    yield continued["sma"], dict(hollow, color=_MERGED, markevery=slice(1, None), label=init)
    triangle = {"color": _WEIGHTED, "ls": "", "marker": "^", "ms": 9, "mfc": "none", "mew": 1.6}
    weighted = f"merged: WMA of the last {len(window)}"
    yield [(window[-1], result["losses"]["wma"])], dict(triangle, label=weighted)
