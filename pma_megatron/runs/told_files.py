"""Files and folders that a command is told to write: never part of a checkpoint, and never in the
place of what is somebody else's.

What can be refused at once is, before anything is imported that takes seconds.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pma_megatron.base.durable import is_stream, replace_file
from pma_megatron.base.openfiles import is_folder, read_source_file
from pma_megatron.errors import CheckpointError, UsageError
from pma_megatron.storage.paths import path_of

_LONGEST_NAME = 255  # of file systems in use; some count characters


@dataclass(frozen=True, slots=True)
class Kind:
    """What a file is that a new one may take the place of.

    Attributes:
        name: for messages, without an article.
        is_one: whether the file at a path is one; it may raise CheckpointError.
    """

    name: str
    is_one: Callable[[Path], bool]


def beginning(name: str, *starts: bytes) -> Kind:
    """Files whose first bytes, letters of any case, are one of `starts`."""

    def is_one(path: Path) -> bool:
        with path.open("rb") as stream:
            return stream.read(max(map(len, starts))).lower().startswith(starts)

    return Kind(name, is_one)


def json_with(name: str, keys: Collection[str]) -> Kind:
    """Objects in JSON that have all of `keys`."""

    def is_one(path: Path) -> bool:
        try:
            value = json.loads(read_source_file(path))
        except (ValueError, RecursionError):
            return False
        return isinstance(value, dict) and set(keys) <= value.keys()

    return Kind(name, is_one)


SCORES = json_with("scores of pma evaluate", ("scores_version", "points"))


def refuse_file(what: str, path: Path, kind: Kind, made: Iterable[Path] = ()) -> None:
    """Refuse a file that could not be written at the end, or that would do damage.

    Args:
        what: the setting with its value, spelled.
        path: the file; what it names if it is a link.
        kind: what it may take the place of, beside a file without content.
        made: folders that the same command makes before it writes the file.

    Only the rank that writes it looks: others may be on machines that have no such folder.

    Raises:
        UsageError: saying what to do.
    """
    if not _is_writer():
        return
    if is_stream(path):
        if path.is_socket():
            raise UsageError(f"{what} is a socket, which cannot be opened: name a file or a pipe")
        return
    target = path_of(os.path.realpath(path))
    there = is_folder(target.parent)
    if not there and target.parent not in (path_of(os.path.realpath(each)) for each in made):
        raise UsageError(f"{what}: the folder {path.parent} does not exist: make it")
    if is_folder(target):
        raise UsageError(f"{what} is a folder: name a file")
    if os.path.lexists(target):
        _refuse_irreplaceable(what, target)
    elif len(os.fsencode(target.name)) > _LONGEST_NAME:
        raise UsageError(f"{what}: a name has at most {_LONGEST_NAME} bytes: a shorter one")
    if there:
        _refuse_closed(what, target.parent)
    refuse_part(what, {_absolute(path).parent, target.parent})
    _refuse_name(what, path.name, target.name)
    try:
        other = os.path.lexists(target) and target.stat().st_size and not kind.is_one(target)
    except (OSError, CheckpointError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"{what} is there and cannot be read ({why}): another file") from error
    if other:
        raise UsageError(f"{what} is there and no {kind.name}: another file, or remove that one")


def refuse_folder(what: str, path: Path, made: Iterable[str | Path] = ()) -> None:
    """Refuse a folder into which files could not be written, or where they would do damage.

    Args:
        what: the setting with its value, spelled.
        path: the folder, which need not be there.
        made: folders that the same command makes.

    Only the rank that writes there looks, as with a file.

    Raises:
        UsageError: saying what to do.
    """
    if not _is_writer():
        return
    if any(len(os.fsencode(part)) > _LONGEST_NAME for part in path.parts):
        raise UsageError(f"{what}: a name has at most {_LONGEST_NAME} bytes: a shorter one")
    places = {_absolute(path), path_of(os.path.realpath(path))}
    there = next(p for p in (path, *_absolute(path).parents) if os.path.lexists(p))
    if not is_folder(there):
        raise UsageError(f"{what}: {there} is a file: name a folder")
    for each in made:
        folder = path_of(os.path.realpath(each))
        if any(folder in (place, *place.parents) for place in places):
            raise UsageError(f"{what} lies in {each}, which this command makes: elsewhere")
    _refuse_closed(what, there)
    refuse_part(what, places)


def refuse_part(what: str, folders: Iterable[Path]) -> None:
    """Refuse folders that are part of a checkpoint, or would be.

    Args:
        what: the setting with its value, spelled.
        folders: absolute ones, which need not be there.

    Raises:
        UsageError: naming the checkpoint.
    """
    from pma_megatron.runs.folders import part_of  # imports torch

    for whole in filter(None, map(part_of, sorted(folders))):
        raise UsageError(
            f"{what} lies in {whole}, a checkpoint or what pma wrote, where no other file may be: "
            "elsewhere"
        )


def write_file(what: str, path: Path, data: bytes) -> None:
    """Write a file whole, or leave what is there as it is.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        replace_file(path, data)
    except OSError as error:
        raise UsageError(f"{what} cannot be written: {error.strerror}") from error


def write_json(what: str, path: Path, value: Any) -> None:
    """Write a value as JSON, as `write_file` does."""
    write_file(what, path, (json.dumps(value, indent=1) + "\n").encode())


def _absolute(path: Path) -> Path:
    """Without `..`, and with the links in it as they are."""
    return path_of(os.path.normpath(path.absolute()))


def _is_writer() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _refuse_irreplaceable(what: str, target: Path) -> None:
    """What is no plain file would be gone, and what is write-protected is so for a reason."""
    mode = target.lstat().st_mode
    if stat.S_ISLNK(mode):
        return  # to itself: it cannot be read, which is said
    if not stat.S_ISREG(mode):
        raise UsageError(f"{what} is a device and no plain file: name a file")
    if not mode & 0o222 or not os.access(target, os.W_OK):
        raise UsageError(f"{what} is there and write-protected: another file, or chmod u+w")


def _refuse_closed(what: str, folder: Path) -> None:
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(
            f"{what}: you may not write into {folder}: ask for the right to, or name another place"
        )


def _refuse_name(what: str, *names: str) -> None:
    from pma_megatron.runs.folders import means_something  # imports torch

    if any(map(means_something, names)):
        raise UsageError(
            f"{what}: by files of that name checkpoints are found, or what became of them: choose "
            "another name"
        )
