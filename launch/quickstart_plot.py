"""The quickstart's picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

_CONSTANT, _MERGED, _ANNEALED = "#5b6573", "#d1495b", "#2a7f9e"


def plot(result: dict[str, Any], path: Path) -> None:
    """Held-out loss along the run, with merges, the annealing run and both continuations."""
    figure, axes = pyplot.subplots(figsize=(9, 5.2), constrained_layout=True)
    per_iteration = result["tokens_per_iteration"] / 1e3
    window = result["window"]

    def line(curve: list[tuple[int, float]], **style: Any) -> None:
        axes.plot([i * per_iteration for i, _ in curve], [loss for _, loss in curve], **style)

    axes.axvspan(
        window[0] * per_iteration,
        window[-1] * per_iteration,
        color="#f3e3c3",
        alpha=0.5,
        lw=0,
        label=f"merge window: {len(window)} checkpoints",
    )
    line(
        result["curve"], color=_CONSTANT, lw=1.6, marker="o", ms=3.5, label="constant learning rate"
    )
    line(
        result["continued"]["newest"],
        color=_CONSTANT,
        lw=1.6,
        ls="--",
        marker="o",
        ms=3.5,
        mfc="white",
        label="... continued from the newest checkpoint",
    )
    line(
        result["annealed"],
        color=_ANNEALED,
        lw=1.6,
        marker="s",
        ms=3.5,
        label="annealing run (rate to 0 over the window)",
    )
    line(
        result["sma_along"],
        color=_MERGED,
        lw=1.0,
        ls=":",
        marker="D",
        ms=6,
        label=f"merged: SMA of the last {len(window)}, and at earlier points",
    )
    line(
        result["continued"]["sma"],
        color=_MERGED,
        lw=1.6,
        ls="--",
        marker="o",
        ms=3.5,
        mfc="white",
        markevery=slice(1, None),
        label="PMA-init: continued from the merge",
    )
    axes.plot(
        window[-1] * per_iteration,
        result["losses"]["wma"],
        "^",
        ms=9,
        mfc="none",
        mew=1.6,
        color="#6a2c8c",
        label=f"merged: WMA of the last {len(window)}",
    )
    axes.set_title("Held-out loss of a tiny MoE GPT: constant rate, merged, annealed", loc="left")
    axes.set_xlabel("training tokens (thousands)")
    axes.set_ylabel("held-out loss (nats per byte)")
    axes.grid(alpha=0.25, lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
