"""A folder on a disk in which averages alone are saved.

A trainer's own save bears no mark before it is whole, and one in the background not for a while
after. So rank 0 signs a name before the trainer fills it: a checkpoint that bears neither a mark
nor a sign is somebody else's, and nothing is written beside it.
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

from pma_megatron.base.durable import write_small
from pma_megatron.base.openfiles import folders_in, is_folder, is_unreadable
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.dcp.metadata import METADATA_FILE
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE, SAVING, is_merge
from pma_megatron.formats.trainers.saves import checkpoint_in
from pma_megatron.merging.saved_over import saved_over
from pma_megatron.online.remote_folder import unmake
from pma_megatron.runs.describe import describe
from pma_megatron.runs.folders import ITERATION
from pma_megatron.runs.trackers import read_pointers

WINDOW = "window"
"""Below a root of averages: the state of the window that they are made of."""
_ALONE = ("unknown", registry.SAFETENSORS, registry.PICKLED)
"""Models that stand alone: no tracker names one, and none is called as an average is."""
_Stamp = tuple[tuple[str, int, int, int], ...]
_log = logging.getLogger(__name__)


class AverageFolder:
    """The averages of one run (rank 0 alone).

    Attributes:
        folder: in which they lie.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: set[str] = set()
        """Names of what was seen to be an average."""
        self._merges: dict[str, _Stamp] = {}
        """Name -> when it was made, of what `pma merge` made: it may lie beside averages, and is
        not replaced."""
        self._told: set[str] = set()
        """Names of what may be a rest of one."""

    def prepare(self) -> None:
        """Refuse a folder that holds other checkpoints, or that training saves to.

        Raises:
            PublishError: it does, or cannot be read.
        """
        if self.folder.exists() and not is_folder(self.folder):
            raise PublishError(f"{self.folder} is a file, and averages are saved in a folder")
        try:
            others = self._others()
            if not others:
                self._look_at_signs()
        except (CheckpointError, SelectionError, OSError) as error:
            raise PublishError(f"averages cannot go to {self.folder}: {error}") from error
        if others:
            raise PublishError(self._why_refused(others[0]))
        if self._is_of_averages():
            return
        for pointer in read_pointers(self.folder).values():
            if not (pointer.missing or self._is_signed(pointer.named)):
                raise PublishError(
                    f"{self.folder} holds {pointer.file} and no average: training saves there, or "
                    "did, and that file would name an average from then on. Give averages a folder "
                    "of their own; if averages were saved in this one and are all gone, delete "
                    f"{pointer.file}"
                )

    def make_room(self, name: str) -> str | None:
        """Sign a name, which an average gets now.

        Returns:
            why none should be saved; None where it is.
        """
        self._known.discard(name)
        folder = self.folder / name
        try:
            others = self._others()
            if name in self._merges:
                return f"{folder} is what `pma merge` made, and stays: move it elsewhere"
            if not others and not self._is_average(folder) and _holds_something(folder):
                others = [folder]
            if others:
                return self._why_refused(others[0])
            write_small(self._sign(name), b"an average is being saved by this name\n")
            # The trainer writes over it, perhaps in the background, and may be killed half way.
            unmake(folder)
        except (CheckpointError, SelectionError, OSError) as error:
            return f"{self.folder} fails: {error}"
        return None

    def may_retain(self) -> bool:
        """Whether a trainer's retention, which deletes what its tracker names, finds an average."""
        try:
            names = (pointer.named for pointer in read_pointers(self.folder).values())
            pointed = [self.folder / name for name in names if name is not None]
            self._known -= {each.name for each in pointed}  # a merge may have replaced one since
            if any(each.name in self._merges for each in pointed):
                return False
            return all(self._is_average(each) or not is_folder(each) for each in pointed)
        except (CheckpointError, SelectionError, OSError):
            return False

    def saved(self, name: str) -> None:
        """It says by itself what it is, if nothing went wrong: then it needs no sign."""
        with contextlib.suppress(CheckpointError, OSError):
            if self._is_marked(self.folder / name):
                self._sign(name).unlink(missing_ok=True)

    def _look_at_signs(self) -> None:
        for sign in sorted(self.folder.glob(f"{SAVING}*")):
            folder = self.folder / sign.name.removeprefix(SAVING)
            if self._is_marked(folder) or not is_folder(folder):
                sign.unlink(missing_ok=True)
            else:
                _log.warning(
                    "%s is an average that a job was cut off at while it saved it, and may not be "
                    "whole: the next one by this name replaces it, or delete it, and %s",
                    folder,
                    sign,
                )

    def _others(self) -> list[Path]:
        """Checkpoints that are no averages; where averages are, whole ones: what is left of one
        that Megatron's retention was deleting when the job was killed stops no job."""
        found = sorted(folders_in(self.folder)) if is_folder(self.folder) else []
        # Hundreds may lie here, of thousands of files: what is as it was is not looked at again.
        unread = [each for each in found if not self._is_known_merge(each)]
        self._merges = {each.name: self._merges[each.name] for each in found if each not in unread}
        others = [
            each
            for each in unread
            if _is_checkpoint(each) and not self._is_average(each) and not self._is_merge(each)
        ]
        if not self._is_of_averages():
            return others
        begun = [each for each in others if _is_begun(each)]
        for each in begun:
            if each.name not in self._told:
                self._told.add(each.name)
                _log.warning(
                    "%s is not whole, and no %s in it says that it is an average: it is a rest of "
                    "one, or another job saves there now. No average gets this name: delete it if "
                    "it is a rest",
                    each,
                    MARKER_FILE,
                )
        return [each for each in others if each not in begun]

    def _is_of_averages(self) -> bool:
        return bool(self._known or self._merges) or is_folder(self.folder / WINDOW)

    def _is_average(self, folder: Path) -> bool:
        # A mark may hold the checksums of thousands of files: each is read once. It goes, perhaps
        # first, where retention deletes one just now.
        if folder.name in self._known:
            return True
        if self._is_marked(folder):
            self._known.add(folder.name)
            return True
        return self._is_signed(folder.name)

    def _is_known_merge(self, folder: Path) -> bool:
        stamp = self._merges.get(folder.name)
        # Without a `.metadata` among them, no two files tell what a trainer writes over.
        return stamp is not None and len(stamp) > 1 and _stamp(folder) == stamp

    def _is_merge(self, folder: Path) -> bool:
        stamp = _stamp(folder)
        try:
            made = is_merge(read_json(folder / MARKER_FILE)) and not saved_over(folder, quick=True)
        except CheckpointError as error:
            if is_unreadable(error):
                raise
            return False
        if made:
            self._merges[folder.name] = stamp
        return made

    def _is_marked(self, folder: Path) -> bool:
        try:
            return read_json(folder / MARKER_FILE).get("kind") == ONLINE_AVERAGE
        except CheckpointError as error:
            if is_unreadable(error):
                raise
            return False

    def _is_signed(self, name: str | None) -> bool:
        return name is not None and self._sign(name).is_file()

    def _sign(self, name: str) -> Path:
        return self.folder / f"{SAVING}{name}"

    def _why_refused(self, other: Path) -> str:
        if (other / MARKER_FILE).is_file() or not self._is_of_averages():
            return not_ours(str(other))
        return (
            f"{other} is a checkpoint in a folder of averages, and no {MARKER_FILE} in it says "
            "that it is one: training saves there, or a job was cut off before it could say so. If "
            "it is an average, delete it or move it elsewhere, and start again; else give averages "
            "a folder of their own"
        )


