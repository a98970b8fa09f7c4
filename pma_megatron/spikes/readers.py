"""The points of each kind of metrics file, in the order in which they were written.

Nothing is sorted or judged here; `metrics.read_metrics` does that.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.base.spelling import first_few
from pma_megatron.errors import MetricsError, UsageError
from pma_megatron.spikes import columns, consoles, textfiles
from pma_megatron.spikes.points import MetricsPoint, as_number, joined_runs, of_rows
from pma_megatron.storage.paths import content_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a file holds: its points as written, and sentences about what was left out."""

    points: list[MetricsPoint]
    notes: list[str]
    in_samples: bool = False
    """Whether `MetricsPoint.iteration` counts samples, as in the files of DeepSpeed's monitors."""


# Of a line's fields only what may be of use is kept: a long run has millions of lines.
_LOG_KEYS = re.compile(r"loss|norm|consumed samples|number of (skipped|nan) iterations")
_FIELD = re.compile(r"(?<![\w./-])([A-Za-z][\w./-]*)['\"]?\s*[:=]")
_LOOKED_AT = 1000  # lines of a file that is not understood
_LOG_START = re.compile(r"(?<!, )iteration\s+(\d{1,15})/\s*\d+\s*\|")
# deepspeed/runtime/pipe/engine.py, `train_batch`
_PIPELINE = re.compile(r"steps: (\d{1,15}) loss: (\S+) (?=[^:]*iter time \(s\): )")


