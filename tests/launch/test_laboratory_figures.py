"""Every plot of the laboratory, drawn from the rows that are kept: nothing is trained."""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

LAB = Path(__file__).parents[2] / "launch" / "experiments"
sys.path.insert(0, str(LAB))

import run  # noqa: E402
from lab import pages  # noqa: E402
from lab.experiment import Results  # noqa: E402
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.container import BarContainer, ErrorbarContainer  # noqa: E402

FOLDER = run.DOCS / "results"
KNOWN = {each.name: each for each in run.known() if pages.rows_file(FOLDER, each).exists()}


@pytest.fixture(scope="module")
def figures():
    """Name -> plot."""
    rows = {name: Results.read(pages.rows_file(FOLDER, each)) for name, each in KNOWN.items()}
    return {name: pages.drawn(each, rows[name].rows) for name, each in KNOWN.items()}


@pytest.mark.parametrize("name", KNOWN)
def test_numbers_have_intervals_and_legends_lie_outside(figures, name):
    figure = figures[name]
    for axes in figure.axes:
        assert axes.get_legend() is None, "a legend would cover data"
        if axes.get_subplotspec() is None or axes.get_label() == "<colorbar>" or axes.collections:
            without = [c for c in axes.containers if not _has_interval(c)]
            assert not without
            continue
        assert axes.containers and all(map(_has_interval, axes.containers))
    for legend in figure.legends:
        assert legend._outside_loc == "lower"


def _has_interval(container):
    if isinstance(container, BarContainer):
        return container.errorbar is not None
    return isinstance(container, ErrorbarContainer) and (container.has_xerr or container.has_yerr)


@pytest.mark.parametrize("name", KNOWN)
def test_axes_beside_each_other_that_show_the_same_have_one_scale(figures, name):
    limits = defaultdict(set)
    for axes in figures[name].axes:
        if axes.get_subplotspec() is not None and axes.get_ylabel():
            row = axes.get_subplotspec().rowspan.start
            limits[axes.get_ylabel(), row].add(axes.get_ylim())
    assert all(len(found) == 1 for found in limits.values()), limits


MEANINGS = {
    pages.NEWEST: {"newest", "single checkpoints", "members", "constant", "plain", "no average"},
    pages.MERGED: {"merged", "merges", "their mean", "sma", "repeated", "PMA"}
    | {"a window", "mean of an eighth of them"},
    pages.ANNEALED: {"annealed", "before the collapse"},
    pages.MODELS["dense"]: {"dense"},
    pages.MODELS["MoE"]: {"MoE"},
    pages.WHEN["early"]: {"early"},
    pages.WHEN["late"]: {"late"},
    pages.ONCE: {"once"},
    **{color: {name} for name, color in {**pages.METHOD_COLORS, **pages.JUDGED}.items()},
}
"""Colour -> what is drawn in it: labels up to a comma or colon. All others are of the one ramp."""


@pytest.fixture(scope="module")
def labelled(figures):
    """(plot, label, colour) of everything in a legend."""
    return [
        (name, label, _colour(handle))
        for name, figure in figures.items()
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    ]


def _colour(handle):
    if isinstance(handle, BarContainer):
        return to_hex(handle.patches[0].get_facecolor())
    if isinstance(handle, ErrorbarContainer):
        line, _, (bars, *_) = handle.lines
        return to_hex(bars.get_color()[0] if line is None else line.get_color())
    return to_hex(handle.get_color() if hasattr(handle, "get_color") else handle.get_facecolor())


def test_a_colour_means_the_same_on_every_plot(labelled):
    colours = defaultdict(lambda: defaultdict(set))
    for name, label, colour in labelled:
        colours[label][colour].add(name)
    several = {label: dict(found) for label, found in colours.items() if len(found) > 1}
    assert not several
    assert set(colours["newest"]) == {pages.NEWEST}
    assert set(colours["merged"]) == {pages.MERGED}
    assert set(colours["annealed"]) == {pages.ANNEALED}


def test_what_is_drawn_in_a_colour_of_its_own_is_one_thing(labelled):
    ramp = {pages._shade(at / 1000) for at in range(1001)}
    assert not ramp & set(MEANINGS)
    found = defaultdict(set)
    for _, label, colour in labelled:
        if colour not in ramp:
            found[colour].add(re.split("[,:]", label)[0])
    assert dict(found) == MEANINGS
