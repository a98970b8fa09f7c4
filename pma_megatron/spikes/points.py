"""Points of the rows of a table, whatever file it came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.errors import MetricsError
from pma_megatron.spikes import columns


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsPoint:
    """One logged iteration."""

    iteration: int
    loss: float
    """Nats; may be NaN or Inf. With `--log-interval k` the mean of k iterations."""
    grad_norm: float | None = None
    """Global norm before clipping; None where it was not logged."""
    consumed_samples: int | None = None


def of_rows(
    rows: Iterable[Mapping[str, Any]],
    step: str,
    loss: str,
    grad_norm: str | None,
    samples: str | None,
) -> tuple[list[MetricsPoint], list[str]]:
    """Points of a table, by the names of its columns; and what was left out.

    Many writers of JSON and CSV write NaN as null or as an empty cell. So rows at the end that have
    an iteration and such a loss are NaN, unless they are of an evaluation or of another run, or
    as many in a row were there before: then losses are not logged in each row.
    """
    points: list[MetricsPoint] = []
    left_out, evaluated, most = 0, 0, 0
    empty: list[MetricsPoint] = []
    for row in rows:
        if loss in row and columns.of_evaluation(row):
            evaluated += 1
            continue
        iteration, value = as_number(_done(row.get(step))), as_number(row.get(loss))
        is_empty = loss in row and columns.is_empty(row[loss])
        if iteration is None or not iteration.is_integer() or (value is None and not is_empty):
            left_out += 1
            continue
        if value is None and any(_is_of_other(str(key), row[key]) for key in row):
            left_out += 1
            continue
        consumed = as_number(row.get(samples)) if samples else None
        point = MetricsPoint(
            iteration=int(iteration),
            loss=math.nan if value is None else value,
            grad_norm=as_number(row.get(grad_norm)) if grad_norm else None,
            consumed_samples=int(consumed) if consumed and math.isfinite(consumed) else None,
        )
        if value is None:
            empty.append(point)
            continue
        left_out, most, empty = left_out + len(empty), max(most, len(empty)), []
        points.append(point)
    notes = []
    if empty and points and len(empty) > most and empty[-1].iteration > points[-1].iteration:
        points += empty
        notes.append(f"The loss of the last {len(empty)} row(s) is empty or null: read as NaN.")
    else:
        left_out += len(empty)
    if left_out:
        notes.append(f"{left_out} row(s) left out: no iteration or no loss.")
    if evaluated:
        notes.append(f"{evaluated} row(s) left out: they say that they are of an evaluation.")
    return points, notes


def joined_runs(
    path: Path, rows: Iterable[Mapping[str, Any]], names: Iterable[str], step: str, loss: str
) -> list[str]:
    """A note where a column says that rows are of several runs, which follow one another.

    Restarts of one run may have a name each. Rows of runs side by side are of several.

    Raises:
        MetricsError: they are side by side, or of one nothing would be left.
    """
    told = columns.named(names, columns.RUN)
    begun: dict[str, dict[str, int]] = {name: {} for name in told}
    now: dict[str, str] = {}
    for row in rows if told else ():
        at = as_number(_done(row.get(step)))
        if at is None or not at.is_integer() or as_number(row.get(loss)) is None:
            continue
        if columns.of_evaluation(row):
            continue
        for name in told:
            run = str(row.get(name, ""))
            first = begun[name].setdefault(run, int(at))
            before = begun[name].get(now.get(name, run), first)
            if run != now.get(name, run) and (first != int(at) or first <= before):
                raise MetricsError(
                    f"{path}: has rows of several runs, {columns.listed(begun[name])}, in its "
                    f"column {name!r}: give those of one run alone"
                )
            now[name] = run
    return [
        f"Rows of {len(runs)} runs ({name}: {columns.listed(runs)}) follow one another, as one "
        "that was restarted."
        for name, runs in begun.items()
        if len(runs) > 1
    ]


def _is_of_other(name: str, value: Any) -> bool:
    """Whether a cell has a number of an evaluation, of an epoch's mean, or of a run beside it."""
    other_loss = "loss" in name.lower() and ("epoch" in name or columns.run_of(name) is not None)
    return (other_loss or columns.says_evaluation(name)) and as_number(value) is not None


def as_number(value: Any) -> float | None:
    """A value as a number; None where it is none."""
    if value is None or isinstance(value, bool | list | dict):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _done(value: Any) -> Any:
    """`N` of `N/M`."""
    return value.partition("/")[0] if isinstance(value, str) else value
