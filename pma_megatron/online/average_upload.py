"""Where a running average is saved as a checkpoint: a folder, or one on a disk from which rank 0
puts each average into an object store behind training, the trainer's tracker last."""

from __future__ import annotations

import atexit
import logging
import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import folders_in, is_unreadable
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.sizes import sized
from pma_megatron.errors import CheckpointError, PublishError, SelectionError
from pma_megatron.formats import registry
from pma_megatron.formats.contract import Tracker
from pma_megatron.formats.holding import MARKERS
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import (
    MARKER_FILE,
    ONLINE_AVERAGE,
    OWN_FILES,
    UPLOADING_FILE,
    is_merge,
)
from pma_megatron.merging.listing import bytes_in
from pma_megatron.online.average_folder import AverageFolder, not_ours
from pma_megatron.online.one_job import LEFT_ALONE, is_sure, other_job
from pma_megatron.online.remote_folder import is_newer, number_in, said_in, said_on_disk
from pma_megatron.online.removal import hide, is_still, remove_hidden
from pma_megatron.online.shared_folder import refuse_unseen
from pma_megatron.online.uploads import Uploads
from pma_megatron.runs.describe import describe, iteration_of
from pma_megatron.storage.addresses import below
from pma_megatron.storage.paths import in_store, place_of, workplace
from pma_megatron.storage.protocol import Store

_OF_TAGS = "model_states.pt"
_log = logging.getLogger(__name__)
AT_EXIT_S = 600.0
"""What a job that ends gives an average to get to the store: none may come after it."""


class NotSavedError(PublishError):
    """No average is saved this time, which has been told: training goes on."""


class AveragePlace:
    """Where averages are saved; the constructor is collective.

    Attributes:
        root: that folder, or what stands for an address.
        folder: what a trainer is told to save to: `root`, or a folder on a disk.
    """

    def __init__(self, root: str | Path, comm: Comm) -> None:
        """Look at a place; put into a store what an earlier job could not any more.

        Args:
            root: a folder of averages alone, shared by all ranks, or an address.
            comm: the ranks.

        Raises:
            UsageError: an address at which nothing can be put.
            PublishError: the store refuses, or there are checkpoints that are no averages.
        """
        refuse_remote("save_dir", root, stores=True, put=True)
        self.root, self._comm = place_of(root), comm
        self.folder = workplace(self.root)
        self._uploads: AverageUploads | None = None
        self._averages: AverageUploads | AverageFolder | None = None
        self.is_remote = in_store(self.root)
        if self.is_remote and comm.is_main:
            self._averages = self._uploads = AverageUploads(self.root, self.folder)
        elif comm.is_main:
            self._averages = AverageFolder(self.folder)
        comm.on_main("root of averages", self._prepare)
        if self.is_remote:
            refuse_unseen(self.folder, "averages", comm)
            if self._uploads is not None:
                self._uploads.begin()
            atexit.register(self.wait, AT_EXIT_S)

    def begin(self, name: str) -> bool:
        """An average of this name is about to be saved. Every rank calls, all at once.

        One of that name in a store stays there until the upload of the new one begins.

        Returns:
            whether the trainer may delete what its tracker names, as its retention does after a
            save: not what is still to be uploaded, nor what `pma merge` made.

        Raises:
            NotSavedError: none should be, and that has been told; nothing was removed. What lies
                there by now is no average, or another job saves its own there; or the disk has no
                room, as where earlier ones still wait for the store, or fails, and that would end
                the training that saves there.
        """
        why, may_retain = self._comm.on_main(
            "place of the average", lambda: (self._make_room(name), self._may_retain())
        )
        if why is not None:
            raise NotSavedError(why)
        return may_retain

    def saved(self, name: str) -> None:
        """It is whole, its checksums too (rank 0 alone): put it into a store, if it is for one."""
        if self._averages is not None:
            self._averages.saved(name)

    def wait(self, timeout_s: float | None) -> None:
        """Until all is in the store; what is not by then stays on the disk, and is told."""
        if self._uploads is not None:
            self._uploads.wait(timeout_s)

    def _prepare(self) -> None:
        if self._averages is not None:
            self._averages.prepare()

    def _may_retain(self) -> bool:
        return isinstance(self._averages, AverageFolder) and self._averages.may_retain()

    def _make_room(self, name: str) -> str | None:
        why = None if self._averages is None else self._averages.make_room(name)
        if why is not None:
            why = f"no average is saved as {name}: {why}"
            _log.warning("%s", why)
        return why


