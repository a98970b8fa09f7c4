"""The results page and its plots, from the rows of the experiments and nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lab.experiment import Experiment, Results, Row
from lab.stats import Estimate

NEWEST, MERGED, ANNEALED = "#5b6573", "#d1495b", "#2a7f9e"
"""A checkpoint as it was trained, an average, the end of a decay: on every plot."""
MODELS = {"dense": "#8a5fa8", "MoE": "#3d8b5f"}
WHEN = {"early": "#e0a030", "late": "#a8552a"}
METHOD_COLORS = {"linear": "#8fa0e6", "cosine": "#4f62c4", "1-sqrt": "#232f7a"}
ONCE = "#8c8f1f"
"""One start from an average, where others are never or always made."""
JUDGED = {
    "judged rightly": "#1c1c1c",
    "harm that was not warned of": "#00a6a6",
    "false warnings": "#9bbf30",
}
"""What becomes of warnings."""
_RAMP = ("#f3b6cf", "#d45b98", "#7a1f5c", "#2c0a2b")
_HEAD = Path(__file__).with_name("head.md")


def shades(count: int) -> list[str]:
    """Colours of a quantity that grows, or of settings that have none of their own."""
    return [_shade(at / max(1, count - 1)) for at in range(count)]


def rate_color(rate: float) -> str:
    """Colour of a learning rate from 0.0002 to 0.005, whatever others stand beside it."""
    return _shade(math.log(rate / 0.0002) / math.log(0.005 / 0.0002))


def _shade(part: float) -> str:
    return to_hex(LinearSegmentedColormap.from_list("settings", _RAMP)(part))


def curve(axes: Any, points: Mapping[Any, Estimate], **style: Any) -> None:
    """Means with their intervals over the keys of `points`."""
    found = list(points.values())
    axes.errorbar(
        list(points),
        [e.mean for e in found],
        [e.margin or 0 for e in found],
        **{"marker": "o", "ms": 4, **style},
    )


def zero(axes: Any) -> None:
    """The line on which nothing is gained."""
    axes.axhline(0, color=NEWEST, lw=0.8)


def page(experiments: Sequence[Experiment], folder: Path) -> str:
    """The whole page, of the experiments whose rows are in `folder`."""
    known = [
        (e, Results.read(rows_file(folder, e)))
        for e in experiments
        if rows_file(folder, e).exists()
    ]
    took_s = sum(results.about["work"]["s"] for _, results in known)
    lines = [
        _HEAD.read_text().format(minutes=round(took_s / 60)),
        "| | claimed by the paper, or by others since | verdict |",
        "|---|---|---|",
    ]
    for experiment, results in known:
        verdict = experiment.findings(results.rows).verdict
        link = experiment.title.lower().translate({ord(c): None for c in ",.?:()'"})
        anchor = f"[{experiment.title}](#{link.replace(' ', '-')})"
        lines.append(f"| {anchor} | {experiment.paper} | {verdict} |")
    lines += [section(experiment, results) for experiment, results in known]
    return "\n".join(lines) + "\n"


def section(experiment: Experiment, results: Results) -> str:
    """One experiment."""
    findings, about = experiment.findings(results.rows), results.about
    parts = [
        f"\n## {experiment.title}",
        f"**Claimed:** {experiment.paper}",
        f"**Here:** {experiment.setup} Scale `{about['scale']}`, {about['seeds']} seeds.",
        f"**Verdict: {findings.verdict}.** " + " ".join(findings.sentences),
        *(table.markdown() for table in findings.tables),
        f"![{experiment.title}](results/{experiment.name}.png)",
        f"`{about['command']}` ({about['versions']}; {_work(about['work'])}{_text(about)}"
        f"{_cards(about)})",
        *(
            ["Averages by commands such as", *(f"`{line}`" for line in about["pma"])]
            if about["pma"]
            else []
        ),
    ]
    return "\n\n".join(parts)


def _text(about: Row) -> str:
    """Which text it is of, where that was noted."""
    return f"; text {about['text']}" if "text" in about else ""


def _cards(about: Row) -> str:
    """What was trained on, where it is not the CPU."""
    cards = [name for name in about.get("devices", ()) if name != "CPU"]
    return f"; trained on {', '.join(cards)}" if cards else ""


def _work(done: Mapping[str, Any]) -> str:
    cores = f"{done['cores']} core" + ("s" if done["cores"] > 1 else "")
    return f"{done['jobs']} runs and scores in {done['s'] / 60:.1f} minutes on {cores}"


def rows_file(folder: Path, experiment: Experiment) -> Path:
    """Where the rows of an experiment are kept."""
    return folder / f"{experiment.name}.jsonl"


def draw(experiment: Experiment, results: Results, folder: Path) -> None:
    """The plot of an experiment, beside its rows."""
    drawn(experiment, results.rows).savefig(folder / f"{experiment.name}.png", dpi=90)


def drawn(experiment: Experiment, rows: Sequence[Row]) -> Figure:
    """The plot of an experiment: legend outside, one scale per row of axes."""
    figure = Figure(figsize=(9, 4.0), layout="constrained")
    experiment.plot(rows, figure)
    for axes in figure.axes:
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if "tokens" in axes.get_xlabel():
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(EngFormatter(sep=""))
    _same_scales(figure.axes)
    labelled = (axes.get_legend_handles_labels() for axes in figure.axes)
    named = {name: it for them, names in labelled for it, name in zip(them, names, strict=True)}
    if named:
        figure.legend(
            list(named.values()),
            list(named),
            loc="outside lower center",
            ncols=min(4, len(named)),
            frameon=False,
            handlelength=3.5,  # in which dashes are seen
            fontsize=8,
        )
    return figure


def _same_scales(axes: Sequence[Any]) -> None:
    """Axes of one row that show the same quantity show the same range of it."""
    for name in ("x", "y"):
        alike: dict[tuple[Any, ...], list[Any]] = {}
        for each in axes:
            label = getattr(each, f"get_{name}label")()
            place = each.get_subplotspec()
            if label and place is not None:
                alike.setdefault((label, place.rowspan.start), []).append(each)
        for found in alike.values():
            limits = [getattr(each, f"get_{name}lim")() for each in found]
            low, high = min(min(pair) for pair in limits), max(max(pair) for pair in limits)
            for each, (start, end) in zip(found, limits, strict=True):
                turned = start > end
                getattr(each, f"set_{name}lim")(*((high, low) if turned else (low, high)))