def _stamp(folder: Path) -> _Stamp:
    """What changes where a checkpoint is made anew, or a trainer saves over it."""
    found = []
    for file in (MARKER_FILE, METADATA_FILE):
        with contextlib.suppress(FileNotFoundError):
            status = (folder / file).stat()
            found.append((file, status.st_ino, status.st_size, status.st_mtime_ns))
    return tuple(found)


def not_ours(other: str) -> str:
    """Why no average is saved where `other` lies."""
    return (
        f"{other} is a checkpoint that is not a running average (no {MARKER_FILE} in it says so): "
        "an average saved beside it could take its place, and that of a trainer's tracker. Give "
        "averages a folder of their own"
    )


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint of training, whole or begun, or what was made of one."""
    if folder.name.startswith("."):
        return False
    if ITERATION.match(folder.name) is not None:
        return True
    inside = checkpoint_in(folder)
    return registry.detect(folder if inside is None else inside) not in _ALONE


def _is_begun(folder: Path) -> bool:
    inside = checkpoint_in(folder) or folder
    known = ("unknown", *(each.name for each in registry.FORMATS))
    return registry.detect(inside) in known and not describe(inside).complete


def _holds_something(folder: Path) -> bool:
    return is_folder(folder) and next(folder.iterdir(), None) is not None
