"""Writers of TensorBoard, Weights & Biases and MLflow, each of the library's own.

Where W&B and MLflow keep a run, and which one it is, their own environment says (`WANDB_MODE`,
`WANDB_PROJECT`, `WANDB_RUN_ID`; `MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`, `MLFLOW_RUN_ID`).
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from pma_megatron.base.log import visible
from pma_megatron.base.spelling import given
from pma_megatron.errors import UsageError
from pma_megatron.writers.event_file import EventFile
from pma_megatron.writers.places import MLFLOW, WANDB
from pma_megatron.writers.records import GROUP, Records, Row

ITERATION = f"{GROUP}/iteration"
"""The x axis of what is written into W&B, whose own steps only ever go up."""
_NOT_IN_MLFLOW = re.compile(r"[^\w\-. /]")
_MOST_PER_CALL, _LONGEST_TAG = 1000, 5000  # MLflow's own limits
_log = logging.getLogger(__name__)


class Destination(Protocol):
    """Something that records are written to."""

    def write(self, records: Records) -> None:
        """Write all of it; it is where people see it when this returns."""

    def close(self, *, failed: bool = False) -> None:
        """Nothing more comes; `failed` says that the command did not reach its end."""


class TensorBoard:
    """A writer of event files, such as the one that Megatron has."""

    def __init__(self, writer: Any) -> None:
        """`writer` is a `SummaryWriter`."""
        self._writer = writer

    def write(self, records: Records) -> None:
        """Scalars and texts, whose steps are iterations."""
        for row in records.rows:
            for name, value in row.values.items():
                self._writer.add_scalar(name, value, row.iteration)
        for note in records.notes:
            self._writer.add_text(note.tag, visible(note.text), note.iteration)
        self._writer.flush()

    def close(self, *, failed: bool = False) -> None:
        """End the file."""
        self._writer.close()


class Wandb:
    """A W&B run of our own, or one that its environment says is to be gone on with."""

    def __init__(self, job_type: str) -> None:
        """Start it; `job_type` is what W&B calls the command."""
        wandb = importlib.import_module(WANDB)
        quiet = wandb.Settings(console="off")  # standard output may be JSON that somebody reads
        self._run = wandb.init(job_type=job_type, settings=quiet)
        self._run.define_metric(ITERATION, hidden=True)
        self._run.define_metric(f"{GROUP}/*", step_metric=ITERATION)

    def write(self, records: Records) -> None:
        """Rows with the iteration as their x axis, and texts in the summary."""
        for row in records.rows:
            self._run.log({ITERATION: row.iteration, **row.values})
        for note in records.notes:
            self._run.summary[note.tag] = visible(note.text)

    def close(self, *, failed: bool = False) -> None:
        """Wait until all is on disk, or with the server."""
        self._run.finish(exit_code=int(failed))


class WandbOfTheRun:
    """The W&B run that training has under way.

    Its steps are the run's iterations, and W&B drops what comes for an earlier one: what is of now
    goes beside the run's own curves, the rest into a table.
    """

    def __init__(self, wandb: Any, iteration: int) -> None:
        """`wandb` logs into the run; it is at `iteration`."""
        self._wandb, self._now = wandb, iteration

    def write(self, records: Records) -> None:
        """Nothing here moves the run's own step on."""
        now: dict[str, Any] = {}
        for row in records.rows:
            if row.iteration == self._now:
                now |= row.values
        if any(row.iteration != self._now for row in records.rows):
            now[f"{GROUP}/all"] = self._table(records.rows)
        for note in records.notes:
            now[note.tag] = visible(note.text)
        if now:
            self._wandb.log(now, step=self._now)

    def _table(self, rows: Sequence[Row]) -> Any:
        cells = [[row.iteration, name, value] for row in rows for name, value in row.values.items()]
        return self._wandb.Table(columns=["iteration", "tag", "value"], data=cells)

    def close(self, *, failed: bool = False) -> None:
        """The run goes on."""


class MLflow:
    """A run in MLflow."""

    def __init__(self, run_id: str | None, name: str) -> None:
        """
        Args:
            run_id: the run, whose status stays as it is; None for a new one.
            name: of a new one.

        Raises:
            Exception: MLflow's own; its configuration does not say where runs are kept, or they
                cannot be reached.
        """
        self._mlflow = importlib.import_module(MLFLOW)
        self._client = self._mlflow.MlflowClient()
        self._name, self._begun = name, False
        self._run_id = run_id or os.environ.get("MLFLOW_RUN_ID")

    def write(self, records: Records) -> None:
        """Metrics, whose steps are iterations, and texts as tags."""
        entities = importlib.import_module(f"{MLFLOW}.entities")
        if self._run_id is None:
            self._run_id, self._begun = (
                self._mlflow.start_run(run_name=self._name).info.run_id,
                True,
            )
        now_ms = int(time.time() * 1000)
        metrics = [
            entities.Metric(mlflow_name(name), float(value), now_ms, row.iteration)
            for row in records.rows
            for name, value in row.values.items()
        ]
        for start in range(0, len(metrics), _MOST_PER_CALL):
            self._client.log_batch(self._run_id, metrics[start : start + _MOST_PER_CALL])
        for note in records.notes:
            text = visible(note.text)
            cut = text if len(text) <= _LONGEST_TAG else text[: _LONGEST_TAG - 3] + "..."
            self._client.set_tag(self._run_id, mlflow_name(note.tag), cut)

    def close(self, *, failed: bool = False) -> None:
        """End a run that was begun here."""
        if self._begun:
            self._mlflow.end_run("FAILED" if failed else "FINISHED")


def mlflow_name(name: str) -> str:
    """A tag as MLflow takes it.

    >>> mlflow_name("pma/lm loss/ema:0.2 N=6")
    'pma/lm loss/ema_0.2 N_6'
    """
    return _NOT_IN_MLFLOW.sub("_", name)


@contextlib.contextmanager
def opened(setting: str, places: Sequence[str], command: str) -> Iterator[Writers]:
    """Everything that is to be written to, for one command.

    Args:
        setting: where the places were given.
        places: as in `refuse_unusable`.
        command: its name, for those who list runs.

    Raises:
        UsageError: a place cannot be opened; it says what its library says.
    """
    made: list[tuple[str, Destination]] = []
    failed = True
    try:
        for place in dict.fromkeys(places):
            try:
                with contextlib.redirect_stdout(sys.stderr):
                    made.append((place, _opened(place, command)))
            except Exception as error:
                why = f"{type(error).__name__}: {error}"
                raise UsageError(f"{given(setting, place)} cannot be written to ({why})") from error
        yield Writers(made)
        failed = False
    finally:
        for place, each in made:
            with said(place):
                each.close(failed=failed)


def _opened(place: str, command: str) -> Destination:
    if place == WANDB:
        return Wandb(command)
    if place == MLFLOW:
        return MLflow(None, command)
    return EventFile(Path(place))


class Writers:
    """Several destinations; one that fails is said, and stops neither the others nor the work."""

    def __init__(self, destinations: Sequence[tuple[str, Destination]]) -> None:
        """`destinations` come with the names that messages give them."""
        self._destinations = tuple(destinations)

    def write(self, records: Records) -> None:
        """Write everywhere."""
        for place, each in self._destinations:
            with said(place):
                each.write(records)


@contextlib.contextmanager
def said(place: str) -> Iterator[None]:
    """What is raised in the block is a warning that names the place, and ends nothing else."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # MLflow prints addresses of runs
            yield
    except Exception as error:
        _log.warning("%s cannot be written (%s: %s)", place, type(error).__name__, error)
