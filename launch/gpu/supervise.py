"""Runs groups of parts in processes, and ends what takes too long or dies, part by part."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpu.events import BEGUN, ENDED, FINDING
from gpu.findings import Finding, PartResult
from gpu.parts import Part

_LOOK_EVERY_S = 0.1
_START_LIMIT_S = 120.0
_TAIL = 600
_MARK = "PMA_GPU_CHECK_WORKER"
INTERRUPTED = "it was interrupted"


class Stop(threading.Event):
    """Set if everything must end; `why` says why."""

    why = ""

    def end(self, why: str) -> None:
        """Have everything end."""
        self.why = self.why or why
        self.set()


@dataclass(frozen=True, kw_only=True)
class Supervisor:
    """Attributes:
    folder: for the files of all parts.
    logs: gets a log per group.
    deadline: of the whole check, on the monotonic clock.
    report: called with each part that is done.
    stop: set if everything must end.
    environment: on top of this process's.
    patience: times the limits of the parts, which are those of a GPU with cores for each part.
    """

    folder: Path
    logs: Path
    deadline: float
    report: Callable[[PartResult], None]
    stop: Stop
    patience: float = 1.0
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, group: str, parts: Sequence[Part]) -> None:
        """All parts of a group; a process that ends early is followed by another for the rest."""
        left = list(parts)
        (self.logs / f"{group}.log").write_bytes(b"")
        while left:
            if self.stop.is_set() or time.monotonic() > self.deadline:
                why = f": {self.stop.why}" if self.stop.why else ""
                said = f"the check ended before it{why}"
                for part in left:
                    self.report(PartResult(part=part.name, skipped=said))
                return
            left = left[_Process(self, group, left).follow() :]


class _Process:
    """One worker, and what it has said so far."""

    def __init__(self, owner: Supervisor, group: str, parts: Sequence[Part]) -> None:
        self._owner, self._parts = owner, list(parts)
        self._log = owner.logs / f"{group}.log"
        self._events = owner.folder / f"{group}-{parts[0].name}.events"
        self._read = 0
        self._result: PartResult | None = None
        self._done = 0
        self._since_s = time.monotonic()
        self._mark = secrets.token_hex(8)

    def follow(self) -> int:
        """Start it and follow it to its end; returns how many of its parts are done with."""
        self._events.touch()
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-W", "ignore", "-m", "gpu.worker", "--parts"),
                    *(part.name for part in self._parts),
                    *("--folder", str(self._owner.folder), "--events", str(self._events)),
                ],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **self._owner.environment, _MARK: self._mark},
                start_new_session=True,
            )
        try:
            why = self._watch(process)
        finally:
            _end(process, self._mark)
        self._take_events()
        if self._done < len(self._parts) and (why or self._result is not None or not self._done):
            self._give_up(why or _how_it_ended(process))
        return self._done

    def _watch(self, process: subprocess.Popen[bytes]) -> str:
        """Until it ends; returns why it must be ended, "" if it ended by itself."""
        while process.poll() is None:
            self._take_events()
            now = time.monotonic()
            begun = self._result is not None
            limit_s = self._parts[self._done].limit_s if begun else _START_LIMIT_S
            limit_s *= self._owner.patience
            if now > self._owner.deadline:
                return "the time for the whole check is over"
            if now - self._since_s > limit_s:
                return f"still running after {limit_s:.0f} s"
            if self._owner.stop.is_set():
                return self._owner.stop.why
            time.sleep(_LOOK_EVERY_S)
        return ""

    def _take_events(self) -> None:
        with self._events.open() as stream:
            stream.seek(self._read)
            while (line := stream.readline()).endswith("\n"):
                self._read = stream.tell()
                self._take(json.loads(line))

    def _take(self, event: dict[str, Any]) -> None:
        if event["event"] == BEGUN:
            self._result, self._since_s = PartResult(part=event["part"]), time.monotonic()
        elif event["event"] == FINDING:
            assert self._result is not None
            self._result.findings.append(Finding(**event["finding"]))
        elif event["event"] == ENDED:
            assert self._result is not None
            self._result.seconds, self._result.ended = event["seconds"], event["error"]
            self._hand_in()
        else:
            self._since_s = time.monotonic()

    def _hand_in(self) -> None:
        assert self._result is not None
        self._owner.report(self._result)
        self._result, self._done = None, self._done + 1
        self._since_s = time.monotonic()

    def _give_up(self, why: str) -> None:
        """On the part that was under way, or was to be next."""
        name = self._parts[self._done].name
        self._result = self._result or PartResult(part=name)
        tail = self._log.read_text(errors="replace")[-_TAIL:]
        if why == INTERRUPTED:  # nothing is wrong with it
            self._result.skipped = why
        else:
            self._result.ended = f"{tail}\n{why}"
        self._result.seconds = time.monotonic() - self._since_s
        self._hand_in()


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    code = process.returncode
    if code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """It and all that it started: ranks and scripts lead sessions of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in environ.read_bytes().split(b"\0"):
                os.kill(int(environ.parent.name), signal.SIGKILL)
