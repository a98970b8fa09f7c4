"""A folder of this process that stands for what object stores hold.

Below `mirror/` lies a file for every object under an address that was asked for, empty, but as long
and as old as the object: whatever lists folders and looks at sizes and times works there as it does
anywhere. What a file holds lies elsewhere (`contents`), and is fetched when it is read:
`base.openfiles` opens that. The fraction of a second of a file's time is made of the object's
version, so that another object of the same length and second has another time.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import itertools
import logging
import multiprocessing.util
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pma_megatron.errors import SelectionError
from pma_megatron.storage.addresses import Address, above, below, is_strange, opened
from pma_megatron.storage.contents import Content, Contents, Range
from pma_megatron.storage.folders import VARIABLE as VARIABLE
from pma_megatron.storage.folders import held, share_bytes, spool_folder, stand_in
from pma_megatron.storage.protocol import PART_BYTES, Object, Store

_OUTPUTS = "outputs"
_ABOVE = 2  # folders above the one asked for: snapshots lie two below their run's
_OF_EACH = 4 * PART_BYTES  # of a folder that is read from its beginning on, beside others
_log = logging.getLogger(__name__)


def workplace(address: Address) -> Path:
    """Where outputs for an address are made, the same for all processes of this user here."""
    return spool_folder() / _OUTPUTS / address.scheme / address.bucket / address.key


@dataclass(slots=True)
class _Mirrored:
    """One object, the file that stands for it, and what was fetched of it."""

    store: Store
    said: Object
    content: Content | None = None
    inode: tuple[int, int] = (0, 0)
    whole: list[int] = field(default_factory=list)


class Spool:
    """The mirrors and contents of one process. Threads share it.

    Attributes:
        folder: all of it.
        mirror: what stands for the stores: `mirror/s3/bucket/key`.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self.folder, self._held = held()
        self.mirror = self.folder / "mirror"
        self.mirror.mkdir()
        (self.folder / "content").mkdir()
        self._lock = threading.RLock()
        self._files: dict[str, _Mirrored] = {}
        self._by_inode: dict[tuple[int, int], _Mirrored] = {}
        self._listed: dict[str, int] = {}
        self._seen: dict[str, int] = {}
        self._numbers = itertools.count()
        self.contents = Contents(share_bytes(self.folder))

    def path(self, address: Address) -> str:
        """The file or folder that stands for an address."""
        return str(self.mirror / address.scheme / address.bucket / address.key)

    def look(self, address: Address, generation: int, *, again: bool = False) -> None:
        """Have the mirror show what lies at an address, and below it.

        Args:
            address: which.
            generation: what was listed in it before is not listed again.
            again: list it whatever was listed before.

        Raises:
            OSError: the store does not tell.
        """
        local = self.path(address)
        with self._lock:
            if not again and self._is_listed(local, generation):
                return
            store = opened(address.scheme, address.bucket)
            found = store.listed(below(address.key))
            if not found and address.key:
                with contextlib.suppress(FileNotFoundError):
                    found = [store.head(address.key)]
            root = self.mirror / address.scheme / address.bucket
            self._show(store, root, found)
            self._forget(root, found, local)
            self._listed[local] = generation
            for each in [*above(address.key)][:_ABOVE]:
                self._look_beside(store, root, each, generation)

    def _look_beside(self, store: Store, root: Path, key: str, generation: int) -> None:
        """Have the mirror show trackers and logs, which lie beside checkpoints and above them."""
        local = f"{root}/{key}".rstrip("/")
        if self._is_listed(local, generation) or self._seen.get(local) == generation:
            return
        try:
            found = store.beside(below(key))
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EINVAL):  # rights may begin below
                raise
            if error.errno == errno.EINVAL:
                _log.warning("what lies beside it in %s/ is not seen: %s", key, error.strerror)
        else:
            self._show(store, root, found)
            self._forget(root, found, local, deep=False)
        self._seen[local] = generation

    def _is_listed(self, local: str, generation: int) -> bool:
        """Whether it, or what it lies in, was listed."""
        while len(local) > len(str(self.mirror)):
            if self._listed.get(local) == generation:
                return True
            local = local.rpartition("/")[0]
        return False

    def _show(self, store: Store, root: Path, found: Sequence[Object]) -> None:
        root.mkdir(parents=True, exist_ok=True)
        folders = {folder for each in found for folder in above(each.key)}
        for each in found:
            local = f"{root}/{each.key}"
            before = self._files.get(local)
            if before is not None and before.said == each:
                continue
            if is_strange(each.key):
                _log.warning("%s is passed over: no file can have that name", each.key)
            elif each.key in folders or Path(local).is_dir():
                if each.nbytes:  # an empty one is how consoles of stores show a folder
                    _log.warning("%s is passed over: it is also the name of a folder", each.key)
            else:
                stand_in(Path(local), each)
                self._files[local] = _Mirrored(store, each)

    def _forget(
        self, root: Path, found: Sequence[Object], local: str, *, deep: bool = True
    ) -> None:
        """Remove what stands for objects that were at `local`, or below it, and are gone."""
        kept, below = {f"{root}/{each.key}" for each in found}, f"{local}/"
        gone = [
            file
            for file in self._files
            if file not in kept
            and (file == local or file.startswith(below))
            and (deep or "/" not in file.removeprefix(below))
        ]
        for file in gone:
            del self._files[file]
            Path(file).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # a folder that holds something else ends it
                for folder in Path(file).parents:
                    if folder == self.mirror:
                        break
                    folder.rmdir()

    def open(self, local: str, *, whole: bool) -> int | None:
        """A descriptor of what a mirrored file holds; None for another file.

        Args:
            local: its path.
            whole: fetch all of it now, and keep it while the descriptor is open. Without, who reads
                says which ranges (`ranges`).

        Raises:
            OSError: the store does not give it.
        """
        with self._lock:
            found = self._files.get(local)
            if found is None:
                return None
            content = found.content or self._sparse(found)
            self._reap()
        descriptor = os.open(content.path, os.O_RDONLY | os.O_CLOEXEC)
        if whole:
            try:
                self.contents.keep(content)
            except BaseException:
                os.close(descriptor)
                raise
            with self._lock:
                found.whole.append(descriptor)
        return descriptor

    def _sparse(self, found: _Mirrored) -> Content:
        path = self.folder / "content" / str(next(self._numbers))
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            os.truncate(descriptor, found.said.nbytes)
            stat = os.fstat(descriptor)
        finally:
            os.close(descriptor)
        said = found.said
        number = int(path.name)
        found.inode = stat.st_dev, stat.st_ino
        found.content = Content(number, found.store, said.key, said.version, said.nbytes, path)
        self._by_inode[found.inode] = found
        return found.content

    def _reap(self) -> None:
        """Let go of files that were kept whole for descriptors that are closed by now."""
        for found in self._by_inode.values():
            for descriptor in [d for d in found.whole if not _is_of(d, found.inode)]:
                found.whole.remove(descriptor)
                assert found.content is not None
                self.contents.let_go(found.content)

    def expect(self, folders: Sequence[str], *, soon: bool, kept: bool) -> bool:
        """All that lies in some mirrored folders will be read; see `expect` below."""
        with self._lock:
            inside = [
                (local.removeprefix(folder), each)
                for folder in folders
                for local, each in self._files.items()
                if local.startswith(f"{folder}/") and each.said.nbytes
            ]
            # What has one name in all folders is read side by side, so it comes so.
            mirrored = [each for _, each in sorted(inside, key=lambda said: said[0])]
            needed = _OF_EACH * len(folders)
            if kept:
                needed = sum(each.said.nbytes for each in mirrored)
            if needed > self.contents.most_bytes:
                return False
            self.contents.expect(
                [each.content or self._sparse(each) for each in mirrored], soon=soon
            )
            return True

    def range(self, descriptor: int, start: int, nbytes: int) -> Range | None:
        """The part of a file of the spool that a descriptor reads; None of another file."""
        stat = os.fstat(descriptor)
        found = self._by_inode.get((stat.st_dev, stat.st_ino))
        if found is None or found.content is None or nbytes <= 0:
            return None
        return found.content, start, start + nbytes

    def close(self) -> None:
        """Remove all of it; harmless if called twice, or in a child of its process."""
        if os.getpid() != self._process:
            return
        self.contents.close()
        with self._lock:
            self._files.clear()
            self._by_inode.clear()
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            os.close(self._held)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()


