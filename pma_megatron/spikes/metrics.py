"""Loss and gradient norm of a run, from the files that a team already has.

What Megatron-LM, DeepSpeed's PipelineEngine, torchtitan, OLMo-core, NeMo and transformers' Trainer
print, TensorBoard event files, CSV (a W&B export too), JSON lines and trainer_state.json, told
apart by content and name; text may be gzipped.
"""

from __future__ import annotations

import contextlib
import json
import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from pathlib import Path

from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.spelling import first_few, hint
from pma_megatron.errors import MetricsError
from pma_megatron.spikes.columns import has_iteration
from pma_megatron.spikes.readers import (
    MetricsPoint,
    Written,
    read_csv,
    read_jsonl,
    read_log,
    read_tensorboard,
    read_trainer_state,
)
from pma_megatron.spikes.textfiles import lines, not_printed, suffix
from pma_megatron.storage.paths import path_of

_EVENTS = "tfevents"
# A table in no order is told from a run that went back by how often its iterations fall, one of
# several writers by how many of them are there twice in a row.
_FALLS_PER_POINT = 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Overwritten:
    """A branch that was given up: the run went back, and logged its iterations again."""

    again: int
    """First iteration that was logged again."""
    points: tuple[MetricsPoint, ...]
    """As they were logged at first; strictly increasing iterations, at least one point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics:
    """One run, as it went in the end, and apart from it what restarts overwrote."""

    points: tuple[MetricsPoint, ...]
    """Strictly increasing iterations; at least one point."""
    overwritten: tuple[Overwritten, ...] = ()
    """Branches that were given up, in the order in which that was done."""
    notes: tuple[str, ...]
    """Sentences for people: gaps, restarts, duplicates, what was left out."""
    source: str
    """The path that was read."""


def read_metrics(
    path: str | Path | Sequence[str | Path],
    *,
    loss: str | None = None,
    grad_norm: str | None = None,
    batch_samples: int | None = None,
) -> Metrics:
    """Read the metrics at `path`: a log, a CSV or JSONL file, an event file, or a folder of these.

    Several paths are parts of one run, in the order in which they were written: what a later one
    says of an iteration counts.

    `loss` and `grad_norm` name the column, key or tag where the usual names are not used. Files of
    DeepSpeed's monitors (`Train/Samples/...`) count samples: `batch_samples` is how many an
    iteration takes. Where an iteration was written twice, the run was restarted: the later writing
    wins from there on.
    Raises MetricsError when the file cannot be read, has no loss, or several; UsageError when it
    needs tensorboard and that is not installed.
    """
    asked = [path] if isinstance(path, str | Path) else [*path]
    refuse_remote("metrics", *asked, stores=True)
    paths = [path_of(each) for each in asked]
    parts = [_part(each, loss, grad_norm, batch_samples) for each in paths]
    _refuse_overwritten(paths, parts)
    whole = parts[0]
    if parts[1:]:
        points, notes, over = _as_it_went([point for part in parts for point in part[0]])
        said = [note for part in parts for note in part[1]]
        whole = points, [*said, *notes], [*(each for part in parts for each in part[2]), *over]
    points, notes, over = whole
    return Metrics(
        points=points,
        overwritten=tuple(over),
        notes=(*notes, *_gaps(points)),
        source=", ".join(map(str, paths)),
    )


Part = tuple[tuple[MetricsPoint, ...], list[str], list[Overwritten]]
"""Points as they went in the end, what is to be said of them, and what was overwritten."""


def _part(path: Path, loss: str | None, grad_norm: str | None, batch_samples: int | None) -> Part:
    try:
        written = _read(path, loss, grad_norm)
    except OSError as error:
        raise MetricsError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not written.points:
        left_out = " ".join(written.notes) or "No rows."
        raise MetricsError(f"{path}: no point has an iteration and a loss. {left_out}")
    if written.in_samples:
        written = replace(written, points=_in_iterations(path, written.points, batch_samples))
    points, notes, over = _as_it_went(written.points)
    return points, [*written.notes, *notes], over


def _refuse_overwritten(paths: Sequence[Path], parts: Sequence[Part]) -> None:
    """A part of which nothing is left was given in the wrong place.

    Raises:
        MetricsError: a later one begins before it.
    """
    for (one, (points, *_)), (other, (later, *_)) in pairwise(zip(paths, parts, strict=True)):
        if later[0].iteration <= points[0].iteration:
            raise MetricsError(
                f"{other} begins at iteration {later[0].iteration}, {one} at "
                f"{points[0].iteration}, so nothing of the latter would be left: give them in the "
                "order in which they were written, or leave that one out"
            )


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
        return read_tensorboard(*_event_files(path), loss, grad_norm)
    if _EVENTS in path.name:
        return read_tensorboard({path.parent: [path]}, {}, loss, grad_norm)
    if path.exists() and not path.is_file():
        raise MetricsError(
            f"{path}: is a pipe or a device, and what comes out of it can be read once: write it "
            "to a file first; several files can be given one after another"
        )
    first = _first_line(path)
    if suffix(path) == ".json" or first.strip() == "{":
        found = read_trainer_state(path, loss, grad_norm)
        if found is not None:
            return found
    if suffix(path) in (".jsonl", ".ndjson"):
        return read_jsonl(path, loss, grad_norm)
    if _is_json_object(first):
        return _read_json_or_log(path, loss, grad_norm)
    if suffix(path) == ".csv" or ("," in first and has_iteration(first)):
        return read_csv(path, loss, grad_norm)
    return _read_log(path, loss, grad_norm)


def _read_json_or_log(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """JSON lines, or a log in which what a trainer printed comes after a line of JSON, or in it."""
    try:
        return read_jsonl(path, loss, grad_norm)
    except MetricsError:
        with contextlib.suppress(MetricsError):
            return _read_log(path, loss, grad_norm)
        raise


def _read_log(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    found = read_log(path, loss, grad_norm)
    return replace(found, notes=[*found.notes, *not_printed(path)])


Folders = dict[Path, list[Path]]
"""Folder -> event files in it."""


def _event_files(folder: Path) -> tuple[Folders, Folders]:
    """The event files in `folder` itself, and in its subfolders; these alone where it has none."""
    files = sorted(file for file in folder.rglob("*") if _EVENTS in file.name and file.is_file())
    found: Folders = {}
    for file in files:
        found.setdefault(file.parent, []).append(file)
    if not found:
        raise MetricsError(f"{folder}: no TensorBoard event file (*{_EVENTS}*) in this folder")
    own = found.pop(folder, None)
    return (found, {}) if own is None else ({folder: own}, found)


def _first_line(path: Path) -> str:
    return next((line for line in lines(path) if line.strip()), "")


def _is_json_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _as_it_went(written: Sequence[MetricsPoint]) -> Part:
    """Points in order, later writings first choice; and what was dropped."""
    falls = sum(later.iteration < point.iteration for point, later in pairwise(written))
    if falls > _FALLS_PER_POINT * len(written):
        return _sorted(written)
    again = {one.iteration for one, two in pairwise(written) if _again(one, two)}
    one_writer = len(again) - 1 <= _FALLS_PER_POINT * len(written)
    kept: list[MetricsPoint] = []
    over: list[Overwritten] = []
    repeated = 0
    for point in written:
        back = kept and (point.iteration < kept[-1].iteration or _again(kept[-1], point))
        if back and (one_writer or point.iteration < kept[-1].iteration):
            first = bisect_left(kept, point.iteration, key=lambda each: each.iteration)
            over.append(Overwritten(again=point.iteration, points=tuple(kept[first:])))
            del kept[first:]
        elif kept and point.iteration == kept[-1].iteration:
            kept.pop()
            repeated += 1
        kept.append(point)
    notes = []
    if over:
        dropped = sum(len(each.points) for each in over)
        notes.append(
            f"The run went back {len(over)} time(s), to iteration "
            f"{first_few([each.again for each in over], 5)}: "
            f"{dropped} overwritten point(s) left out."
        )
    if repeated:
        how = "alike" if one_writer else "by several writers; the later line counts"
        notes.append(f"{repeated} iteration(s) were written twice in a row, {how}.")
    return tuple(kept), notes, over


def _again(point: MetricsPoint, later: MetricsPoint) -> bool:
    """Whether one iteration was run again; what is alike was only written twice."""
    return later.iteration == point.iteration and not _alike(point, later)


def _alike(one: MetricsPoint, other: MetricsPoint) -> bool:
    same_loss = one.loss == other.loss or (math.isnan(one.loss) and math.isnan(other.loss))
    known = None not in (one.consumed_samples, other.consumed_samples)
    return same_loss and (not known or one.consumed_samples == other.consumed_samples)


def _sorted(written: Sequence[MetricsPoint]) -> Part:
    """Points of a table in no order; of rows that it has twice the later ones count."""
    last: dict[int, MetricsPoint] = {}
    earlier: dict[int, MetricsPoint] = {}
    for point in written:
        if point.iteration in last and not _alike(last[point.iteration], point):
            earlier[point.iteration] = _worse(
                last[point.iteration], earlier.get(point.iteration, last[point.iteration])
            )
        last[point.iteration] = point
    ordered = sorted(last)
    over: list[Overwritten] = []
    for twice, some in groupby(ordered, earlier.__contains__):
        if twice:
            branch = tuple(earlier[iteration] for iteration in some)
            over.append(Overwritten(again=branch[0].iteration, points=branch))
    again = len(written) - len(ordered)
    said = f" {again} iteration(s) were there twice; the later row counts." if again else ""
    notes = [f"The rows were in no order of iterations and were sorted.{said}"]
    return tuple(last[iteration] for iteration in ordered), notes, over


def _worse(one: MetricsPoint, other: MetricsPoint) -> MetricsPoint:
    return one if not one.loss <= other.loss else other


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
    return [f"{len(gaps)} gap(s) in points every {usual} iteration(s): {first_few(gaps, 5)}."]
