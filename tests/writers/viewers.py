"""Curves as those who look at them read them: by the libraries' own readers."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

Curves = dict[str, list[tuple[int, float]]]
_BLOCK, _HEADER, _FIRST = 32768, 7, 7
_FULL, _LAST = 1, 4


def of_tensorboard(folder: Path) -> tuple[Curves, dict[str, str]]:
    """Scalars and texts of all event files in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    # Scalars of `SummaryWriter` have no plugin data, and a size of 0 keeps all of them.
    found = EventAccumulator(str(folder), {"scalars": 0, "tensors": 0}).Reload()
    tags = found.Tags()
    curves = {t: [(e.step, e.value) for e in found.Scalars(t)] for t in tags["scalars"]}
    texts = {
        t.removesuffix("/text_summary"): make_ndarray(e.tensor_proto).item().decode()
        for t in tags["tensors"]
        for e in found.Tensors(t)
    }
    return curves, texts


def patient_wandb(environment: pytest.MonkeyPatch) -> None:
    """W&B gives its own process 30 s to start, and a run 90."""
    for name in ("WANDB__SERVICE_WAIT", "WANDB_INIT_TIMEOUT"):
        environment.setenv(name, "300")


def of_wandb(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, str]]:
    """History, summary, and the x axis of each metric, of the only offline run below a folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.rglob("offline-run-*/*.wandb")
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    axes: dict[str, str] = {}
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.HasField("history"):
            history.append(_items(record.history.item))
        elif record.HasField("summary"):
            summary |= _items(record.summary.update)
        elif record.HasField("metric"):
            axes[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    return history, summary, axes


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def _records(data: bytes) -> Iterator[bytes]:
    """Records of a file in LevelDB's log format, as W&B writes it (a header of 7 bytes first)."""
    at, parts = _FIRST, b""
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + _HEADER])
        at += _HEADER
        parts += data[at : at + length]
        at += length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""


def of_mlflow(run_id: str) -> tuple[Curves, dict[str, str], str]:
    """Metrics, tags and status of a run."""
    from mlflow import MlflowClient

    client = MlflowClient()
    run = client.get_run(run_id)
    curves = {
        name: [(m.step, m.value) for m in client.get_metric_history(run_id, name)]
        for name in run.data.metrics
    }
    return curves, run.data.tags, run.info.status
