"""File systems of a given size, for tests of what happens where one is full."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


def mount(folder: Path, options: str) -> Path:
    """Make `folder` a file system of its own, until `unmount`; skips where none can be made."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "pma-test", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a tmpfs is not permitted here")
    return folder


def unmount(folder: Path) -> None:
    """Undo `mount`."""
    subprocess.run(["umount", str(folder)], check=True)
