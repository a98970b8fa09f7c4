"""Durations: as typed, as printed."""

from __future__ import annotations

import re

from pma_megatron.errors import UsageError

_UNITS_S = {"": 1, "s": 1, "m": 60, "h": 3600}
_DURATION = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*([smh]?)")


def parse_duration(text: str) -> float:
    """Seconds in a duration such as `90`, `90s`, `5m`, `1.5h`.

    Raises:
        UsageError: not a duration, or none at all.
    """
    match = _DURATION.fullmatch(text.strip())
    seconds = float(match[1]) * _UNITS_S[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{text!r} is not a duration: give seconds, or 90s, 5m, 1.5h")
    return seconds


def format_duration(seconds: float) -> str:
    """A duration in its largest whole unit."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= size and seconds % size == 0:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:g} s"
