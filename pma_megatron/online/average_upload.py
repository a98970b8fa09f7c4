"""Where a running average is saved as a checkpoint: a folder, or one on a disk from which rank 0
puts each average into an object store behind training, the trainer's tracker last."""

from __future__ import annotations

import atexit
import contextlib
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pma_megatron.base.comm import Comm
from pma_megatron.base.openfiles import folders_in
from pma_megatron.base.remote_paths import refuse_remote
from pma_megatron.base.sizes import sized
from pma_megatron.errors import CheckpointError, PublishError
from pma_megatron.formats import registry
from pma_megatron.formats.holding import MARKERS
from pma_megatron.formats.json_files import read_json
from pma_megatron.formats.marker import MARKER_FILE, ONLINE_AVERAGE, UPLOADING_FILE
from pma_megatron.online.uploads import Uploads, refuse_unseen, remove
from pma_megatron.runs.describe import describe, iteration_of
from pma_megatron.storage.addresses import below
from pma_megatron.storage.paths import in_store, place_of, workplace
from pma_megatron.storage.protocol import Store

_NUMBER = re.compile(r"\d+")
_OF_TAGS = "model_states.pt"
_log = logging.getLogger(__name__)
AT_EXIT_S = 600.0
"""What a job that ends gives an average to get to the store: none may come after it."""


class NoRoomError(PublishError):
    """Earlier averages that wait for a store leave no room for another one."""


class AveragePlace:
    """Where averages are saved; the constructor is collective.

    Attributes:
        root: that folder, or what stands for an address.
        folder: what a trainer is told to save to: `root`, or a folder on a disk.
    """

    def __init__(self, root: str | Path, comm: Comm) -> None:
        """Look at a place in a store, and put there what an earlier job could not any more.

        Args:
            root: a folder of averages alone, shared by all ranks, or an address.
            comm: the ranks.

        Raises:
            UsageError: an address at which nothing can be put.
            PublishError: the store refuses, or holds checkpoints that are no averages.
        """
        refuse_remote("save_dir", root, stores=True, put=True)
        self.root, self._comm = place_of(root), comm
        self.folder = workplace(self.root)
        self._uploads: AverageUploads | None = None
        self.is_remote = in_store(self.root)
        if self.is_remote and comm.is_main:
            self._uploads = AverageUploads(self.root, self.folder)
        comm.on_main("root of averages", self._prepare)
        if self.is_remote:
            refuse_unseen(self.folder, "averages", comm)
            if self._uploads is not None:
                self._uploads.begin()
            atexit.register(self.wait, AT_EXIT_S)

    def begin(self, name: str) -> None:
        """An average of this name is about to be saved. Every rank calls, all at once.

        Raises:
            NoRoomError: none should be: earlier ones still wait for the store, and a full disk
                would end the training that saves there. It has been told.
        """
        why = self._comm.on_main("place of the average", lambda: self._make_room(name))
        if why is not None:
            raise NoRoomError(why)

    def saved(self, name: str) -> None:
        """It is whole, its checksums too (rank 0 alone): put it into the store."""
        if self._uploads is not None:
            self._uploads.saved(name)

    def wait(self, timeout_s: float | None) -> None:
        """Until all is in the store; what is not by then stays on the disk, and is told."""
        if self._uploads is not None:
            self._uploads.wait(timeout_s)

    def _prepare(self) -> None:
        if self._uploads is not None:
            self._uploads.prepare()

    def _make_room(self, name: str) -> str | None:
        if self._uploads is None:
            return None
        self._uploads.give_up([name])
        shutil.rmtree(self.folder / name, ignore_errors=True)  # cut off while it was saved
        waiting, needed = self._uploads.waiting()
        free = shutil.disk_usage(self.folder).free
        if not waiting or free > needed + needed // 4:
            return None
        why = (
            f"no average is saved as {name}: {', '.join(waiting)} still wait to be uploaded from "
            f"{self.folder} to {self.root}, an average takes {sized(needed)}, and {sized(free)} "
            "are free there. Look at the store, or set PMA_MEGATRON_SPOOL to a larger disk"
        )
        _log.warning("%s", why)
        return why


