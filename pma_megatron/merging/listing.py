"""What a listing says of each checkpoint beside what a selection needs: size and origin."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.errors import PmaError
from pma_megatron.formats.manifest import read_marker
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE
from pma_megatron.merging.rolling import rolled_in_words
from pma_megatron.merging.saved_over import changed_files
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of

_THREADS = 8  # a network file system answers several at once


@dataclass(frozen=True, slots=True)
class Listed:
    """One checkpoint of a listing.

    Attributes:
        ref: it.
        bytes: of all files in the folder that its trainer saved; None where there is no folder.
        origin: what an average was made from, in words; None for what a trainer saved, or that it
            saved it over an average.
    """

    ref: CheckpointRef
    bytes: int | None
    origin: str | None


def listed(refs: Sequence[CheckpointRef]) -> list[Listed]:
    """The size and the origin of each; what cannot be read is left open, not an error."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_listed, refs))


def _listed(ref: CheckpointRef) -> Listed:
    folder = path_of(ref.folder)
    nbytes = bytes_in(folder) if is_folder(folder) else None
    return Listed(ref, nbytes, _origin(folder, whole=ref.complete))


def bytes_in(folder: Path) -> int:
    """Bytes of what is in a folder, as far as it can be looked at."""
    nbytes = 0
    for here, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                nbytes += (path_of(here) / name).stat().st_size
    return nbytes


def _origin(folder: Path, *, whole: bool) -> str | None:
    words = average_in_words(folder)
    if words is not None and whole and changed_files(folder):
        return "none: files were written over it since, and its pma.json stayed"
    return words


def average_in_words(folder: Path) -> str | None:
    """Of what the average in a folder was made, by its `pma.json`; None where it says of none."""
    try:
        if not (folder / MARKER_FILE).is_file():
            return None
    except OSError:  # nothing in it can be looked at, which the listing says of it anyway
        return None
    try:
        made = read_marker(folder).value
        if made.get("kind") == ONLINE_AVERAGE:
            return f"running average, {made.get('method')}"
        if made.get("kind") is not None:
            return None
        rolled = rolled_in_words(made)
        if rolled is not None:
            return rolled
        sources = [source["iteration"] for source in made["plan"]["sources"]]
        return f"{made['output']['method']} of {len(sources)}: {sources[0]} to {sources[-1]}"
    except (PmaError, OSError, KeyError, TypeError, IndexError, ValueError, AttributeError):
        return "an average; its pma.json cannot be read"
