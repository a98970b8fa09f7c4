"""The points of each kind of metrics file, in the order in which they were written.

Nothing is sorted or judged here; `metrics.read_metrics` does that.
"""

from __future__ import annotations

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

from pma_megatron.errors import MetricsError, UsageError


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricsPoint:
    """One logged iteration."""

    iteration: int
    loss: float
    """Nats; may be NaN or Inf. With `--log-interval k` the mean of k iterations."""
    grad_norm: float | None = None
    """Global norm before clipping; None where it was not logged."""
    consumed_samples: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Written:
    """What a file holds: its points as written, and sentences about what was left out."""

    points: list[MetricsPoint]
    notes: list[str]
    in_samples: bool = False
    """Whether `MetricsPoint.iteration` counts samples, as in the files of DeepSpeed's monitors."""


# Names as they are compared: lower case, words apart by one space.
_ITERATION = ("iteration", "iter", "global step", "trainer global step", "step")
_LOSS = (
    "lm loss",
    "loss",
    "train loss",
    "training loss",
    "train lm loss",
    "train ce loss",
    "lm loss training lm loss",
    "train samples train loss",  # Megatron-DeepSpeed, DeepSpeed
)
_GRAD_NORM = ("grad norm", "gradient norm", "train grad norm", "optim total grad norm")
_SAMPLES = ("consumed samples", "consumed train samples", "samples")

# Of a line's fields only what may be of use is kept: a long run has millions of lines.
_LOG_KEYS = re.compile(r"loss|norm|consumed samples|number of (skipped|nan) iterations")
_LOG_START = re.compile(r"iteration\s+(\d+)/\s*\d+\s*\|")
# deepspeed/runtime/pipe/engine.py, `train_batch`
_PIPELINE = re.compile(r"steps: (\d+) loss: (\S+) .*iter time \(s\): ")
# deepspeed/monitor: the step of everything under this name is `global_samples`
_MONITOR = "train samples "


