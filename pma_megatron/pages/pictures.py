"""Figures as SVG elements that stand in a page: text as text, and nothing outside of it."""

from __future__ import annotations

import io
import itertools
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pma_megatron.pages.section import COLOURS, Part, shown
from pma_megatron.runs.tokens import format_tokens

_SETTINGS: Any = {
    "svg.fonttype": "none",  # text that can be searched and copied
    "svg.hashsalt": "pma",  # the same figure has the same names inside
    "text.parse_math": False,  # a name with two dollars is no formula
    "font.family": "sans-serif",
    "font.size": 9,
}
_NO_METADATA: Any = {"Date": None, "Creator": None, "Format": None, "Type": None}
_HEAD = re.compile(r"^.*?(?=<svg\b)", re.S)
_ID = re.compile(r'\bid="([^"<>&]*)"')
_SHARE = 0.6  # of the distance of two checkpoints, that a bar is wide
_MOST_NAMES = 20
_TEXT = "#20242a"


def svg_of(draw: Callable[[], Any], prefix: str) -> str:
    """What `draw` returns, a figure, as an SVG element.

    Args:
        draw: makes the figure.
        prefix: begins every name inside, so that pictures of one page do not share any.
    """
    import matplotlib
    from matplotlib.text import Text

    out = io.StringIO()
    with matplotlib.rc_context(_SETTINGS), warnings.catch_warnings():
        # Of letters that the font lacks: the browser has them, only their width is guessed here.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = draw()
        for each in figure.findobj(Text):
            each.set_text(shown(each.get_text()))
        figure.savefig(out, format="svg", metadata=_NO_METADATA, transparent=True)
    text = _HEAD.sub("", out.getvalue(), count=1)
    for name in {*_ID.findall(text)}:
        for before, after in (('id="', '"'), ('xlink:href="#', '"'), ("url(#", ")")):
            text = text.replace(f"{before}{name}{after}", f"{before}{prefix}{name}{after}")
    return text


def coefficients(
    positions: Sequence[float],
    values: Sequence[float],
    names: Sequence[str],
    left_out: Mapping[float, str],
    unit: str,
) -> Any:
    """A bar per checkpoint where it lies in the run, and a mark for what is left out.

    Args:
        positions: tokens or iterations, oldest first.
        values: coefficients.
        names: of the checkpoints.
        left_out: position -> name of what lies in the window and is not in the average.
        unit: of the positions.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    gaps = [b - a for a, b in itertools.pairwise(sorted({*positions, *left_out})) if b > a]
    width = _SHARE * (min(gaps) if gaps else 1.0)
    axes.bar(positions, values, width=width, color=COLOURS[Part.AVERAGED])
    for at, value, name in zip(positions, values, names, strict=True):
        if len(positions) <= _MOST_NAMES:
            _name(axes, name, at, max(value, 0.0))
    if left_out:
        axes.plot(
            [*left_out], [0.0] * len(left_out), "x", color=COLOURS[Part.LEFT_OUT], clip_on=False
        )
        for at, name in left_out.items():
            _name(axes, f"{name} left out", at, 0.0, COLOURS[Part.LEFT_OUT])
    axes.axhline(0, color=_TEXT, lw=0.8)
    axes.margins(y=0.15)
    axes.set_xlabel(unit)
    axes.set_ylabel("coefficient")
    if unit != "iteration":
        axes.xaxis.set_major_formatter(lambda value, _: format_tokens(round(value)))
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _name(axes: Any, name: str, at: float, height: float, colour: str = _TEXT) -> None:
    how = {"ha": "center", "va": "bottom", "fontsize": 7, "color": colour}
    axes.annotate(name, (at, height), xytext=(0, 4), textcoords="offset points", **how)


def stages(seconds: Mapping[str, float]) -> Any:
    """Wall time per stage, one bar under the other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.5 + 0.28 * len(seconds)), layout="constrained")
    axes = figure.subplots()
    names = [*seconds][::-1]
    bars = axes.barh(names, [seconds[name] for name in names], color="#4b5563", height=0.6)
    axes.bar_label(bars, [f" {seconds[name]:.2f} s" for name in names], fontsize=8)
    axes.margins(x=0.12)
    axes.set_xticks([])
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    return figure
