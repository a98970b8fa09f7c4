"""Loss and gradient norm of a run, from the files that a team already has.

Megatron-LM's log, that of DeepSpeed's PipelineEngine, TensorBoard event files, CSV (a W&B export
too) and JSON lines, told apart by content and name.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import hint
from pma_megatron.errors import MetricsError
from pma_megatron.spikes.readers import (
    MetricsPoint,
    Written,
    has_iteration,
    read_csv,
    read_jsonl,
    read_log,
    read_tensorboard,
)

_EVENTS = "tfevents"
# A table in no order is told from a run that went back by how often its iterations fall.
_FALLS_PER_POINT = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """One run, as it went in the end: what a restart overwrote is gone."""

    points: tuple[MetricsPoint, ...]
    """Strictly increasing iterations; at least one point."""
    notes: tuple[str, ...]
    """Sentences for people: gaps, restarts, duplicates, what was left out."""
    source: str
    """The path that was read."""


def read_metrics(
    path: str | Path,
    *,
    loss: str | None = None,
    grad_norm: str | None = None,
    batch_samples: int | None = None,
) -> Metrics:
    """Read the metrics at `path`: a log, a CSV or JSONL file, an event file, or a folder of these.

    `loss` and `grad_norm` name the column, key or tag where the usual names are not used. Files of
    DeepSpeed's monitors (`Train/Samples/...`) count samples: `batch_samples` is how many an
    iteration takes. Where an iteration was written twice, the run was restarted: the later writing
    wins from there on.
    Raises MetricsError when the file cannot be read, has no loss, or several; UsageError when it
    needs tensorboard and that is not installed.
    """
    refuse_remote("metrics", path)
    path = Path(path)
    try:
        written = _read(path, loss, grad_norm)
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not written.points:
        left_out = " ".join(written.notes) or "No rows."
        raise MetricsError(f"{path}: no point has an iteration and a loss. {left_out}")
    if written.in_samples:
        written = replace(written, points=_in_iterations(path, written.points, batch_samples))
    points, notes = _as_it_went(written)
    return Metrics(points=points, notes=(*written.notes, *notes, *_gaps(points)), source=str(path))


def _in_iterations(
    path: Path, points: list[MetricsPoint], batch_samples: int | None
) -> list[MetricsPoint]:
    """Points by iteration instead of by samples.

    Raises:
        MetricsError: no batch size, or one that does not fit.
    """
    if batch_samples is None:
        raise MetricsError(
            f"{path}: counts samples, as DeepSpeed's monitors do, and how many an iteration takes "
            "is not known, or not the same along the run. Give metrics by iteration, or the first "
            f"iteration that was off{hint('onset')}"
        )
    odd = next((point.iteration for point in points if point.iteration % batch_samples), None)
    if odd is not None:
        raise MetricsError(
            f"{path}: has a point at {odd} samples, no multiple of the {batch_samples} samples per "
            "iteration of the checkpoints: it is of another run, or its batch size changed. Give "
            f"the metrics of this run, or the first iteration that was off{hint('onset')}"
        )
    return [replace(point, iteration=point.iteration // batch_samples) for point in points]


def _read(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    if path.is_dir():
        return read_tensorboard(_event_files(path), loss, grad_norm)
    if _EVENTS in path.name:
        return read_tensorboard([path], loss, grad_norm)
    first = _first_line(path)
    if path.suffix in (".jsonl", ".ndjson") or _is_json_object(first):
        return read_jsonl(path, loss, grad_norm)
    if path.suffix == ".csv" or ("," in first and has_iteration(first)):
        return read_csv(path, loss, grad_norm)
    return read_log(path, loss, grad_norm)


def _event_files(folder: Path) -> list[Path]:
    """The event files of one run: those in `folder`, or in its only subfolder that has any."""
    files = sorted(file for file in folder.rglob("*") if _EVENTS in file.name and file.is_file())
    folders = sorted({file.parent for file in files})
    if not folders:
        raise MetricsError(f"{folder}: no TensorBoard event file (*{_EVENTS}*) in this folder")
    if folder in folders:
        folders = [folder]
    if len(folders) > 1:
        several = ", ".join(str(other) for other in folders[:10])
        raise MetricsError(f"{folder}: event files of several runs; give one of {several}")
    return [file for file in files if file.parent == folders[0]]


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return next((line for line in file if line.strip()), "")


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _as_it_went(written: Written) -> tuple[tuple[MetricsPoint, ...], list[str]]:
    """Points in order, later writings first choice; and what was dropped, in sentences."""
    falls = sum(later.iteration < point.iteration for point, later in pairwise(written.points))
    if falls > _FALLS_PER_POINT * len(written.points):
        by_iteration = {point.iteration: point for point in written.points}
        ordered = tuple(by_iteration[iteration] for iteration in sorted(by_iteration))
        twice = len(written.points) - len(ordered)
        again = f" {twice} iteration(s) were there twice; the later row counts." if twice else ""
        return ordered, [f"The rows were in no order of iterations and were sorted.{again}"]
    kept: list[MetricsPoint] = []
    restarts, repeated, dropped = [], 0, 0
    for point in written.points:
        if kept and point.iteration == kept[-1].iteration:
            kept.pop()
            repeated += 1
        elif kept and point.iteration < kept[-1].iteration:
            restarts.append(point.iteration)
            while kept and kept[-1].iteration >= point.iteration:
                kept.pop()
                dropped += 1
        kept.append(point)
    notes = []
    if restarts:
        notes.append(
            f"The run went back {len(restarts)} time(s), to iteration {_few(restarts)}: "
            f"{dropped} overwritten point(s) left out."
        )
    if repeated:
        notes.append(f"{repeated} iteration(s) were written twice in a row; the later one counts.")
    return tuple(kept), notes


def _gaps(points: tuple[MetricsPoint, ...]) -> list[str]:
    """A sentence about places where points are further apart than they usually are."""
    steps = [later.iteration - point.iteration for point, later in pairwise(points)]
    if not steps:
        return []
    usual = min(Counter(steps).most_common(), key=lambda item: (-item[1], item[0]))[0]
    gaps = [
        f"{point.iteration} to {later.iteration}"
        for point, later in pairwise(points)
        if later.iteration - point.iteration > usual
    ]
    if not gaps:
        return []
    return [f"{len(gaps)} gap(s) in points every {usual} iteration(s): {_few(gaps)}."]


def _few(things: list[int] | list[str]) -> str:
    return ", ".join(map(str, things[:5])) + (", ..." if len(things) > 5 else "")