def _is_of(descriptor: int, inode: tuple[int, int]) -> bool:
    try:
        stat = os.fstat(descriptor)
    except OSError:
        return False
    return (stat.st_dev, stat.st_ino) == inode


class _Process:
    """The spool of this process, once there is one."""

    spool: Spool | None = None
    at_end: Any = None
    lock = threading.RLock()
    generation = 0
    depth = 0


def spool() -> Spool:
    """The spool of this process, which goes with it."""
    with _Process.lock:
        made = _Process.spool
        if made is None or made._process != os.getpid():
            try:
                made = _Process.spool = Spool()
            except OSError as error:
                raise SelectionError(
                    f"what is read of stores cannot be kept in {spool_folder()} "
                    f"({error.strerror}): set {VARIABLE} to a folder on a disk of this machine, "
                    "which has room and locks (flock)"
                ) from error
            atexit.register(made.close)
            # The children of multiprocessing end without `atexit`.
            _Process.at_end = multiprocessing.util.Finalize(None, made.close, exitpriority=1)
        return made


def forget() -> None:
    """Remove the spool of this process; the next address that is asked for begins another."""
    with _Process.lock:
        made, _Process.spool = _Process.spool, None
        if made is not None:
            made.close()
            atexit.unregister(made.close)  # which would keep all that it knows
            if _Process.at_end is not None:
                _Process.at_end.cancel()


