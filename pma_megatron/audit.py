"""The log of a run's spike recoveries: what was seen, chosen and done, one JSON object a line.

It lies in the folder that the run saves to, is only ever appended to, and decides which
checkpoints are trusted: one that was saved at or after the onset of a spike is not, unless the
recovery from that spike had been done by then; nor is one that was saved after a recovery and
before a loss was judged to be well again. Checkpoints carry the number of recoveries done in their
Megatron arguments (`RECORD`), and the detector's memory if the trainer keeps it there (`STATE`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.openfiles import read_source_file

FILE = "pma_recovery.jsonl"
RECORD = "pma_recoveries"
"""Attribute of Megatron's arguments: spikes of this log that were dealt with before the save."""

STATE = "pma_spike_state"
"""Attribute of Megatron's arguments: the detector's memory at the save, as JSON."""

DETECTED, BEGUN, DONE, SPENT = "detected", "begun", "done", "spent"
JUDGED = "judged well"
"""The first loss after a recovery that was judged, and found to be well."""


@dataclass(frozen=True, slots=True)
class Spike:
    """One spike of the log: its number, from 1, and the first iteration that was off."""

    number: int
    onset: int


@dataclass(frozen=True, slots=True)
class Doubt:
    """Why a checkpoint is not to be used; `judged` is False where nothing bad is known of it."""

    reason: str
    judged: bool


class History:
    """The events of one log, oldest first."""

    def __init__(self, events: Sequence[Mapping[str, Any]]) -> None:
        self.events = tuple(events)

    @property
    def spikes(self) -> tuple[Spike, ...]:
        """Every spike that was detected."""
        found = [event for event in self.events if event["event"] == DETECTED]
        return tuple(Spike(int(event["number"]), int(event["onset"])) for event in found)

    @property
    def spent(self) -> bool:
        """Whether the run gave up: its last event says so."""
        return bool(self.events) and self.events[-1]["event"] == SPENT

    def attempts_from(self, newest_healthy: int) -> int:
        """Recoveries begun while this was the newest healthy checkpoint."""
        begun = (event for event in self.events if event["event"] == BEGUN)
        return sum(int(event["newest_healthy"]) == newest_healthy for event in begun)

    @property
    def unjudged_since(self) -> int | None:
        """Iteration of the last recovery, if no loss since then was judged; else None."""
        since = None
        for event in self.events:
            if event["event"] in (DONE, JUDGED):
                since = int(event["iteration"]) if event["event"] == DONE else None
        return since

    def doubt(self, iteration: int | None, args: Mapping[str, Any]) -> Doubt | None:
        """Why a checkpoint is not to be used; None for one that is trusted.

        Args:
            iteration: at which it was saved.
            args: the Megatron arguments in it.
        """
        if iteration is None:
            return None
        done = args.get(RECORD)
        recoveries = done if isinstance(done, int) else 0
        for spike in self.spikes:
            if iteration >= spike.onset and spike.number > recoveries:
                return Doubt(
                    f"it was saved after the onset, at iteration {spike.onset}, of a spike that "
                    f"the run recovered from later ({FILE})",
                    judged=True,
                )
        judged = _judged(args.get(STATE))
        if judged is None:
            judged = not self._awaits_judgement(iteration, recoveries)
        if judged:
            return None
        return Doubt(
            "it was saved after a recovery from a loss spike, and before a loss was judged to be "
            "well again: it is not judged",
            judged=False,
        )

    def _awaits_judgement(self, iteration: int, recoveries: int) -> bool:
        """Whether the log has a recovery that ended before a save, and no judgement in between."""
        for place, event in enumerate(self.events):
            if event["event"] != DONE or int(event["number"]) > recoveries:
                continue
            later = (e for e in self.events[place:] if e["event"] == JUDGED)
            first = next((int(e["iteration"]) for e in later), None)
            if int(event["iteration"]) <= iteration and (first is None or iteration < first):
                return True
        return False


def _judged(state: Any) -> bool | None:
    """Whether a detector, by its memory, had judged a loss since the last recovery."""
    try:
        known = json.loads(state)
    except (TypeError, ValueError, RecursionError):
        return None
    if not isinstance(known, dict):
        return None
    # Memories of before `judged` was kept tell by the points that still had to pass.
    return bool(known.get("judged", not known.get("cooldown")))


def read(root: str | Path) -> History:
    """The log below `root`; empty if there is none.

    A line that was cut off by a crash is passed over.

    Raises:
        CheckpointError: it is there and cannot be read: it says which checkpoints are healthy.
    """
    path = Path(root) / FILE
    try:
        text = read_source_file(path).decode(errors="replace")
    except CheckpointError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return History(())
        raise
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(event, dict) and type(event.get("event")) is str:
            numbers = (event.get(name) for name in _NEEDED.get(event["event"], ()))
            if all(type(number) is int for number in numbers):
                events.append(event)
    return History(events)


_NEEDED = {
    DETECTED: ("number", "onset"), BEGUN: ("newest_healthy",), DONE: ("number", "iteration"),
    JUDGED: ("iteration",),
}  # fmt: skip


def append(root: str | Path, event: str, **fields: Any) -> None:
    """Add an event and flush it to the disk; creates the folder and the file."""
    path = Path(root) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": event, **fields}) + "\n"
    with path.open("ab") as stream:
        # What a crash left of a line must not swallow this one.
        cut_off = stream.tell() > 0 and not _ends_with_newline(path)
        stream.write((b"\n" if cut_off else b"") + line.encode())
        stream.flush()
        os.fsync(stream.fileno())


def _ends_with_newline(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) == b"\n"
