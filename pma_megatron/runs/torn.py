"""Saves that lack what their trainer has put into the others of the run: cut off, or at work.

A trainer's folder is known by what lies in it (`formats.trainers`), so one that lacks a part of it
is known only by the whole ones beside it: it is called as they are, or has the other part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.marker import SNAPSHOTS
from pma_megatron.formats.trainers.nvidia import is_copy
from pma_megatron.formats.trainers.saves import TRAINERS, Save, named_inside, save_of
from pma_megatron.formats.trainers.trainer import Trainer
from pma_megatron.runs.describe import describe
from pma_megatron.runs.refs import CheckpointRef
from pma_megatron.storage.paths import path_of

_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def torn_saves(root: Path, refs: Iterable[CheckpointRef]) -> Iterator[CheckpointRef]:
    """References to the saves of a root that its trainers have not ended, all incomplete.

    Args:
        root: a run's folder.
        refs: what is known to lie there. One of the same path is replaced by what is returned.

    Raises:
        OSError: the root cannot be read.
    """
    full = [ref for ref in refs if not ref.snapshot]
    saves = [(save_of(path_of(ref.path), ref.format), ref) for ref in full]
    for name, trainer in TRAINERS.items():
        own = [(save, ref) for save, ref in saves if save.by == name]
        if own and trainer.inside is None:
            others = (ref for save, ref in saves if save.by is None)
            yield from (_without(ref, trainer) for ref in others if _is_its_too(ref, trainer))
        elif own:
            begun = (*trainer.formats, "unknown")
            taken = {
                save.folder.name
                for save, ref in saves
                if ref.complete or save.by is not None or ref.format not in begun
            }
            yield from _below(root, trainer, own, taken)


def _is_its_too(ref: CheckpointRef, trainer: Trainer) -> bool:
    """Without arguments in the checkpoint: Megatron-LM, which may share the root, keeps them."""
    if not ref.complete or ref.format not in trainer.formats:
        return False
    try:
        return not registry.get(ref.format, ref.path).common(path_of(ref.path))["args"]
    except CheckpointError:
        return False


def _below(
    root: Path, trainer: Trainer, own: Sequence[tuple[Save, CheckpointRef]], taken: set[str]
) -> Iterator[CheckpointRef]:
    numbers = {save.folder.name: ref.iteration for save, ref in own}
    folders = {name: root / name for name in numbers}
    shapes = {_NUMBER.sub("#", name) for name in numbers}
    for folder in sorted(root.iterdir()):
        hidden = folder.name.startswith(".") or folder.name == SNAPSHOTS
        if hidden or folder.name in taken or not is_folder(folder) or is_copy(folder, folders):
            continue
        inside = named_inside(folder, trainer)
        alike = _NUMBER.sub("#", folder.name) in shapes and _is_begun(folder, inside, trainer)
        if not alike and not any(trainer.is_its(folder, path) for path in inside):
            continue
        ref = describe(inside[0] if len(inside) == 1 else folder)
        if ref.iteration is None:
            ref = replace(ref, iteration=_iteration_like(folder.name, numbers))
        if inside:
            ref = replace(ref, saved_in=str(folder))
        yield _without(ref, trainer)


def _is_begun(folder: Path, inside: Sequence[Path], trainer: Trainer) -> bool:
    """Whether something of a trainer's save is there, or nothing at all yet: others use numbers."""
    return bool(inside) or (folder / trainer.leaves).exists() or not any(folder.iterdir())


def _without(ref: CheckpointRef, trainer: Trainer) -> CheckpointRef:
    folder, known = path_of(ref.folder), ref.format in trainer.formats
    why = ref.incomplete_because if known and not ref.complete else None
    if why is None:
        there = known and not (folder / trainer.leaves).exists()
        lacking = trainer.leaves if there else "whole checkpoint"
        why = f"it has no {lacking}, as other saves of {trainer.name} here do: "
        why += "still being written, or cut off"
    return replace(
        ref,
        complete=False,
        incomplete_because=why,
        writing=True,
        consumed_samples=None,
        consumed_tokens=None,
        tokens_unknown_because="the checkpoint is not complete",
        warning=None,
    )


def _iteration_like(name: str, known: dict[str, int | None]) -> int | None:
    """The iteration that a name says, if it says it as the names of others say theirs.

    A number in a name may be the iteration, one less, or how many saves there have been.
    """
    alike = [
        ([Fraction(number) for number in _NUMBER.findall(other)], iteration)
        for other, iteration in known.items()
        if iteration is not None and _NUMBER.sub("#", other) == _NUMBER.sub("#", name)
    ]
    found = []
    for at, number in enumerate(map(Fraction, _NUMBER.findall(name))):
        points = sorted((numbers[at], iteration) for numbers, iteration in alike)
        line = _line(points)
        if line is not None and (line[0] * number + line[1]).denominator == 1:
            found.append((line[0] != 1, abs(line[1]), int(line[0] * number + line[1])))
    return min(found)[2] if found else None


def _line(points: Sequence[tuple[Fraction, int]]) -> tuple[Fraction, Fraction] | None:
    """Slope and offset of the line through all points, if it rises; one point has slope 1."""
    if not points:
        return None
    (x0, y0), (x1, y1) = points[0], points[-1]
    if len(points) > 1 and (x1 <= x0 or y1 <= y0):
        return None
    slope = Fraction(y1 - y0) / (x1 - x0) if len(points) > 1 else Fraction(1)
    offset = y0 - slope * x0
    if len(points) == 1 and offset not in (0, 1):
        return None
    return (slope, offset) if all(slope * x + offset == y for x, y in points) else None
