"""Resident memory of this process, and memory that is left on this machine."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CGROUP = Path("/sys/fs/cgroup")


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


@contextlib.contextmanager
def collector_at_rest() -> Iterator[None]:
    """Without Python's collector of cycles, which looks at all objects again and again while very
    many are made, and stops all threads meanwhile: it takes half of the time that decoding a large
    `.metadata` takes, and a third of a second in the middle of a merge."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def give_back() -> None:
    """Return freed memory to the system, which the C library keeps otherwise: what was there for a
    large file for a moment would count to the end. Where that library cannot, nothing is done."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def imported_for_good() -> Iterator[None]:
    """Around imports that a process keeps to its end: Python's collector looks at nothing that
    exists after them any more. It would look at all of torch while they run, at times after, and at
    the end, which takes as long as half of the import of torch."""
    with collector_at_rest():
        yield
        gc.freeze()


def _field(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0


def available_bytes() -> int:
    """Bytes that processes here can still take: of the machine, and of the container; 0 if unknown.

    From /proc/meminfo, and memory.max of cgroup v2, whose cached files count as available.
    """
    found = []
    with contextlib.suppress(OSError, ValueError, IndexError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
        limit = int((_CGROUP / "memory.max").read_text())
        used = int((_CGROUP / "memory.current").read_text())
        lines = (_CGROUP / "memory.stat").read_text().splitlines()
        cached = sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
        found.append(max(limit - used + cached, 1))
    return min(found, default=0)
