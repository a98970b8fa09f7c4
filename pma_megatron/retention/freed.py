"""How much a deletion frees: a file with further names (hard links) goes with its last one."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from pma_megatron.storage.paths import path_of


def freed_bytes(folders: Iterable[Path]) -> list[int]:
    """Bytes that are free once a folder is deleted, those before it being gone; one for each.

    >>> freed_bytes([])
    []
    """
    names: Counter[tuple[int, int]] = Counter()
    found = []
    for folder in folders:
        found.append(0)
        for here, _, files in os.walk(folder):
            for name in files:
                try:
                    stat = (path_of(here) / name).lstat()
                except OSError:
                    continue
                inode = (stat.st_dev, stat.st_ino)
                names[inode] += 1
                if names[inode] >= stat.st_nlink:
                    found[-1] += stat.st_size
    return found
