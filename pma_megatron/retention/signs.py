"""Deleting in an object store, which has neither renames nor locks: under a sign, markers first.

The sign is that of an upload (`UPLOADING_FILE`): what lies in a folder with it is whole for nobody
of this package. It names every object that is to go, and its version: whoever finishes a deletion
that was cut off deletes those, and nothing that was written there since.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pma_megatron.base.faults import point
from pma_megatron.base.stopping import shielded
from pma_megatron.errors import SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import MARKERS
from pma_megatron.formats.marker import BRANCHES_FILE, MARKER_FILE, SEAL_FILE, UPLOADING_FILE
from pma_megatron.runs import recovery_log
from pma_megatron.storage.addresses import below
from pma_megatron.storage.claims import FRESH_S, Claim, claim, claimed
from pma_megatron.storage.paths import in_store, stored
from pma_megatron.storage.protocol import Object, Store

_DELETES = "deletes"
_FIRST = ("metadata.json", *MARKERS, SEAL_FILE, MARKER_FILE, "latest")
_TRACKERS = {known.tracker.file for known in registry.FORMATS} | {recovery_log.FILE, BRANCHES_FILE}

Objects = Mapping[str, tuple[str, int, int]]
"""Name in a folder -> what tells the object from every other of that name."""


@dataclass(frozen=True, slots=True)
class Sign:
    """What says in a folder that a job is at work there, or was.

    Attributes:
        folder: the folder.
        said: by the job.
        age_s: since it last said so.
    """

    folder: Path
    said: Mapping[str, Any]
    age_s: float

    @property
    def is_fresh(self) -> bool:
        """Whether the job may be at work now."""
        return self.age_s < FRESH_S

    @property
    def deletes(self) -> bool:
        """Whether it is that of a deletion."""
        return self.said.get(_DELETES) is True


def signs_below(root: Path) -> Iterator[Sign]:
    """The signs in a folder of a store, and in all below it; none on a disk.

    Raises:
        OSError: the store does not tell.
    """
    for path in sorted(root.rglob(UPLOADING_FILE)) if in_store(root) else ():
        found = claimed(*stored(path))
        if found is not None:
            yield Sign(path.parent, *found)


@contextlib.contextmanager
def looking(root: Path) -> Iterator[None]:
    """What lies around the run at `root` is looked at in the block.

    Raises:
        SelectionError: the store, or the file system, does not tell.
    """
    try:
        yield
    except OSError as error:
        if not in_store(root):
            raise SelectionError(
                f"{error.filename or root} cannot be looked at ({error.strerror}), and a merge "
                f"that was cut off there may need checkpoints of {root}. Ask for the right to "
                "read it, or move it elsewhere"
            ) from error
        raise SelectionError(
            f"what lies in and beside {root} cannot be listed, so nothing tells which merges need "
            f"its checkpoints: {error.strerror or error}. Use credentials that may list "
            f"{root.parent}"
        ) from error


@dataclass(frozen=True, slots=True)
class Moment:
    """A checkpoint in a store, and what says which one training resumes from, as they are now.

    Attributes:
        inside: the objects of the checkpoint.
        beside: trackers, and the log of recoveries, in the folder around it.
    """

    inside: Objects
    beside: Objects


def moment_of(folder: Path) -> Moment:
    """Ask the store itself, whatever was listed before.

    Raises:
        OSError: it does not tell.
    """
    store, key = stored(folder)
    above = key.rpartition("/")[0]
    beside = _by_name(store.beside(below(above)), above)
    named = {name: said for name, said in beside.items() if name in _TRACKERS}
    return Moment(_inside(store, key), named)


def _inside(store: Store, key: str) -> dict[str, tuple[str, int, int]]:
    return {n: s for n, s in _by_name(store.listed(f"{key}/"), key).items() if n != UPLOADING_FILE}


def _by_name(found: Iterable[Object], folder: str) -> dict[str, tuple[str, int, int]]:
    above = below(folder)
    return {
        each.key.removeprefix(above): (each.version, each.nbytes, each.modified_ns)
        for each in found
    }


class ChangedError(Exception):
    """A checkpoint, or what says where training resumes, is not as it was looked at."""


def delete(folder: Path, seen: Moment) -> list[str]:
    """Delete a checkpoint, unless it or a tracker beside it is other than `seen` by now.

    Returns:
        names of what came into its folder meanwhile, and stayed.

    Raises:
        ChangedError: it is; nothing was deleted.
        ClaimedError: a job is at work there.
        OSError: the store refuses.
    """
    if claimed(*stored(folder / UPLOADING_FILE)) is not None:
        raise ChangedError  # what an upload says there must not be replaced by this
    with _signed(folder, seen.inside) as made:
        if moment_of(folder) != seen:
            raise ChangedError
    return _deleted(folder, made, seen.inside)


def finish(sign: Sign) -> list[str]:
    """Finish a deletion that was cut off; see `delete`."""
    with _signed(sign.folder, _recorded(sign)) as made:
        pass
    return _deleted(sign.folder, made, _recorded(sign))


@contextlib.contextmanager
def _signed(folder: Path, objects: Objects) -> Iterator[Claim]:
    """Sign a folder, so that no other job of this package begins anything there.

    What ends the block before its end takes the sign away: nothing was deleted yet.
    """
    store, key = stored(folder)
    more = {_DELETES: True, "files": {name: list(said) for name, said in objects.items()}}
    work = f"delete {secrets.token_hex(8)}"  # that no other job can go on with
    made = claim(store, f"{key}/{UPLOADING_FILE}", work, more)
    try:
        point("signed", 0)
        yield made
    except BaseException:
        if made.new:
            with shielded(), contextlib.suppress(OSError):
                store.delete([made.key])
        raise


def _deleted(folder: Path, made: Claim, objects: Objects) -> list[str]:
    """Delete objects of a folder that is signed: first those that make it look whole."""
    store, key = stored(folder)
    there = _inside(store, key)
    same = [name for name, said in there.items() if said == objects.get(name)]
    first = [n for mark in _FIRST for n in same if PurePosixPath(n).name == mark]
    made.check(store)
    store.delete(f"{key}/{name}" for name in first)
    point("unmarked", 0)
    store.delete(f"{key}/{name}" for name in same if name not in first)
    point("pruned", 0)
    made.check(store)
    store.delete([made.key])
    return [name for name in there if name not in same]


def _recorded(sign: Sign) -> Objects:
    """What a deletion that was cut off was to delete."""
    found = {}
    with contextlib.suppress(AttributeError, TypeError, ValueError):
        for name, (version, nbytes, modified_ns) in sign.said["files"].items():
            found[str(name)] = (str(version), int(nbytes), int(modified_ns))
    return found
