"""Processes of this machine: which one this is, and which others still run."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def this_process() -> str:
    """Machine, process id and start time: another process with the id is another process."""
    pid = os.getpid()
    return f"{_machine()}/{pid}/{_started(pid)}"


def _machine() -> str:
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}:{Path('/proc/self/ns/pid').readlink()}"
    return "unknown"


def _started(pid: int) -> str | None:
    """Start time of a process that runs; None if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def is_gone(process: str) -> bool:
    """True if it ran on this machine and does so no more; nothing is known of other machines."""
    machine, pid, started = process.rsplit("/", 2)
    return machine != "unknown" and machine == _machine() and _started(int(pid)) != started


def moved_bytes() -> int:
    """Bytes that this process has read and written."""
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/self/io").read_text().splitlines()
        counts = dict(line.split(": ") for line in lines)
        return sum(int(counts[name]) for name in ("rchar", "wchar", "read_bytes"))
    return 0
