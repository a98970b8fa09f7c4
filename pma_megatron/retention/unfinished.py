"""What merges need that are not at their end: the same command goes on with one that was cut off.

A merge that is at work holds its sources (`formats.holding`). One that was killed has left its
staging folder, and beside that a journal which names them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.errors import CheckpointError
from pma_megatron.formats.json_files import read_json
from pma_megatron.merging.leftovers import JOURNAL, STAGING
from pma_megatron.merging.locks import is_held
from pma_megatron.retention.surroundings import beside, folders_below, real, spellings

_JOB = "job.json"
_SWEPT = re.compile(r"-last\d+$")
"""How the folders of a sweep are called, in which its outputs lie."""


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A merge that is at work, or was cut off.

    Attributes:
        left: what of it lies there.
        sources: folders, real paths; None where it does not say.
        at_work: whether a job holds its target.
    """

    left: Path
    sources: frozenset[Path] | None
    at_work: bool = False

    def why_kept(self, folders: AbstractSet[Path]) -> str | None:
        """Why a checkpoint, which lies in these folders, stays; None if this merge needs it not."""
        if self.sources is not None and not folders & self.sources:
            return None
        if self.at_work:
            return f"a merge at work needs it ({self.left})"
        needs = "needs it" if self.sources is not None else "may need it"
        return f"a merge that was cut off {needs}: finish it, or remove {self.left}"


def unfinished(root: Path, further: Iterable[str]) -> list[Unfinished]:
    """Merges that are not at their end, as far as they may be of the run at `root`.

    Folders beside the run's, and in it down to two levels, are looked at for journals, however
    `root` is spelled. What says nothing of its sources counts where it lies in the run's folder, in
    one beside it that is called after it (`RUN-pma`), or in one of `further`.
    """
    ways = spellings(root)
    near, names = beside(root), tuple(f"{way.name}-" for way in ways)
    own = [*ways, *map(Path, further), *(each for each in near if each.name.startswith(names))]
    for _ in range(2):
        own = list(dict.fromkeys((*own, *(p for each in own for p in folders_below(each)))))
    found: dict[Path, Unfinished] = {}
    for folder, is_own in (*((f, True) for f in own), *((f, False) for f in near)):
        swept = (each for each in folders_below(folder) if _SWEPT.search(each.name))
        for place in (folder, *swept):
            for each in _left_in(place):
                if each.sources is not None or is_own:
                    found.setdefault(real(each.left), each)
    return list(found.values())


def _left_in(folder: Path) -> Iterator[Unfinished]:
    try:
        names = sorted(path.name for path in folder.iterdir() if path.name.startswith(".pma-"))
    except OSError:
        return
    told = set()
    for name in names:
        if name.startswith(JOURNAL):
            sources = _sources(folder / name / _JOB)
            if sources is not None:
                target, _, token = name.removeprefix(JOURNAL).rpartition("-")
                told.add(token)
                yield Unfinished(folder / name, sources, is_held(folder, target))
    for name in names:
        if name.startswith(STAGING):
            target, _, token = name.removeprefix(STAGING).rpartition("-")
            if token not in told and not is_held(folder, target):
                yield Unfinished(folder / name, None)


def _sources(path: Path) -> frozenset[Path] | None:
    with contextlib.suppress(CheckpointError, OSError):
        said = read_json(path).get("sources")
        if isinstance(said, list) and all(isinstance(each, str) for each in said):
            return frozenset(map(real, said))
    return None
