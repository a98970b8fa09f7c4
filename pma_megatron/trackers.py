"""The file of a root that says which checkpoint training resumes from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pma_megatron.formats import registry
from pma_megatron.formats.registry import Tracker


@dataclass(frozen=True, slots=True)
class Pointer:
    """What a tracker says.

    Attributes:
        file: its name.
        folder: name of the checkpoint's folder; None where it names nothing that is there.
        problem: what is wrong with it, to complete "/run ..."; None where it names a folder.
        missing: whether there is no such file.
    """

    file: str
    folder: str | None
    problem: str | None = None
    missing: bool = False


def read_pointers(root: Path) -> dict[str, Pointer]:
    """By format, what the tracker of `root` says: a root may hold those of several trainers."""
    return {known.name: _read(root, known.tracker) for known in registry.FORMATS}


def _read(root: Path, tracker: Tracker) -> Pointer:
    path, file = root / tracker.file, tracker.file
    try:
        content = path.read_text().strip()
    except FileNotFoundError:
        return Pointer(file, None, f"has no {file}", missing=True)
    except (OSError, UnicodeDecodeError) as error:
        because = error.strerror if isinstance(error, OSError) else "it is not text"
        return Pointer(file, None, f"has a {file} that cannot be read ({because})")
    folder = tracker.folder_of(content)
    if folder is None or folder in (".", "..") or "/" in folder or "\0" in folder:
        return Pointer(file, None, f"has a {file} that says {content[:80]!r}, no checkpoint's name")
    if not _is_there(root / folder):
        return Pointer(file, None, f"has a {file} that names {folder!r}, which is not there")
    return Pointer(file, folder)


def _is_there(folder: Path) -> bool:
    try:
        return folder.is_dir()
    except OSError:
        return False
