"""The log of a run's spike recoveries: what was seen, chosen and done, one JSON object a line.

It lies in the folder that the run saves to, is only ever appended to, and decides which
checkpoints are trusted: one that was saved at or after the onset of a spike is not, unless the
recovery from that spike had been done by then; nor is one that was saved after a recovery and
before a loss was judged to be well again. Checkpoints carry the number of recoveries done in their
Megatron arguments (`RECORD`), and the detector's memory if the trainer keeps it there (`STATE`).
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from pma_megatron.base.openfiles import read_source_file, why_closed
from pma_megatron.errors import CheckpointError
from pma_megatron.formats.json_files import without_repeats
from pma_megatron.storage.paths import path_of

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

    def __init__(self, events: Sequence[Mapping[str, Any]], problem: str | None = None) -> None:
        """`problem`: why the log cannot be used, where a list is shown all the same."""
        self.events = tuple(events)
        self.problem = problem

    @property
    def spikes(self) -> tuple[Spike, ...]:
        """Every spike that was detected."""
        found = [event for event in self.events if event["event"] == DETECTED]
        return tuple(Spike(int(event["number"]), int(event["onset"])) for event in found)

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
        if self.problem is not None:
            return Doubt(f"whether it is spoiled is not known: {self.problem}", judged=False)
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

    It says which checkpoints are spoiled, so a line that is not understood is never passed over:
    it may tell of a spike, and from which iteration on nothing is to be used.

    Raises:
        CheckpointError: it is there and cannot be read, or a line is not one that this tool writes.
    """
    path = path_of(root) / FILE
    try:
        data = read_source_file(path)
    except CheckpointError as error:
        if isinstance(error.__cause__, (FileNotFoundError, NotADirectoryError)):
            return History(())
        why = why_closed(path.parent)
        if why is not None:
            raise CheckpointError(
                f"{path.parent} cannot be looked into ({why}): ask for the right to, or give "
                "another"
            ) from error
        raise CheckpointError(
            f"{error}. It says which checkpoints of the run are spoiled, so none is used without "
            "it: make it readable, or restore it"
        ) from error
    if not data.strip():
        raise CheckpointError(
            f"{path} is empty, and it is made with its first line: its lines are lost. They say "
            "which checkpoints are spoiled, so none is used: restore it, or remove it if you know "
            "that this run had no loss spike"
        )
    lines = data.split(b"\n")
    events: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            events.append(_event(line, events))
        except (ValueError, RecursionError) as error:
            raise _not_understood(path, number, str(error), number == len(lines)) from error
    return History(events)


def _not_understood(path: Path, number: int, found: str, cut_off: bool) -> CheckpointError:
    why = (
        "it has no end: cut off while it was written. If training is writing it this minute, try "
        "again; else "
        if cut_off
        else ""
    )
    return CheckpointError(
        f"{path}, line {number}, is not a line of a recovery log ({found}): {why}it may tell of a "
        "spike, so no checkpoint of the run is used. Restore the file from a copy; or put the line "
        'right, {"event": "detected", "number": N, "onset": ITERATION} for a spike; or delete it, '
        "if you know that no checkpoint was saved in a spike that it tells of"
    )


def _event(line: bytes, before: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One line of the log.

    Raises:
        ValueError: it is not one; a clause that says why.
    """
    try:
        event = json.loads(
            line.decode(), parse_constant=_no_number, object_pairs_hook=without_repeats
        )
    except UnicodeDecodeError:
        raise ValueError("its bytes are not UTF-8") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON: {error.msg}") from None
    if not isinstance(event, dict):
        raise ValueError(f"a {type(event).__name__}, expected an object")
    kind = event.get("event")
    if type(kind) is not str or kind not in _NEEDED:
        raise ValueError(f"event {_brief(kind)}, expected one of {', '.join(_NEEDED)}")
    for name, least in _NEEDED[kind].items():
        value = event.get(name)
        if type(value) is not int or not least <= value < 1 << 63:
            raise ValueError(f"{kind}: {name} is {_brief(value)}, expected a number from {least}")
    known = {e["number"] for e in before if e["event"] == DETECTED}
    if kind == DONE and event["number"] not in known:
        raise ValueError(f"{kind}: no line above it says that spike {event['number']} was seen")
    return event


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number")


def _brief(value: Any) -> str:
    return "missing" if value is None else repr(value)[:60]


_NEEDED: dict[str, dict[str, int]] = {
    DETECTED: {"number": 1, "onset": 0},
    BEGUN: {"newest_healthy": 0},
    DONE: {"number": 1, "iteration": 0},
    JUDGED: {"iteration": 0},
    SPENT: {},
}
"""By event, the fields that decide what is trusted, and the least that each may be."""


def append(root: str | Path, event: str, **fields: Any) -> None:
    """Add an event and flush it to the disk; creates the folder and the file."""
    path = path_of(root) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    line = json.dumps({"time": now, "event": event, **fields}) + "\n"
    # A line in part would be a log that nobody can trust: what did not fit is taken back.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        # What a crash left of a line must not swallow this one.
        cut_off = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
        data = (b"\n" if cut_off else b"") + line.encode()
        try:
            if os.write(descriptor, data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        except OSError:
            os.ftruncate(descriptor, size) if size else path.unlink()
            raise
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
