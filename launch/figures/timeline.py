"""Draws what this package does: checkpoints of a run, their average, and what is done with it.

    python launch/figures/timeline.py [FILE.svg]            # default: docs/img/timeline.svg

The same matplotlib draws the same bytes; tests/test_docs.py compares them with what is committed.
The curve is a sketch, not a measurement: it has no scale.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

COMMITTED = Path(__file__).parents[2] / "docs" / "img" / "timeline.svg"
_RUN, _AVERAGE, _TEXT, _WINDOW = "#5b6573", "#d1495b", "#2b2f36", "#f3e3c3"
_BEFORE, _WINDOWED = (1.7, 2.8), (3.9, 5.0, 6.1, 7.2)
_CENTRE = (5.55, 0.55)  # where the average is drawn


def loss(at: float | np.ndarray) -> np.ndarray:
    """A loss that falls, with the noise of a constant learning rate."""
    return 1.75 + 1.6 * np.exp(-1.1 * np.asarray(at)) + 0.03 * np.sin(9 * np.asarray(at))


def draw(path: Path) -> None:
    """Write the picture to `path` as SVG, with text as outlines."""
    style = {"svg.hashsalt": "pma", "svg.fonttype": "path", "font.family": "DejaVu Sans"}
    with matplotlib.rc_context(style):
        figure, axes = pyplot.subplots(figsize=(10, 3.3))
        figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
        figure.patch.set_facecolor("white")
        axes.set(xlim=(0, 10.9), ylim=(0, 3.1))
        axes.set_axis_off()
        _run(axes)
        _average(axes)
        figure.savefig(path, format="svg", metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def _run(axes: Axes) -> None:
    left, width = _WINDOWED[0] - 0.45, _WINDOWED[-1] - _WINDOWED[0] + 0.9
    axes.add_patch(Rectangle((left, 1.5), width, 1.0, color=_WINDOW, alpha=0.7, lw=0))
    along = np.linspace(0.4, 9.2, 600)
    trained = along <= _WINDOWED[-1]
    axes.plot(along[trained], loss(along[trained]), color=_RUN, lw=1.8)
    axes.plot(along[~trained], loss(along[~trained]), color=_RUN, lw=1.2, ls=(0, (3, 3)))
    for at in (*_BEFORE, *_WINDOWED):
        fill = "white" if at in _BEFORE else _RUN
        axes.plot(at, loss(at), "o", ms=9, mfc=fill, mec=_RUN, mew=1.8)
    middle = left + width / 2
    axes.text(0.75, 2.62, "loss of one run", color=_RUN, fontsize=11)
    axes.text(middle, 2.62, "constant learning rate", color=_RUN, fontsize=11, ha="center")
    axes.text(
        middle,
        2.15,
        "the last N checkpoints, V tokens apart",
        color=_TEXT,
        fontsize=11,
        ha="center",
    )
    axes.text(9.35, float(loss(9.2)), "training goes on", color=_RUN, fontsize=10, va="center")


def _average(axes: Axes) -> None:
    for at in _WINDOWED:
        start = (at, float(loss(at)))
        axes.annotate("", xy=_CENTRE, xytext=start, arrowprops=_arrow(shrinkA=9, shrinkB=12))
    axes.plot(*_CENTRE, "D", ms=13, color=_AVERAGE)
    axes.text(
        _CENTRE[0] - 0.4,
        _CENTRE[1] - 0.12,
        "their average",
        color=_AVERAGE,
        fontsize=12,
        ha="right",
        va="center",
        weight="bold",
    )
    for height, text in ((0.95, "resume training from it"), (0.25, "evaluate it, or forecast")):
        axes.annotate("", xy=(7.7, height), xytext=_CENTRE, arrowprops=_arrow(shrinkA=12))
        axes.text(7.85, height, text, color=_TEXT, fontsize=11, va="center")


def _arrow(**ends: float) -> dict[str, Any]:
    return {"arrowstyle": "-|>", "color": _AVERAGE, "lw": 1.3, **ends}


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if sys.argv[1:] else COMMITTED)