def read_log(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """Points of Megatron-LM's training lines (`training_log`), whatever stands between them.

    Without any, points of the lines that DeepSpeed's PipelineEngine prints.

    A line has `iteration N/ M | key: value | ...` after any prefix. Megatron leaves out a loss that
    is not above 0 (below 0 from core 0.19 on), so a complete line without one had NaN, unless its
    iterations were skipped for the loss scale.
    """
    lines = [fields for text in _lines(path) for fields in _log_lines(text)]
    if not lines:
        return Written(points=_pipeline_points(path), notes=[])
    named = dict.fromkeys(key for fields in lines for key in fields)
    losses = [key for key in named if "loss" in key and key != "loss scale"]
    key = loss or ("lm loss" if "lm loss" in named or not losses else None)
    if key is None and len(losses) > 1:
        raise _ambiguous(path, "loss", losses)
    key = key or losses[0]
    if loss is not None and loss not in named:
        raise _missing(path, "loss", loss, named)
    if grad_norm is not None and grad_norm not in named:
        raise _missing(path, "grad_norm", grad_norm, named)

    points, skipped, torn = [], 0, 0
    for fields in lines:
        value = _log_loss(fields, key)
        if value is None:
            complete = "number of nan iterations" in fields
            skipped, torn = skipped + complete, torn + (not complete)
            continue
        samples = fields.get("consumed samples")
        points.append(
            MetricsPoint(
                iteration=int(fields["iteration"]),
                loss=value,
                grad_norm=fields.get(grad_norm or "grad norm"),
                consumed_samples=None if samples is None else int(samples),
            )
        )
    notes = [] if loss or key == "lm loss" else [f"The loss is {key!r}; there is no 'lm loss'."]
    if skipped:
        notes.append(f"{skipped} line(s) left out: Megatron skipped all their iterations.")
    if torn:
        notes.append(f"{torn} line(s) left out: cut off before their loss.")
    return Written(points=points, notes=notes)


def _pipeline_points(path: Path) -> list[MetricsPoint]:
    matches = (_PIPELINE.search(text) for text in _lines(path) if "steps: " in text)
    found = [(int(m[1]), _number(m[2])) for m in matches if m]
    points = [MetricsPoint(iteration=step, loss=loss) for step, loss in found if loss is not None]
    if not points:
        raise MetricsError(
            f"{path}: no line of Megatron's training log (`iteration N/ M | ... |`), none of "
            "DeepSpeed's PipelineEngine (`steps: N loss: X iter time ...`), no CSV header with an "
            "iteration, no JSON lines; give a log, CSV, JSONL or TensorBoard file"
        )
    return points


def _log_lines(text: str) -> Iterator[dict[str, float]]:
    starts = [*_LOG_START.finditer(text)]
    for start, end in itertools.zip_longest(starts, starts[1:]):
        rest = text[start.end() : end.start() if end else len(text)]
        fields = {"iteration": float(start[1])}
        # What no bar ends was cut off.
        for part in rest.split("|")[:-1]:
            key, _, value = part.rpartition(":")
            number = _number(value) if _LOG_KEYS.search(key) else None
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
        with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
            try:
                yield from csv.DictReader(line.replace("\0", "") for line in file)
            except csv.Error as error:
                raise MetricsError(f"{path}: is not CSV ({error})") from error

    return _read_table(path, rows, loss, grad_norm)


def read_jsonl(path: Path, loss: str | None, grad_norm: str | None) -> Written:
    """Points of a file with one JSON object per line."""

    def rows() -> Iterator[Mapping[str, Any]]:
        for line in _lines(path):
            try:
                row = json.loads(line) if line.strip() else {}
            except ValueError:
                row = {}
            yield row if isinstance(row, dict) else {}

    return _read_table(path, rows, loss, grad_norm)


def _read_table(
    path: Path,
    rows: Callable[[], Iterable[Mapping[str, Any]]],
    loss: str | None,
    grad_norm: str | None,
) -> Written:
    names = [*dict.fromkeys(key for row in rows() for key in row if isinstance(key, str))]
    if not names:
        raise MetricsError(f"{path}: no rows; it needs columns for the iteration and the loss")
    step = next((found[0] for name in _ITERATION if (found := _named(names, (name,)))), None)
    if step is None:
        raise MetricsError(
            f"{path}: no column for the iteration ({', '.join(_ITERATION)}); it has {_list(names)}"
        )
    loss_column = pick(path, "loss", names, _LOSS, loss)
    if loss_column is None:
        raise MetricsError(f"{path}: no column for the loss; name one with loss=: {_list(names)}")
    norm_column = pick(path, "grad_norm", names, _GRAD_NORM, grad_norm)
    samples_column = next(iter(_named(names, _SAMPLES)), None)
    points, left_out = [], 0
    for row in rows():
        iteration, value = _number(row.get(step)), _number(row.get(loss_column))
        if iteration is None or value is None or not iteration.is_integer():
            left_out += 1
            continue
        samples = _number(row.get(samples_column)) if samples_column else None
        points.append(
            MetricsPoint(
                iteration=int(iteration),
                loss=value,
                grad_norm=_number(row.get(norm_column)) if norm_column else None,
                consumed_samples=int(samples) if samples and math.isfinite(samples) else None,
            )
        )
    notes = [f"{left_out} row(s) left out: no iteration or no loss."] if left_out else []
    in_samples = _is_monitor(loss_column) or _is_monitor(path.name)
    return Written(points=points, notes=notes, in_samples=in_samples)


def read_tensorboard(files: list[Path], loss: str | None, grad_norm: str | None) -> Written:
    """Points of event files, by wall time; the step is the iteration.

    A gradient norm belongs to the loss of the same step that was written nearest before or after
    it. Raises UsageError when tensorboard is not installed.
    """
    series = _scalars(files)
    names = [*series]
    loss_tag = pick(files[0], "loss", names, _LOSS, loss)
    if loss_tag is None:
        raise MetricsError(
            f"{files[0]}: no tag for the loss; name one with loss=: {_list(names) or 'no scalars'}"
        )
    norm_tag = pick(files[0], "grad_norm", names, _GRAD_NORM, grad_norm)
    norms: dict[int, list[tuple[float, float]]] = {}
    for wall_s, step, value in series[norm_tag] if norm_tag else []:
        norms.setdefault(step, []).append((wall_s, value))
    points = []
    for wall_s, step, value in sorted(series[loss_tag], key=lambda event: event[0]):
        near = min(norms.get(step, []), key=lambda event: abs(event[0] - wall_s), default=None)
        points.append(MetricsPoint(iteration=step, loss=value, grad_norm=near[1] if near else None))
    return Written(points=points, notes=[], in_samples=_is_monitor(loss_tag))


def _is_monitor(name: str) -> bool:
    return _plain(name).startswith(_MONITOR)


def _scalars(files: list[Path]) -> dict[str, list[tuple[float, int, float]]]:
    """(wall time in seconds, step, value) of every scalar, by tag."""
    try:
        from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
        from tensorboard.util.tensor_util import make_ndarray
    except ImportError as error:
        raise UsageError(
            f"{files[0]} is a TensorBoard file, and reading it needs the package tensorboard: "
            "pip install 'pma-megatron[tensorboard]', or export the run as CSV"
        ) from error
    series: dict[str, list[tuple[float, int, float]]] = {}
    for file in files:
        for event in LegacyEventFileLoader(str(file)).Load():
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


def pick(
    path: Path, what: str, names: list[str], known: tuple[str, ...], explicit: str | None
) -> str | None:
    """The one of `names` to use: the explicit one, or the one that means what is `known`.

    Raises MetricsError when the explicit one is missing, or several would do.
    """
    if explicit is not None:
        if explicit not in names:
            raise _missing(path, what, explicit, names)
        return explicit
    found = _named(names, known)
    if len(found) > 1:
        raise _ambiguous(path, what, found)
    return found[0] if found else None


def has_iteration(header: str) -> bool:
    """Whether a CSV header has a column for the iteration."""
    return bool(_named(next(csv.reader([header]), []), _ITERATION))


def _named(names: Iterable[str], known: tuple[str, ...]) -> list[str]:
    return [name for name in names if _plain(name) in known]


def _plain(name: str) -> str:
    """`run 7 - train/lm_loss` (as W&B exports it) becomes `train lm loss`; so does `lm-loss`."""
    last = name.rsplit(" - ", 1)[-1]
    if last.endswith(("__MIN", "__MAX")):
        return ""
    return re.sub(r"[\s_/-]+", " ", last).strip().lower()


def _number(value: Any) -> float | None:
    if value is None or isinstance(value, bool | list | dict):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        yield from file


def _list(names: Iterable[str]) -> str:
    names = [*names]
    return ", ".join(repr(name[:60]) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def _ambiguous(path: Path, what: str, found: list[str]) -> MetricsError:
    return MetricsError(f"{path}: {_list(found)} could each be the {what}; name it with {what}=")


def _missing(path: Path, what: str, name: str, names: Iterable[str]) -> MetricsError:
    return MetricsError(f"{path}: {what}={name!r} is not there; it has {_list(names)}")