class AverageUploads(Uploads):
    """The uploads of one run's averages (rank 0 alone)."""

    what = "averages"

    def __init__(self, address: Path, folder: Path) -> None:
        super().__init__(address, folder)
        self._ready: dict[str, int] = {}
        """Name -> number of the save, 0 for what an earlier job left."""
        self._saves = self._pointed_to = 0

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
            raise PublishError(
                f"{self.address}/{others[0]} is a checkpoint that is not an average (it has no "
                f"{MARKER_FILE}): an average saved beside it could take its place, and that of a "
                "trainer's tracker. Give averages a place of their own"
            )
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PublishError(f"cannot make {self.folder}: {error.strerror}") from error
        for each in folders_in(self.folder):
            kind = _kind(each)
            if kind == ONLINE_AVERAGE and describe(each).complete:
                self._ready[each.name] = 0
            elif kind == ONLINE_AVERAGE or iteration_of(each) is not None:
                _log.warning("removed %s, left by a job that was cut off while it saved", each)
                self._remove(each)

    def saved(self, name: str) -> None:
        """Put that one there; returns at once."""
        with self._lock:
            self._saves += 1
            self._ready[name] = self._saves
        self.begin()

    def waiting(self) -> tuple[list[str], int]:
        """Those that are not there yet, and the bytes of the largest."""
        sizes: dict[str, int] = {}
        for each in self._whole():
            with contextlib.suppress(OSError):  # it got there meanwhile, and is being removed
                files = (path for path in each.rglob("*") if path.is_file())
                sizes[each.name] = sum(path.stat().st_size for path in files)
        return [*sizes], max(sizes.values(), default=0)

    def _whole(self) -> list[Path]:
        with self._lock:
            order = {name: (save, _number(name), name) for name, save in self._ready.items()}
            names = sorted(order, key=order.__getitem__)
        return [self.folder / name for name in names]

    def _is_due(self, folder: Path) -> bool:
        return folder.name in self._ready

    def _is_ours(self, said: Mapping[str, Any]) -> bool:
        return said.get("kind") == ONLINE_AVERAGE

    def _is_there(self, folder: Path, held: Path) -> None:
        store, root = self._place()
        self._point_to(store, root, folder)
        self._remove(folder)

    def _remove(self, folder: Path) -> None:
        with self._lock:
            self._ready.pop(folder.name, None)
        if folder.is_dir():
            remove(folder)

    def _point_to(self, store: Store, root: str, folder: Path) -> None:
        """Have a trainer resume from it: what lies beside the averages first, the tracker last."""
        known = registry.get(registry.detect(folder), str(folder)).tracker
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
        self._pointed_to = save
        if not save:  # of an earlier job: a newer one may be there by now
            with contextlib.suppress(FileNotFoundError):
                there = store.got(below(root, known.file))[1].decode(errors="replace")
                if _number(there) >= _number(content):
                    return
        store.put(below(root, known.file), content.encode())


def _others(store: Store, root: str) -> list[str]:
    """Folders at `root` with checkpoints that are no averages."""
    inside: dict[str, set[str]] = {}
    for each in store.listed(below(root)):
        name, _, rest = each.key.removeprefix(below(root)).partition("/")
        if rest and "/" not in rest:
            inside.setdefault(name, set()).add(rest)
    return [
        name
        for name, files in sorted(inside.items())
        if not files & {MARKER_FILE, UPLOADING_FILE}
        and any(file in MARKERS or file.endswith(_OF_TAGS) for file in files)
    ]


def _kind(folder: Path) -> Any:
    """What the mark of a folder on the disk says that it is; None without one."""
    try:
        return read_json(folder / MARKER_FILE).get("kind")
    except CheckpointError:
        return None


def _number(text: str) -> int:
    found = _NUMBER.findall(text)
    return int(found[-1]) if found else -1