def read_log(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """Points of Megatron-LM's training lines (`training_log`), whatever stands between them.

    Without any, points of the lines that DeepSpeed's PipelineEngine prints, or of `consoles`.

    A line has `iteration N/ M | key: value | ...` after any prefix. Megatron leaves out a loss that
    is not above 0 (below 0 from core 0.19 on), so a complete line without one had NaN, unless its
    iterations were skipped for the loss scale.
    """
    lines = [fields for text in textfiles.printed(path) for fields in _log_lines(text)]
    if not lines:
        points = _pipeline_points(path)
        return Written(points=points, notes=[]) if points else _read_console(path, loss, grad_norm)
    named = dict.fromkeys(key for fields in lines for key in fields)
    losses = [key for key in named if "loss" in key and key != "loss scale"]
    key = loss or ("lm loss" if "lm loss" in named or not losses else None)
    if key is None and len(losses) > 1:
        raise columns.ambiguous(path, "loss", losses)
    key = key or losses[0]
    if loss is not None and loss not in named:
        raise columns.missing(path, "loss", loss, named)
    if grad_norm is not None and grad_norm not in named:
        raise columns.missing(path, "grad_norm", grad_norm, named)

    points, skipped, torn = [], 0, 0
    for fields in lines:
        value = _log_loss(fields, key)
        if value is None:
            complete = "number of nan iterations" in fields
            skipped, torn = skipped + complete, torn + (not complete)
            continue
        samples = fields.get("consumed samples", math.nan)
        points.append(
            MetricsPoint(
                iteration=int(fields["iteration"]),
                loss=value,
                grad_norm=fields.get(grad_norm or "grad norm"),
                consumed_samples=int(samples) if math.isfinite(samples) else None,
            )
        )
    notes = [] if loss or key == "lm loss" else [f"The loss is {key!r}; there is no 'lm loss'."]
    if skipped:
        notes.append(f"{skipped} line(s) left out: Megatron skipped all their iterations.")
    if torn:
        notes.append(f"{torn} line(s) left out: cut off before their loss.")
    return Written(points=points, notes=notes)


def _pipeline_points(path: Path) -> list[MetricsPoint]:
    matches = (_PIPELINE.search(text) for text in textfiles.printed(path) if "steps: " in text)
    found = [(int(m[1]), as_number(m[2])) for m in matches if m]
    return [MetricsPoint(iteration=step, loss=loss) for step, loss in found if loss is not None]


def _read_console(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """Points of what other trainers print."""
    for form in consoles.FORMS:

        def rows(form: Callable[..., Iterator[Mapping[str, Any]]] = form) -> Any:
            return form(textfiles.printed(path))

        first = next(iter(rows()), None)
        if first is None:
            continue
        if form is consoles.trainer_rows and not any(consoles.STEP in row for row in rows()):
            raise MetricsError(
                f"{path}: the dictionaries of transformers' Trainer say epochs and no steps (they "
                f"have {columns.listed(first)}), and no progress bar (`N/M [`) follows them. Give "
                "trainer_state.json of the newest checkpoint, which has both"
            )
        return _read_table(path, rows, loss, grad_norm)
    seen = (
        name
        for text in itertools.islice(textfiles.printed(path), _LOOKED_AT)
        for name in _keys(text)
    )
    raise MetricsError(
        f"{path}: no line has an iteration and a loss as Megatron (`iteration N/ M | ... |`), "
        "DeepSpeed's PipelineEngine (`steps: N loss: X iter time ...`), torchtitan, OLMo-core, "
        "NeMo or transformers' Trainer print them (`step N/M ... loss: X`), and it is no CSV with "
        "a header, JSON lines or trainer_state.json. What looks like fields at its beginning: "
        f"{columns.listed(dict.fromkeys(seen)) or 'nothing'}"
    )


def _keys(text: str) -> list[str]:
    return [key.strip() for key in _FIELD.findall(text)]


def _log_lines(text: str) -> Iterator[dict[str, float]]:
    starts = [*_LOG_START.finditer(text)]
    for start, end in itertools.zip_longest(starts, starts[1:]):
        rest = text[start.end() : end.start() if end else len(text)]
        fields = {"iteration": float(start[1])}
        # What no bar ends was cut off.
        for part in rest.split("|")[:-1]:
            key, _, value = part.rpartition(":")
            number = as_number(value) if _LOG_KEYS.search(key) else None
            if number is not None:
                fields[sys.intern(key.strip())] = number
        yield fields


def _log_loss(fields: Mapping[str, float], key: str) -> float | None:
    """The loss of one line; None where it has none because nothing was trained, or was cut off."""
    value = fields.get(key)
    skipped = fields.get("number of skipped iterations", 0)
    if value is not None and not (value == 0 and skipped):
        return value
    if "number of nan iterations" not in fields:
        return None
    return math.nan if fields["number of nan iterations"] or not skipped else None


def read_csv(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """Points of a CSV file with a header, such as a W&B or TensorBoard export."""

    def rows() -> Iterator[Mapping[str, Any]]:
        with contextlib.closing(textfiles.lines(path, newline="")) as text:
            try:
                table = csv.DictReader(_whole(text))
                header = [*(table.fieldnames or [])]
                table.fieldnames = columns.unlike(header)
                for row in table:
                    yield {key: value for key, value in row.items() if value is not None}
            except csv.Error as error:
                raise MetricsError(f"{path}: is not CSV ({error})") from error

    return _read_table(path, rows, loss, grad_norm)


def _whole(lines: Iterable[str]) -> Iterator[str]:
    """Lines of CSV without one that was cut off, or is being written, before its last cell."""
    for line in lines:
        if not line.endswith(","):
            yield line.replace("\0", "")


def read_jsonl(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """Points of a file with one JSON object per line."""

    def rows() -> Iterator[Mapping[str, Any]]:
        for line in textfiles.lines(path):
            try:
                row = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                row = {}
            yield row if isinstance(row, dict) else {}

    return _read_table(path, rows, loss, grad_norm)


def read_trainer_state(path: Path, loss: str | None, grad_norm: str | None) -> Written | None:
    """Points of `trainer_state.json` of transformers' Trainer; None where it is no such file."""
    try:
        history = json.loads("".join(textfiles.lines(path)))["log_history"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    if not rows:
        raise MetricsError(f"{path}: its log_history is empty; log a loss (logging_steps)")
    trained = [row for row in rows if (loss or "loss") in row]  # others are of evaluations
    return _read_table(path, lambda: trained or rows, loss, grad_norm)


def _read_table(
    path: Path,
    rows: Callable[[], Iterable[Mapping[str, Any]]],
    loss: str | None,
    grad_norm: str | None,
) -> Written:
    names = [*dict.fromkeys(key for row in rows() for key in row if isinstance(key, str))]
    if not names:
        raise MetricsError(f"{path}: no rows; it needs columns for the iteration and the loss")
    step = next(
        (found[0] for name in columns.ITERATION if (found := columns.named(names, (name,)))), None
    )
    if step is None:
        raise MetricsError(
            f"{path}: no column for the iteration ({', '.join(columns.ITERATION)}); it has "
            f"{columns.listed(names)}"
        )
    loss_column = columns.pick(path, "loss", names, columns.LOSS, loss)
    if loss_column is None:
        raise MetricsError(
            f"{path}: no column for the loss; name one with loss=: {columns.listed(names)}"
        )
    notes = joined_runs(path, rows(), names, step, loss_column)
    run = columns.run_of(loss_column)
    same = names if run is None else [name for name in names if columns.run_of(name) in (run, None)]
    norm_column = columns.pick(path, "grad_norm", same, columns.GRAD_NORM, grad_norm)
    samples_column = next(iter(columns.named(names, columns.SAMPLES)), None)
    points, left_out = of_rows(rows(), step, loss_column, norm_column, samples_column)
    in_samples = columns.is_monitor(loss_column) or columns.is_monitor(path.name)
    return Written(points=points, notes=[*notes, *left_out], in_samples=in_samples)


Scalars = dict[str, list[tuple[float, int, float]]]
"""Tag -> (wall time in seconds, step, value)."""


def read_tensorboard(
    folders: Mapping[Path, list[Path]],
    below: Mapping[Path, list[Path]],
    loss: str | None,
    grad_norm: str | None,
) -> Written:
    """Points of event files, by wall time; the step is the iteration.

    A gradient norm belongs to the loss of the same step that was written nearest before or after
    it. Folders that were written one after another are one run that was restarted.

    Args:
        folders: folder -> event files in it.
        below: the same for subfolders of these, of which it is said that they are left out.
        loss: tag of the loss; None for a usual one.
        grad_norm: the same.

    Raises:
        MetricsError: no loss, or those of several runs at once, or a subfolder may be a part.
        UsageError: tensorboard is not installed.
    """
    each = {folder: _scalars(files) for folder, files in folders.items()}
    names = [*dict.fromkeys(tag for series in each.values() for tag in series)]
    where = next(iter(folders))
    loss_tag = columns.pick(where, "loss", names, columns.LOSS, loss)
    if loss_tag is None:
        raise MetricsError(
            f"{where}: no tag for the loss; name one with loss=: "
            f"{columns.listed(names) or 'no scalars'}"
        )
    each = {folder: series for folder, series in each.items() if loss_tag in series}
    notes = [*_one_after_another(each, loss_tag), *_left_out(each, below, loss_tag)]
    series: Scalars = {}
    for part in each.values():
        for tag, events in part.items():
            series.setdefault(tag, []).extend(events)
    names = [*series]
    norm_tag = columns.pick(where, "grad_norm", names, columns.GRAD_NORM, grad_norm)
    norms: dict[int, list[tuple[float, float]]] = {}
    for wall_s, step, value in series[norm_tag] if norm_tag else []:
        norms.setdefault(step, []).append((wall_s, value))
    points = []
    for wall_s, step, value in sorted(series[loss_tag], key=lambda event: event[0]):
        near = min(norms.get(step, []), key=lambda event: abs(event[0] - wall_s), default=None)
        points.append(MetricsPoint(iteration=step, loss=value, grad_norm=near[1] if near else None))
    return Written(points=points, notes=notes, in_samples=columns.is_monitor(loss_tag))


def _left_out(
    each: Mapping[Path, Scalars], below: Mapping[Path, list[Path]], tag: str
) -> list[str]:
    """A note on subfolders that are left out.

    Raises:
        MetricsError: one may be of a restart of the same run, or of another run.
    """
    times = [event[0] for series in each.values() for event in series[tag]]
    for folder, files in below.items():
        own = [event[0] for event in _scalars(files).get(tag, [])]
        if own and (min(own) >= max(times) or max(own) <= min(times)):
            above = next(iter(each))
            raise MetricsError(
                f"{above} has event files, and so has {folder}, written before or after them: "
                "whether those are of one run is not known. Instead of the folder give the files "
                f"in it, {above}/*tfevents*, and where it is of this run {folder} too, in the "
                "order in which they were written"
            )
    said = (
        f"{len(below)} subfolder(s) with event files left out, without {tag!r} or written at the "
        f"same time: {first_few(map(str, below), 5)}."
    )
    return [said] if below else []


def _one_after_another(each: Mapping[Path, Scalars], tag: str) -> list[str]:
    """A note where several folders are one run.

    Raises:
        MetricsError: they were written at one time, so they are several runs.
    """
    spans = sorted((min(s[tag])[0], max(s[tag])[0], folder) for folder, s in each.items())
    for one, other in itertools.pairwise(spans):
        if other[0] < one[1]:
            several = ", ".join(str(folder) for _, _, folder in spans[:10])
            raise MetricsError(
                f"event files of several runs, written at the same time: give one of {several}"
            )
    if len(spans) < 2:
        return []
    return [f"Joined, in the order of their times: {', '.join(str(f) for _, _, f in spans)}."]


def _events(loader: Any, file: Path) -> Iterator[Any]:
    with content_of(file) as name:
        yield from loader(name).Load()


def _scalars(files: list[Path]) -> Scalars:
    """Every scalar of some event files."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise UsageError(
            f"{files[0]} is a TensorBoard file, and reading it needs the package tensorboard: "
            "pip install 'pma-megatron[tensorboard]', or export the run as CSV"
        ) from error
    series: Scalars = {}
    for file in files:
        for event in _events(LegacyEventFileLoader, file):
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    number = value.simple_value
                elif value.HasField("tensor") and not value.tensor.tensor_shape.dim:
                    array = make_ndarray(value.tensor)
                    if array.dtype.kind not in "fiu":
                        continue
                    number = float(array)
                else:
                    continue
                series.setdefault(value.tag, []).append((event.wall_time, event.step, number))
    return series
