"""Bytes that are on the disk when the call returns."""

from __future__ import annotations

import os
from pathlib import Path


def write_small(path: Path, data: bytes) -> None:
    """Write a whole file, its folder too if need be, and flush it to the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
