"""What lies at a path that is not what was asked for, and what to type instead."""

from __future__ import annotations

import difflib
import fnmatch
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from pma_megatron.base.openfiles import is_folder
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.marker import BRANCHES_FILE, MARKER_FILE, OWN_FILES, SNAPSHOTS
from pma_megatron.formats.trainers.saves import checkpoint_in
from pma_megatron.runs import recovery_log
from pma_megatron.storage.paths import in_store

ITERATION = re.compile(r"^iter_(\d{7,})$")
_TRACKERS = {known.tracker.file for known in registry.FORMATS} - {None}
_NAMED = 5  # entries of a folder that a message names
_OURS = ".pma-"
"""How the names begin of what pma keeps beside checkpoints: staging folders, journals, locks."""
_DEEPEST = 4
"""No folder of a checkpoint lies further below it."""


def is_checkpoint(folder: Path) -> bool:
    """True for a folder with a checkpoint's name, or with a DeepSpeed tag's files (any name)."""
    if ITERATION.match(folder.name) is not None or folder.name == "release":
        return True
    return not folder.name.startswith(".") and registry.detect(folder) in registry.TAGS


def holds_checkpoint(folder: Path) -> bool:
    """True for a checkpoint, however little of it is there; a folder of any use may be a `release`.

    Unlike `is_checkpoint` this is asked of folders above, which nobody chose for a checkpoint.
    """
    if folder.name == "release":
        return registry.detect(folder) != "unknown"
    return is_checkpoint(folder)


def means_something(name: str) -> bool:
    """True for a name by which checkpoints are found, and what pma keeps beside them."""
    known = _TRACKERS | OWN_FILES | {recovery_log.FILE, BRANCHES_FILE}
    return name in known or name.startswith(_OURS) or ITERATION.match(name) is not None


def part_of(folder: Path) -> Path | None:
    """The folder of a checkpoint, or of pma's own, that what is put into `folder` would become
    part of; None if of none.

    A Hugging Face model is one for what lies directly in it alone: trainers save it into the folder
    which has everything else of a run below it.

    Args:
        folder: absolute; it need not be there.
    """
    for below, each in enumerate((folder, *folder.parents)):
        if each.name.startswith(_OURS) or ITERATION.match(each.name) is not None:
            return each
        if os.access(each / MARKER_FILE, os.F_OK):
            return each
        if below < _DEEPEST and is_folder(each):
            inside = checkpoint_in(each)
            if inside is None and holds_checkpoint(each):
                return each
            if inside and (below == 0 or registry.detect(inside) != registry.SAFETENSORS):
                return each
    return None


def what_is(path: Path) -> str:
    """A sentence on a path at which no checkpoint was found, and one on what to give instead."""
    if is_folder(path):
        return _folder(path)
    try:
        if path.exists():
            return _file(path)
    except PermissionError as error:
        return f"{path} cannot be read ({error.strerror}): ask for the right to, or give another"
    except OSError:  # a name that no file can have
        pass
    if in_store(path):
        return (
            f"{path} is not a folder: nothing is stored there. Give the one that training saves to"
        )
    there = next(each for each in path.parents if is_folder(each))
    missing = path.relative_to(there).parts[0]
    near = difflib.get_close_matches(missing, _names(there), n=1, cutoff=0.6)
    if near:
        return f"{path} is not a folder: it does not exist. Did you mean {there / near[0]}?"
    return (
        f"{path} is not a folder: it does not exist ({there} holds: {_some(there)}). Give the "
        "folder that training saves to"
    )


def _file(path: Path) -> str:
    above = path.parent
    if path.name in _TRACKERS:
        return f"{path} says which checkpoint to resume from. Give its folder, {above}"
    inside = next((each for each in path.parents if is_checkpoint(each)), None)
    if inside is not None:
        return (
            f"{path} is a file of one checkpoint, {inside}. Give that, or the run's folder, "
            f"{inside.parent}"
        )
    return (
        f"{path} is a file, and checkpoints are folders (iter_*, or DeepSpeed's tags). Give the "
        "folder that training saves to"
    )


def _folder(path: Path) -> str:
    pickled = [each for each in (path, *_entries(path)) if _is_pickled(each)]
    if pickled:
        try:
            registry.get(registry.PICKLED, str(pickled[0]))
        except CheckpointError as error:
            return f"{pickled[0]} cannot be averaged: {error}"
    if _has(path, "*.safetensors", "*.safetensors.index.json"):
        return (
            f"{path} holds safetensors files and no whole model (model.safetensors, or "
            "model.safetensors.index.json and what it names), or a run's checkpoints beside them "
            f"(found: {_some(path)}). Give the folder of a model, or the one that training saves to"
        )
    inside = next((each for each in path.parents if is_checkpoint(each)), None)
    if inside is not None:
        return (
            f"{path} is a part of the checkpoint {inside}. Give that, or its run, {inside.parent}"
        )
    below = _below(path, is_checkpoint)
    if below:
        more = f" ({len(below)} such folders)" if below[1:] else ""
        return f"{path} holds no checkpoint itself, but {below[0]} does{more}. Give that"
    if _has(path, "mp_rank_*", "*.distcp"):
        return (
            f"{path} holds files of a checkpoint under a name that is not iter_* or release. Give "
            "it its name back"
        )
    return (
        f"{path} holds no iter_* checkpoint and no DeepSpeed tag (found: {_some(path)}). Give the "
        "folder that training saves to"
    )


def _is_pickled(path: Path) -> bool:
    return is_folder(path) and registry.detect(path) == registry.PICKLED


def _below(path: Path, wanted: Callable[[Path], bool]) -> list[Path]:
    """Folders in `path` that hold checkpoints, oldest name first."""
    folders = [each for each in _entries(path) if is_folder(each) and each.name != SNAPSHOTS]
    return [each for each in folders if any(is_folder(p) and wanted(p) for p in _entries(each))]


def _entries(path: Path) -> list[Path]:
    """What a folder holds; nothing where it may not be read."""
    try:
        return sorted(path.iterdir())
    except OSError:
        return []


def _has(path: Path, *patterns: str) -> bool:
    names = _names(path)
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns for name in names)


def _names(path: Path) -> list[str]:
    return [each.name for each in _entries(path)]


def _some(path: Path) -> str:
    names: Iterable[str] = _names(path)[:_NAMED]
    return ", ".join(names) or "nothing"