def active() -> Spool | None:
    """The spool of this process, if anything was asked of a store."""
    made = _Process.spool
    return made if made is not None and made._process == os.getpid() else None


@contextlib.contextmanager
def listing_once() -> Iterator[None]:
    """What is listed in the block is listed once, and anew in the next one; blocks may nest.

    When the outermost ends, however it does, no more is asked for ahead of need.
    """
    with _Process.lock:
        if not _Process.depth:
            _Process.generation += 1
        _Process.depth += 1
    try:
        yield
    finally:
        with _Process.lock:
            _Process.depth -= 1
            made = None if _Process.depth else active()
        if made is not None:
            made.contents.drop_ahead()


def look(address: Address, *, again: bool = False) -> str:
    """The local path for an address, whose mirror shows what lies there; see `Spool.look`."""
    made = spool()
    made.look(address, _Process.generation, again=again)
    return made.path(address)


@contextlib.contextmanager
def present(asked: Iterable[tuple[int, int, int]]) -> Iterator[None]:
    """Ranges of files are there within the block: (descriptor, first byte, bytes).

    Raises:
        OSError: a store does not give them.
    """
    made = active()
    if made is None:
        yield
        return
    ranges = [found for each in asked if (found := made.range(*each)) is not None]
    with made.contents.present(ranges):
        yield


def ahead(descriptor: int, start: int, nbytes: int) -> bool:
    """Fetch a range that is needed soon; False for a file that is no object of a store."""
    made = active()
    found = None if made is None else made.range(descriptor, start, nbytes)
    if made is None or found is None:
        return False
    made.contents.ahead(*found)
    return True


def expect(paths: Iterable[Path], *, soon: bool = False, kept: bool = True) -> bool:
    """All that lies in some folders of stores is read in this job; large requests are made then.

    Args:
        paths: folders; those on a disk are passed over.
        soon: ask for all of it now.
        kept: they are read here and there, so that all of it must be kept meanwhile; False for from
            the beginning on, side by side.

    Returns:
        False where there is no room for that: then nothing happens.
    """
    made = active()
    if made is None:
        return False
    root = f"{made.mirror}/"
    folders = [local for path in paths if (local := os.fspath(path)).startswith(root)]
    return bool(folders) and made.expect(folders, soon=soon, kept=kept)


def expect_no_more() -> None:
    """What is read after this is read here and there."""
    made = active()
    if made is not None:
        made.contents.expect_no_more()
