"""The folder of a checkpoint in a store: which of its files make it whole, what it says of itself,
and whether it is newer than one on a disk."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE, SEAL_FILE
from pma_megatron.formats.torch_dist.checkpoint import CONFIG_FILE
from pma_megatron.storage.addresses import below
from pma_megatron.storage.protocol import Object, Store, same_version

OWN = (SEAL_FILE, MARKER_FILE)
KNOWN = (*OWN, METADATA_FILE, CONFIG_FILE)
_NUMBER = re.compile(r"\d+")


def held_back(sizes: Mapping[str, int]) -> list[str]:
    """Files without which nobody takes a folder for a whole checkpoint, in their order.

    Args:
        sizes: of all its files, by name.

    >>> held_back({"metadata.json": 9, "__0_0.distcp": 99, ".metadata": 9, "pma.json": 5})
    ['pma.json', '.metadata', 'metadata.json']
    >>> held_back({"bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": 99, "model_states.pt": 9})
    ['model_states.pt']
    """
    known = [name for name in KNOWN if name in sizes]
    rest = [name for name in sizes if name not in KNOWN]
    if CONFIG_FILE in sizes or not rest:
        return known
    # All files together make it whole.
    return [*known, min(rest, key=lambda name: (sizes[name], name))]


def unmake(folder: Path) -> None:
    """Remove from a disk what makes a checkpoint whole, which comes last where it is made: no
    reader takes the rest for one. Harmless where nothing is.

    Raises:
        OSError: something stays.
    """
    files = (path for path in folder.rglob("*") if path.is_file())
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    for name in reversed(held_back(sizes)):
        (folder / name).unlink(missing_ok=True)


def objects_in(store: Store, key: str) -> dict[str, Object]:
    """What lies in a folder of a store, by name."""
    return {each.key.removeprefix(f"{key}/"): each for each in store.listed(f"{key}/")}


def said_in(store: Store, key: str) -> Mapping[str, Any]:
    """What the `pma.json` of a folder in a store says; {} without one. Asked without the pool of
    this process, which has ended before the last upload of a job has."""
    try:
        said = json.loads(store.got(f"{key}/{MARKER_FILE}")[1])
    except (FileNotFoundError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def said_on_disk(folder: Path) -> Mapping[str, Any]:
    """What the `pma.json` of a folder on a disk says; {} without one."""
    try:
        return read_json(folder / MARKER_FILE)
    except CheckpointError:
        return {}


def is_newer(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether the first `pma.json` was made after the second; False where nothing tells.

    >>> is_newer({"created": "2026-11-28T22:00:00+00:00"}, {"created": "2026-11-27T23:00:00+00:00"})
    True
    >>> is_newer({}, {})
    False
    """
    made, before = one.get("created"), other.get("created")
    return isinstance(made, str) and isinstance(before, str) and made > before


def is_same(found: Object | None, nbytes: int, version: str) -> bool:
    """Whether an object is the one that was put there."""
    return found is not None and found.nbytes == nbytes and same_version(found.version, version)


def newer_before(
    store: Store,
    root: str,
    name: str,
    said: Mapping[str, Any],
    is_ours: Callable[[Mapping[str, Any]], bool],
) -> str | None:
    """Name of a checkpoint at `root` that is of an earlier iteration than one on a disk, and newer:
    the run has gone back since, and the one on the disk is of a branch that was given up.

    Args:
        store, root: where.
        name, said: of the one on the disk, and its `pma.json`.
        is_ours: whether that is what a `pma.json` of such a checkpoint says.
    """
    numbers = {each: number_in(each) for each in store.folders(below(root))}
    earlier = [each for each in numbers if -1 < numbers[each] < number_in(name)]
    for each in sorted(earlier, key=numbers.__getitem__, reverse=True):
        there = said_in(store, below(root, each))
        if is_ours(there):
            return each if is_newer(there, said) else None
    return None


def number_in(text: str) -> int:
    """The last number in a name or in what a tracker says; -1 without one.

    >>> number_in("iter_0000050"), number_in("mine")
    (50, -1)
    """
    found = _NUMBER.findall(text)
    return int(found[-1]) if found else -1
