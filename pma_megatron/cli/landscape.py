"""The picture of `pma geometry`; needs the `plots` extra (matplotlib)."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pma_megatron.geometry.gram import Measured
from pma_megatron.geometry.spread import Spread
from pma_megatron.megatron.contour import Contour
from pma_megatron.pages import charts
from pma_megatron.storage.paths import path_of

_MEMBER, _MEAN = "#1f4e79", "#c0392b"


def draw(measured: Measured, whole: Spread, over: Contour | None, path: Path) -> None:
    """Members as dots in the order of the run, their mean as a star, on contour lines of the loss.

    Args:
        measured: the checkpoints.
        whole: of all tensors.
        over: losses over the plane; None draws the members alone.
        path: its ending is the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.2), layout="constrained")
    axes = figure.subplots()
    members = whole.projections
    if over is not None:
        members, (name, losses) = over.members, next(iter(over.losses.items()))
        lines = axes.contourf(over.xs, over.ys, losses, levels=18, cmap="YlGnBu")
        axes.contour(over.xs, over.ys, losses, levels=18, colors="white", linewidths=0.5)
        figure.colorbar(lines, label=name)
    mean = np.asarray(measured.coefficients) @ members
    axes.plot(*members.T, "-o", color=_MEMBER, lw=1.0, ms=6, mec="white", label="checkpoints")
    axes.plot(*mean, "*", color=_MEAN, ms=16, mec="white", ls="", label="average")
    for ref, at in zip(measured.found.selection.refs, members, strict=True):
        name = str(ref.iteration or path_of(ref.path).name)
        axes.annotate(name, at, xytext=(5, 5), textcoords="offset points", fontsize=8)
    shares = (f"{100 * share:.0f}% of the variance" for share in whole.variance_shares)
    axes.set_xlabel(f"first principal direction, {next(shares)}")
    axes.set_ylabel(f"second, {next(shares)}")
    axes.legend(fontsize=8)
    charts.save(figure, path, dpi=80)
