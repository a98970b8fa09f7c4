"""What lies in and around a run's folder, however it is spelled: folders, links that lead in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.runs.folders import ITERATION
from pma_megatron.storage.addresses import below
from pma_megatron.storage.paths import in_store, path_of, stored

_HOPS = 40  # as many links in a row as Linux follows


def real(path: Path | str) -> Path:
    """Where a path leads; links that lead nowhere, or round in a circle, are no error."""
    return path_of(os.path.realpath(path))


def spellings(root: Path) -> list[Path]:
    """Absolute paths of a folder, each without `..`: as it is given, every link of the name, and
    the real one. Each may have other folders beside it."""
    if in_store(root):
        return [root]
    found = [path_of(os.path.normpath(root.absolute()))]
    while found[-1].is_symlink() and len(found) < _HOPS:
        found.append(path_of(os.path.normpath(found[-1].parent / found[-1].readlink())))
    return list(dict.fromkeys((*found, real(root))))


def folders_below(folder: Path) -> list[Path]:
    """Folders in one that are neither hidden nor called as a checkpoint; [] if it is unreadable."""
    try:
        below = sorted(folder.iterdir())
    except OSError:
        return []
    return [p for p in below if not ITERATION.match(p.name) and p.name[0] != "." and is_folder(p)]


def beside(root: Path) -> list[Path]:
    """The folders beside a run's, at each of its spellings; in a store, their names.

    Raises:
        OSError: the store does not tell.
    """
    if in_store(root):
        store, key = stored(root)
        above, _, own = key.rpartition("/")
        names = store.folders(below(above))
        return [root.parent / name for name in names if name != own]
    ways = spellings(root)
    found = (each for way in ways for each in folders_below(way.parent))
    return [each for each in dict.fromkeys(found) if each not in ways]


def links_into(root: Path) -> dict[Path, Path]:
    """Where the links that lead to something in a run's folder end: real path -> link.

    Looked for directly in the run's folder, in those above and beside it, and in the
    `pma_snapshots` of all these.
    """
    if in_store(root):
        return {}
    inside = real(root)
    above = [way.parent for way in spellings(root)]
    found: dict[Path, Path] = {}
    for folder in dict.fromkeys((inside, *above, *beside(root))):
        for place in (folder, folder / SNAPSHOTS):
            for link in _links_in(place):
                end = real(link)
                if inside in end.parents:
                    found.setdefault(end, link)
    return found


def links_between(checkpoints: Iterable[Path]) -> dict[Path, Path]:
    """Which checkpoints hold what another one links to: real path of the first -> such a link."""
    whole = {real(each) for each in checkpoints if not in_store(each)}
    found: dict[Path, Path] = {}
    for own in whole:
        for here, folders, files in os.walk(own):
            for name in (*folders, *files):
                link = path_of(here) / name
                if link.is_symlink():
                    end = real(link)
                    for other in whole.intersection((end, *end.parents)) - {own}:
                        found.setdefault(other, link)
    return found


def leading_to(folder: Path, links: Mapping[Path, Path]) -> Path | None:
    """A link that ends at a folder, given its real path, in it, or at one that holds it."""
    for end, link in links.items():
        if (end == folder or end in folder.parents or folder in end.parents) and (
            folder not in link.parents
        ):
            return link
    return None


def _links_in(folder: Path) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            yield from [folder / entry.name for entry in entries if entry.is_symlink()]
    except OSError:
        return
