"""Resident memory of this process, from /proc."""

from __future__ import annotations

import contextlib
from pathlib import Path

_STATUS = Path("/proc/self/status")


def resident_bytes() -> int:
    """Resident bytes now, 0 where /proc is not."""
    return _field("VmRSS")


def peak_resident_bytes() -> int:
    """Largest number of resident bytes since `reset_peak`, 0 where /proc is not."""
    return _field("VmHWM")


def reset_peak() -> None:
    """Forget the peak so far (Documentation/filesystems/proc.rst, clear_refs)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _field(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
