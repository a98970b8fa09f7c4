"""What time it is by the clock that dates files, which is their server's, not this machine's."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path

from pma_megatron.merging.locks import CLEANING, LOCK, held
from pma_megatron.storage.claims import now_s
from pma_megatron.storage.paths import in_store, stored


@dataclass(frozen=True, slots=True)
class FileClock:
    """The time in folders, asked once for each by something that is written there for a moment."""

    _since_start_s: dict[Path, float] = field(default_factory=dict)

    def now_s(self, folder: Path) -> float:
        """Seconds since 1970 by the clock that dates what is written in a folder.

        Raises:
            OSError: nothing can be written there.
        """
        if folder not in self._since_start_s:
            self._since_start_s[folder] = _asked_s(folder) - time.monotonic()
        return self._since_start_s[folder] + time.monotonic()


def _asked_s(folder: Path) -> float:
    name = f"clock-{os.getpid()}-{time.monotonic_ns()}"
    if in_store(folder):
        store, key = stored(folder / name)
        return now_s(store, key)
    with held(folder, name, CLEANING):
        return (folder / f"{LOCK}{name}").stat().st_mtime