class AverageUploads(Uploads):
    """The uploads of one run's averages (rank 0 alone)."""

    what = "averages"

    def __init__(self, address: Path, folder: Path) -> None:
        super().__init__(address, folder)
        self._ready: dict[str, int] = {}
        """Name -> number of the save, 0 for what an earlier job left."""
        self._saves = self._pointed_to = self._largest_bytes = 0
        self._has_looked = False
        """Whether what earlier jobs left here was taken up."""

    def prepare(self) -> None:
        """Refuse a place that is not for averages; find what an earlier job left.

        Raises:
            PublishError: the store refuses, or holds other checkpoints.
        """
        try:
            store, root = self._place()
            if not root:
                raise PublishError(
                    f"{self.address} is a whole bucket: name a folder in it, for averages alone"
                )
            others = _others(store, root)
        except OSError as error:
            raise PublishError(f"averages cannot go to {self.address}: {error}") from error
        if others:
            raise PublishError(not_ours(f"{self.address}/{others[0]}"))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            other = self._other_job()
        except OSError as error:
            raise PublishError(f"cannot make {self.folder}: {error.strerror}") from error
        if other is not None:
            _log.warning(
                "%s. What lies there stays as it is, and this job saves no average before that one "
                "has ended: end one of the two, or give one of them another address",
                other,
            )

    def _other_job(self) -> str | None:
        """Which other job saves averages here; where none does, what such jobs left is taken up.

        Raises:
            OSError: the disk fails.
        """
        other = other_job(self.folder)
        if other is not None:
            return f"another job{other} saves averages for {self.address} in {self.folder}"
        if not self._has_looked:
            remove_hidden(self.folder)
            for each in folders_in(self.folder):
                if not each.name.startswith("."):
                    self._take_up(each)
            self._has_looked = True
        return None

    def _take_up(self, folder: Path) -> None:
        """Put there what an earlier job left, if it is whole; remove it if it never will be."""
        try:
            is_average = self._is_ours(read_json(folder / MARKER_FILE))
            ref = describe(folder) if is_average else None
            unreadable = ref is not None and ref.unreadable
        except CheckpointError as error:
            is_average, ref, unreadable = False, None, is_unreadable(error)
        if unreadable:
            _log.warning(
                "%s, left by an earlier job, cannot be read now: it is not uploaded to %s, and is "
                "looked at again by the next job",
                folder,
                self.address,
            )
        elif ref is not None and ref.complete:
            self._ready[folder.name] = 0
            self._largest_bytes = max(self._largest_bytes, bytes_in(folder))
        elif (
            is_average
            or iteration_of(folder) is not None
            or registry.detect(folder) == registry.DEEPSPEED
        ):
            if not is_sure(self.folder):
                _log.warning(LEFT_ALONE, folder)
            elif self._let_go(folder) is None:
                _log.warning("removed %s, left by a job that was cut off while it saved", folder)

    def saved(self, name: str) -> None:
        """Put that one there; returns at once. What does not say that it is an average stays on the
        disk, which is told: in the store the next job would be refused for it."""
        folder = self.folder / name
        if not self._is_ours(said_on_disk(folder)):
            _log.warning(
                "%s is not uploaded to %s: it has no %s that says that it is an average. Copy it "
                "before another job saves there, which removes it",
                folder,
                self.address,
                MARKER_FILE,
            )
            return
        nbytes = bytes_in(folder)
        with self._lock:
            self._saves += 1
            self._ready[name] = self._saves
            self._largest_bytes = max(self._largest_bytes, nbytes)
        self.made(name)
        self.begin()

    def make_room(self, name: str) -> str | None:
        """Remove what has this name on the disk, if another one fits there then.

        Returns:
            why none should be saved; None where it is.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            other = self._other_job()
            if other is not None:
                return other
            waiting = [each.name for each in self._waiting() if each.name != name]
            needed = self._largest_bytes
            disk = shutil.disk_usage(self.folder)
            free = disk.free + bytes_in(self.folder / name)
        except (OSError, SelectionError) as error:
            return f"{self.folder} fails: {error}"
        # With others that wait, what training itself saves may be next on that disk.
        if disk.total and free < needed + (needed // 4 if waiting else 0):  # some tell nothing
            waits = f"{', '.join(waiting)} still wait to be uploaded from there to {self.address}, "
            return (
                f"{waits if waiting else ''}an average takes {sized(needed)}, and "
                f"{sized(free)} are free in {self.folder}. Look at the store, or set "
                "PMA_MEGATRON_SPOOL to a larger disk"
            )
        with self._lock:
            self._ready.pop(name, None)
        if self._let_go(self.folder / name) is None:
            return None
        return f"what is at {self.folder / name} cannot be removed"

    def _whole(self) -> list[Path]:
        with self._lock:
            # Another job on this disk, or a person who has copied it, may have removed one.
            gone = [name for name in self._ready if not (self.folder / name).is_dir()]
            for name in gone:
                del self._ready[name]
            order = {name: (save, number_in(name), name) for name, save in self._ready.items()}
        return [self.folder / name for name in sorted(order, key=order.__getitem__)]

    def _is_due(self, folder: Path) -> bool:
        return folder.name in self._ready

    def _may_go(self, folder: Path) -> bool:
        return True  # the folder is for averages alone, and one that was cut off bears no mark

    def _is_ours(self, said: Mapping[str, Any]) -> bool:
        return said.get("kind") == ONLINE_AVERAGE

    def _is_there(self, folder: Path, held: Path) -> None:
        store, root = self._place()
        self._point_to(store, root, folder, held)
        with self._lock:
            if not is_still(folder, held):
                return  # it is being saved anew
            hidden = hide(folder)
            self._ready.pop(folder.name, None)
        shutil.rmtree(hidden, ignore_errors=True)

    def _point_to(self, store: Store, root: str, folder: Path, held: Path) -> None:
        """Have a trainer resume from it: what lies beside the averages first, the tracker last."""
        known = registry.get(registry.detect(held), str(folder)).tracker
        content = known.content_of(folder.name)
        trackers = {each.tracker.file for each in registry.FORMATS}
        beside = [each for each in sorted(self.folder.iterdir()) if each.is_file()]
        for path in (each for each in beside if not each.name.startswith(".")):
            if path.name not in trackers:
                store.put_file(below(root, path.name), path)
            path.unlink(missing_ok=True)
        if known.file is None or content is None:
            return
        save = self._ready.get(folder.name, 0)
        if save < self._pointed_to or (not save and self._saves):
            return  # training has saved a later one since, whatever its number
        if not save and not self._leads(store, root, known, folder.name, said_on_disk(held)):
            return
        self._pointed_to = save
        store.put(below(root, known.file), content.encode())

    def _leads(
        self, store: Store, root: str, known: Tracker, name: str, here: Mapping[str, Any]
    ) -> bool:
        """Whether an average that an earlier job left is to be resumed from, instead of the one
        that the tracker names now."""
        assert known.file is not None
        try:
            content = store.got(below(root, known.file))[1].decode(errors="replace").strip()
        except FileNotFoundError:
            _log.warning(
                "%s/%s was left by an earlier job and is there now, but no %s, which names the "
                "average to resume from: the next average that is saved gets it",
                self.address,
                name,
                known.file,
            )
            return False
        named = known.folder_of(content)
        there = {} if named is None else said_in(store, below(root, named))
        if not self._is_ours(there):
            return True  # it names none that is there
        if "created" in here and "created" in there:
            return is_newer(here, there)
        return number_in(name) > number_in(named or "")


def _others(store: Store, root: str) -> list[str]:
    """Folders at `root` with checkpoints that are no averages, whole or begun."""
    inside: dict[str, set[str]] = {}
    for each in store.listed(below(root)):
        name, _, rest = each.key.removeprefix(below(root)).partition("/")
        if rest:
            inside.setdefault(name, set()).add(rest)
    found = {}
    for name, files in sorted(inside.items()):
        if UPLOADING_FILE not in files and (_is_begun(name, files) or _is_whole(files)):
            said = said_in(store, below(root, name))
            found[name] = said.get("kind") == ONLINE_AVERAGE or is_merge(said)
    # Where averages are, what is begun may be what is left of one that was deleted.
    is_of_averages = any(found.values())
    return [
        name
        for name, is_average in found.items()
        if not is_average and (_is_whole(inside[name]) or not is_of_averages)
    ]


def _is_begun(name: str, files: Set[str]) -> bool:
    return iteration_of(Path(name)) is not None and bool(files - OWN_FILES)


def _is_whole(files: Set[str]) -> bool:
    """Whether a checkpoint may be: these are what makes one whole, or one of the parts of a tag."""
    return any("/" not in file and (file in MARKERS or file.endswith(_OF_TAGS)) for file in files)
