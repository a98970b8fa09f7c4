"""What merges need that are not at their end: the same command goes on with one that was cut off.

A merge that is at work holds its sources (`formats.holding`). One that was killed has left its
staging folder, and beside that a journal which names them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from pathlib import Path

from pma_megatron.base.spelling import given
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import UPLOADING_FILE
from pma_megatron.merging.leftovers import JOB_FILE, JOURNAL, STAGING
from pma_megatron.merging.locks import is_held
from pma_megatron.retention.signs import signs_below
from pma_megatron.retention.surroundings import beside, folders_below, real, spellings
from pma_megatron.storage import paths
from pma_megatron.storage.addresses import Address
from pma_megatron.storage.paths import in_store, path_of, workplace

_SWEPT = re.compile(r"-last\d+$")
"""How the folders of a sweep are called, in which its outputs lie."""
_OF_THE_FILE_SYSTEM = "lost+found"


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A merge that is at work, or was cut off.

    Attributes:
        left: what of it lies there.
        sources: folders, as `storage.paths.real` has them; None where it does not say.
        at_work: whether a job holds its target.
        uploads: whether it puts something into a store.
    """

    left: Path
    sources: frozenset[str] | None
    at_work: bool = False
    uploads: bool = False

    def why_kept(self, folders: AbstractSet[str]) -> str | None:
        """Why a checkpoint, which lies in these folders, stays; None if this merge needs it not."""
        if self.sources is not None and not folders & self.sources:
            return None
        if self.at_work and self.uploads:
            return f"a job uploads there now, and does not say what it needs ({self.left}): wait"
        if self.at_work:
            return f"a merge at work needs it ({self.left})"
        needs = "needs it" if self.sources is not None else "may need it"
        return f"a merge that was cut off {needs}: finish it, or remove {self.left}"


def unfinished(root: Path, further: Iterable[str]) -> list[Unfinished]:
    """Merges that are not at their end, as far as they may be of the run at `root`.

    Folders beside the run's, and in it down to two levels, are looked at for journals, however
    `root` is spelled. What says nothing of its sources counts where it lies in the run's folder, in
    one beside it that is called after it (`RUN-pma`), or in one of `further`. In a store, where
    outputs are made on a disk, there it is the signs of uploads, and the journals on this machine.

    Raises:
        UsageError: one of `further` is not there.
        OSError: the store does not tell, or a folder in which what says nothing would count cannot
            be looked at.
    """
    for asked in map(path_of, further):
        if not in_store(asked) and not asked.is_dir():
            where = given("averages", asked)
            raise UsageError(f"{where} is not a folder: give one that merges save to")
    ways = spellings(root)
    near, names = beside(root), tuple(f"{way.name}-" for way in ways)
    own = [*ways, *map(path_of, further), *(each for each in near if each.name.startswith(names))]
    stores = [each for each in own if in_store(each)]
    found = {str(each.left): each for folder in stores for each in _uploads(folder)}
    for place in _workplaces(stores):
        for each in _left_in(place):
            if each.sources is not None:
                found.setdefault(str(each.left), each)
    own, near = ([each for each in those if not in_store(each)] for those in (own, near))
    for _ in range(2):
        own = list(dict.fromkeys((*own, *(p for each in own for p in folders_below(each)))))
    for folder, is_own in (*((f, True) for f in own), *((f, False) for f in near)):
        swept = (each for each in folders_below(folder) if _SWEPT.search(each.name))
        for place in (folder, *swept):
            for each in _left_in(place, sure=is_own):
                if each.sources is not None or is_own:
                    found.setdefault(str(real(each.left)), each)
    return list(found.values())


def _uploads(folder: Path) -> Iterator[Unfinished]:
    """Uploads into a folder of a store, or below it: what they need is not said."""
    for sign in signs_below(path_of(str(folder))):
        if not sign.deletes:
            left = sign.folder / UPLOADING_FILE
            yield Unfinished(left, None, at_work=sign.is_fresh, uploads=True)


def _workplaces(stores: Iterable[Path]) -> Iterator[Path]:
    """Folders on this machine in which outputs for the buckets of these folders are made."""
    for bucket in dict.fromkeys(_bucket(each) for each in stores):
        for here, folders, _ in os.walk(workplace(bucket)):
            folders[:] = [name for name in folders if not name.startswith(".pma-")]
            yield path_of(here)


def _bucket(folder: Path) -> Path:
    address = Address.of(str(folder))
    assert address is not None
    return path_of(str(replace(address, key="")))


def unseen(root: Path) -> list[Path]:
    """Folders beside the run at `root` that cannot be looked at, where merges may lie too."""
    if in_store(root):
        return []
    above = {way.parent for way in spellings(root)}
    return [each for each in (*above, *beside(root)) if not os.access(each, os.R_OK | os.X_OK)]


def _left_in(folder: Path, *, sure: bool = False) -> Iterator[Unfinished]:
    """What merges left in a folder; `sure` raises where it cannot be looked at."""
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.startswith(".pma-"))
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError:
        if sure and folder.name != _OF_THE_FILE_SYSTEM:
            raise
        return
    told = set()
    for name in names:
        if name.startswith(JOURNAL):
            sources = _sources(folder / name / JOB_FILE)
            if sources is not None:
                target, _, token = name.removeprefix(JOURNAL).rpartition("-")
                told.add(token)
                yield Unfinished(folder / name, sources, is_held(folder, target))
    for name in names:
        if name.startswith(STAGING):
            target, _, token = name.removeprefix(STAGING).rpartition("-")
            if token not in told and not is_held(folder, target):
                yield Unfinished(folder / name, None)


def _sources(path: Path) -> frozenset[str] | None:
    with contextlib.suppress(CheckpointError, OSError):
        said = read_json(path).get("sources")
        if isinstance(said, list) and all(isinstance(each, str) for each in said):
            return frozenset(map(paths.real, said))
    return None
