"""A file of events, as TensorBoard reads it, that is there from its first value on."""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import os
import socket
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pma_megatron.base.log import visible
from pma_megatron.runs.told_files import refuse_folder
from pma_megatron.writers.records import Records

_VERSION, _NUMBERS = "brain.Event:2", itertools.count()


class EventFile:
    """A file of events of our own for TensorBoard, which begins with the first value.

    The library's writer leaves the file to a thread, which a full disk ends for good, with a
    traceback. Here what could not be written is written with what comes next.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is made in `folder` yet, nor is it."""
        self._tensorboard = importlib.import_module("torch.utils.tensorboard.summary")
        self._folder, self._path, self._nbytes = folder, folder, 0
        self._unwritten = b""

    def write(self, records: Records) -> None:
        """Scalars and texts, whose steps are iterations.

        Raises:
            UsageError: the folder has become part of a checkpoint.
            OSError: the file cannot be written, and ends where it did.
        """
        made = self._tensorboard
        summaries = [
            (row.iteration, made.scalar(name, value))
            for row in records.rows
            for name, value in row.values.items()
        ]
        summaries += [
            (each.iteration, made.text(each.tag, visible(each.text))) for each in records.notes
        ]
        self._unwritten += encoded(summaries, begins=not self._nbytes and not self._unwritten)
        self._put()

    def _put(self) -> None:
        if not self._nbytes:
            refuse_folder(f"the folder {self._folder}", self._folder)
            self._folder.mkdir(parents=True, exist_ok=True)
            self._path = self._folder / _new_name()
        try:
            with self._path.open("ab") as stream:
                stream.write(self._unwritten)
        except OSError:
            self._cut()
            raise
        self._nbytes, self._unwritten = self._nbytes + len(self._unwritten), b""

    def _cut(self) -> None:
        """Half a record would hide all that follows it."""
        with contextlib.suppress(OSError):
            if self._nbytes:
                os.truncate(self._path, self._nbytes)
            else:
                self._path.unlink()

    def close(self, *, failed: bool = False) -> None:
        """Write what could not be written until now."""
        if self._unwritten:
            self._put()


def encoded(summaries: Iterable[tuple[int, Any]], *, begins: bool) -> bytes:
    """Records of a file of events.

    Args:
        summaries: (step, what is said of it).
        begins: whether a file begins with them.
    """
    proto = importlib.import_module("tensorboard.compat.proto.event_pb2")
    into, now = io.BytesIO(), time.time()
    writer = importlib.import_module("tensorboard.summary.writer.record_writer").RecordWriter(into)
    if begins:
        writer.write(proto.Event(wall_time=now, file_version=_VERSION).SerializeToString())
    for step, summary in summaries:
        event = proto.Event(wall_time=now, step=step, summary=summary)
        writer.write(event.SerializeToString())
    return into.getvalue()


def _new_name() -> str:
    """As TensorBoard finds files of events, and no other writer's."""
    host, number = socket.gethostname(), next(_NUMBERS)
    return f"events.out.tfevents.{time.time():010.0f}.{host}.{os.getpid()}.{number}.pma"
