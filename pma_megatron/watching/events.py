"""What a watch has to say: a line on the log, a line of JSON in a file."""

from __future__ import annotations

import json
import logging
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pma_megatron.base.log import visible
from pma_megatron.base.spelling import given
from pma_megatron.runs.told_files import beginning, refuse_file

Tell = Callable[[dict[str, Any]], None]
STARTED, WAITING, CURRENT, PUBLISHED = "started", "waiting", "current", "published"
EVALUATED, FAILED, DELETED, STOPPED = "evaluated", "failed", "deleted", "stopped"
KINDS = (STARTED, WAITING, CURRENT, PUBLISHED, EVALUATED, FAILED, DELETED, STOPPED)
_LOUD = (FAILED,)
_LOG = beginning("log of a watch", b'{"time": ')
_log = logging.getLogger(__name__)


def refuse_unusable(path: Path, made: Iterable[Path]) -> None:
    """Refuse a file for events that could not be written, or that is something else's.

    Args:
        path: the file.
        made: folders that the watch makes.

    Raises:
        UsageError: saying what to do.
    """
    refuse_file(given("events", path), path, _LOG, made)


class Events:
    """The events of one watch."""

    def __init__(self, path: Path | None, tell: Tell = lambda event: None) -> None:
        """
        Args:
            path: file that every event is added to; None for none.
            tell: is told each, too.
        """
        self._path, self._tell = path, tell

    def say(self, kind: str, text: str, **fields: Any) -> None:
        """One event; `text` is its line on the log. A file that cannot be written stops nobody."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        event = {"time": now, "event": kind, "text": text, **fields}
        _log.log(logging.WARNING if kind in _LOUD else logging.INFO, "%s: %s", kind, visible(text))
        if self._path is not None:
            try:
                _append(self._path, json.dumps(event) + "\n")
            except OSError as error:
                _log.warning("%s cannot be written (%s)", self._path, error.strerror)
        self._tell(event)

    def earlier(self) -> Iterator[dict[str, Any]]:
        """What the file says of this watch and of those before it; torn lines are no lines."""
        if self._path is None or not self._path.is_file():
            return
        with self._path.open("rb") as stream:
            for line in stream:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue
                if isinstance(event, dict):
                    yield event


def _append(path: Path, line: str) -> None:
    """In one write: a kill leaves all of it or, at worst, a line without an end."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        plain = stat.S_ISREG(os.fstat(descriptor).st_mode)
        end = os.lseek(descriptor, 0, os.SEEK_END) if plain else 0
        torn = end > 0 and _last_byte(path) != b"\n"
        os.write(descriptor, (("\n" if torn else "") + line).encode())
    finally:
        os.close(descriptor)


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1)
