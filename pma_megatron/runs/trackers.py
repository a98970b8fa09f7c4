"""The file of a root that says which checkpoint training resumes from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pma_megatron.base.openfiles import is_folder, read_source_file, why_closed
from pma_megatron.errors import CheckpointError
from pma_megatron.formats import registry
from pma_megatron.formats.contract import Tracker

_MAX_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a tracker says.

    Attributes:
        file: its name.
        folder: name of the checkpoint's folder; None where it names nothing that is there.
        problem: what is wrong with it, to complete "/run ..."; None where it names a folder.
        missing: whether there is no such file.
        named: the name in it, whatever lies there; None where it is no checkpoint's name.
    """

    file: str
    folder: str | None
    problem: str | None = None
    missing: bool = False
    named: str | None = None


def read_pointers(root: Path) -> dict[str, Pointer]:
    """By format, what the tracker of `root` says: a root may hold those of several trainers.

    A format whose trainers do without is not in it where there is none.
    """
    named = ((known.name, known.tracker, known.tracker.file) for known in registry.FORMATS)
    read = {name: (_read(root, t, file), t) for name, t, file in named if file is not None}
    return {name: p for name, (p, t) in read.items() if not (p.missing and t.optional)}


def _read(root: Path, tracker: Tracker, file: str) -> Pointer:
    path = root / file
    try:
        content = read_source_file(path, _MAX_BYTES).decode().strip()
    except UnicodeDecodeError:
        return Pointer(file, None, f"has a {file} that cannot be read (it is not text)")
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return Pointer(file, None, f"has no {file}", missing=True)
        if isinstance(error.__cause__, NotADirectoryError):
            return Pointer(file, None, "is a file, and checkpoints are folders")
        why = why_closed(root)
        if why is not None:
            told = f"cannot be looked into ({why}): ask for the right to, or give another"
            return Pointer(file, None, told)
        return Pointer(file, None, f"has a {file} that cannot be read ({error})")
    folder = tracker.folder_of(content)
    if folder is None or folder in (".", "..") or "/" in folder or "\0" in folder:
        return Pointer(file, None, f"has a {file} that says {content[:80]!r}, no checkpoint's name")
    if not is_folder(root / folder):
        problem = f"has a {file} that names {folder!r}, which is not there"
        if os.path.lexists(root / folder):
            problem = f"has a {file} that names {folder!r}, which is no folder"
        return Pointer(file, None, problem, named=folder)
    return Pointer(file, folder, named=folder)
