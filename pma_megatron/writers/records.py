"""What is written of scores, forecasts, merges, recoveries and watches: numbers by iteration.

A tag begins with `pma/`, so that viewers show all of them in one group and none takes the place of
a curve of the run's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pma_megatron.merging.report import MergeReport
from pma_megatron.scores.forecast import Forecast
from pma_megatron.scores.grid import UNMERGED
from pma_megatron.scores.results import Scores
from pma_megatron.spikes.recovery import Diagnosis

GROUP = "pma"


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """What is known at one iteration.

    Attributes:
        iteration: of the run.
        values: numbers by tag.
    """

    iteration: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """A text at one iteration; `tag` as of numbers."""

    tag: str
    iteration: int
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """What one command has to say.

    Attributes:
        rows: one per iteration, oldest first.
        notes: in the order in which they are to be read.
    """

    rows: tuple[Row, ...] = ()
    notes: tuple[Note, ...] = field(default=())


def of_scores(scores: Scores) -> Records:
    """A curve per way to average, and one of what it gains, at the iterations where averages end.

    Losses of checkpoints outside the run have no iteration of it, and are not among them.
    """
    found: dict[int, dict[str, float]] = {}
    for point in scores.points:
        values = found.setdefault(point.end_iteration, {})
        for metric, loss in point.losses.items():
            values[tag(metric, str(point))] = loss
            if point.method != UNMERGED:
                values[tag(f"{metric} minus unmerged", str(point))] = scores.gain(point, metric)
        tokens = scores.tokens[point.end_iteration]
        if tokens is not None:
            values[tag("consumed tokens")] = tokens
    return Records(rows=_rows(found))


def of_forecast(scores: Scores, made: Forecast) -> Records:
    """The scores; what real annealing runs reached and how far off the forecast was, each at the
    iteration that they left the run at; and what speaks against the forecast."""
    found = {row.iteration: dict(row.values) for row in of_scores(scores).rows}
    for run in made.annealed:
        found.setdefault(run.start_iteration, {})[tag(f"{made.metric} annealed")] = run.loss
    cautions = []
    for series in made.series[1:]:
        for each in series.predictions:
            name = tag(f"{made.metric} forecast error", str(series))
            found.setdefault(each.start_iteration, {})[name] = each.error
        cautions += [f"{series}: {text}" for text in series.cautions]
    newest = max(found, default=0)
    text = "\n\n".join(cautions) or "nothing speaks against this forecast"
    return Records(rows=_rows(found), notes=(_note("forecast", newest, text),))


def of_merge(report: MergeReport) -> Records:
    """What a merge read and took, at its iteration, and how training goes on from it."""
    iteration = report.plan["iteration"] or 0
    values = {
        tag("merge", "checkpoints"): len(report.plan["sources"]),
        tag("merge", "seconds"): sum(report.seconds.values()),
        **{tag("merge", f"bytes {name}"): count for name, count in report.bytes.items()},
    }
    lines = [f"published {folder}" for folder in report.published]
    lines += [f"resume with {how}" for how in report.resume]
    return Records(
        rows=_rows({iteration: values}), notes=(_note("merge", iteration, "\n\n".join(lines)),)
    )


def of_recovery(found: Diagnosis) -> Records:
    """Where the run went wrong, what it goes back to, and the command that makes it go on."""
    chosen = [ref.iteration or 0 for ref in found.healthy.selection.refs]
    rows: dict[int, dict[str, float]] = {}
    for verdict in found.verdicts:
        name = tag("spike", verdict.kind.value)
        rows.setdefault(verdict.onset, {})[name] = verdict.peak - verdict.baseline
    rows.setdefault(found.onset, {}).update(
        {
            tag("recovery", "onset"): found.onset,
            tag("recovery", "newest checkpoint used"): chosen[-1],
            tag("recovery", "checkpoints"): len(chosen),
        }
    )
    lines = [f"{v.kind.value} from iteration {v.onset}: {v.reason}" for v in found.verdicts]
    lines += [f"goes back to iterations {', '.join(map(str, chosen))}"]
    lines += [f"resume with {found.resume.spelled()}"]
    lines += [*found.notes, *found.healthy.notes, *found.resume.notes]
    return Records(rows=_rows(rows), notes=(_note("recovery", found.onset, "\n\n".join(lines)),))


def of_event(kind: str, event: Mapping[str, Any], iteration: int) -> Records:
    """An event of a watch, or of a recovery in training.

    Args:
        kind: `watch` or `recovery`.
        event: its fields; `event` says which.
        iteration: where it belongs.
    """
    values = {
        tag(kind, str(name)): float(value)
        for name, value in event.items()
        if name in _SHOWN and isinstance(value, (int, float)) and not isinstance(value, bool)
    }
    sources = event.get("sources")
    if sources:
        values[tag(kind, "checkpoints")] = len(sources)
    text = str(event.get("text") or event.get("reason") or "")
    note = _note(kind, iteration, f"{event['event']}: {text}" if text else str(event["event"]))
    return Records(rows=_rows({iteration: values} if values else {}), notes=(note,))


_SHOWN = ("seconds", "code", "number", "onset", "attempt", "newest_healthy")
"""Numbers of events that make a curve."""


def tag(*parts: str) -> str:
    """A tag of ours.

    >>> tag("lm loss", "sma N=6")
    'pma/lm loss/sma N=6'
    """
    return "/".join((GROUP, *parts))


def _note(name: str, iteration: int, text: str) -> Note:
    return Note(tag=tag(name), iteration=iteration, text=text)


def _rows(found: Mapping[int, Mapping[str, float]]) -> tuple[Row, ...]:
    ordered: Iterable[tuple[int, Mapping[str, float]]] = sorted(found.items())
    return tuple(Row(iteration=at, values=values) for at, values in ordered)
