"""The results page and its plots, from the rows of the experiments and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from lab.experiment import Experiment, Results
from lab.stats import Estimate

COLORS = ("#5b6573", "#d1495b", "#2a7f9e", "#e0a030", "#3d8b5f", "#8a5fa8")
_HEAD = Path(__file__).with_name("head.md")


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
    axes.axhline(0, color=COLORS[0], lw=0.8)


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
        "| | the paper | verdict |",
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
        f"**The paper:** {experiment.paper}",
        f"**Here:** {experiment.setup} Scale `{about['scale']}`, {about['seeds']} seeds.",
        f"**Verdict: {findings.verdict}.** " + " ".join(findings.sentences),
        *(table.markdown() for table in findings.tables),
        f"![{experiment.title}](results/{experiment.name}.png)",
        f"`{about['command']}` ({about['versions']}; {_work(about['work'])})",
        *(
            ["Averages by commands such as", *(f"`{line}`" for line in about["pma"])]
            if about["pma"]
            else []
        ),
    ]
    return "\n\n".join(parts)


def _work(done: Mapping[str, Any]) -> str:
    return (
        f"{done['jobs']} runs and scores in {done['s'] / 60:.1f} minutes on {done['cores']} cores"
    )


def rows_file(folder: Path, experiment: Experiment) -> Path:
    """Where the rows of an experiment are kept."""
    return folder / f"{experiment.name}.jsonl"


def draw(experiment: Experiment, results: Results, folder: Path) -> None:
    """The plot of an experiment, beside its rows."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    experiment.plot(results.rows, figure)
    for axes in figure.axes:
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if "tokens" in axes.get_xlabel():
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_minor_formatter(EngFormatter(sep=""))
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=8)
    figure.savefig(folder / f"{experiment.name}.png", dpi=90)
